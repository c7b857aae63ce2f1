"""What the layers of each network are called in Caffe, and where they are here: {"conv1_1": "trunk.vgg.conv1_1", ...}.

Caffe's names are those of the released prototxts; the ports to PyTorch keep them, so that every origin goes through
this one table. ``bn`` layers stand for the pair of BatchNorm and Scale. Names that hold the name of an experiment
(fc8_voc12, fc1_coco_c0) are written without it: fc8, fc8_1, c0.
"""

import re

from torch import nn

from crfnet.models import (
    DeepLabV1,
    DeepLabV1MSc,
    DeepLabV2ResNet,
    DeepLabV2VGG,
    FCNAlexNet,
    FCNGoogLeNet,
    LateFusionFCN,
    MultiScale,
    SiftFlowFCN,
    WithCRF,
)
from crfnet.models.deeplab_v1_msc import SOURCES
from crfnet.models.fcn import FCN
from crfnet.models.fcn_googlenet import INCEPTIONS
from crfnet.models.resnet import BLOCKS
from crfnet.models.vgg import WIDTHS

Layers = dict[str, str]

VGG = [f"conv{stage}_{index}" for stage, widths in enumerate(WIDTHS, 1) for index in range(1, len(widths) + 1)]


def layers(network: nn.Module) -> Layers:
    """Layer names in Caffe → paths of the modules in ``network``.

    Raises:
        TypeError: the network is none that Caffe's names are known of.
    """
    if isinstance(network, MultiScale | WithCRF):
        return below("network", layers(network.network))
    for kind, table in _TABLES.items():
        if isinstance(network, kind):
            return table(network)
    raise TypeError(
        f"network must be one of crfnet.models, {', '.join(kind.__name__ for kind in _TABLES)}, or in MultiScale or "
        f"WithCRF, got {type(network).__name__}; crfnet.weights.read gives the tensors of a file by name"
    )


def below(prefix: str, table: Layers) -> Layers:
    """The same table where the network is a part of another."""
    return {layer: f"{prefix}.{path}" for layer, path in table.items()}


def is_head(layer: str) -> bool:
    """Whether a layer scores or enlarges scores, as none does in a network trained on ImageNet."""
    return layer.startswith(("score", "upscore", "fc8", "data_", "pool")) or layer in ("c0", "c1", "c2", "c3")


_SCORES = re.compile(
    r"(score|upscore|upsample|fc8_|fc1_.+_c\d|inference1|crfrnn|(data|pool\d)_(conv|fc|ms)\.)|(base\.|scale\.)?aspp\."
)
_SPARE = re.compile(
    r"(fc(8|1000|1_[^_.]+)?|classifier\.6|aux\d|loss\d/.+)\."  # scores of whole images
    r"|.+_res0(5|75)(_c\d)?\.\d$"  # copies: the prototxt of three scales has each layer three times
    r"|scale_pool\d\.|.+num_batches_tracked$"  # numbers that are the network's own or of no effect
)


def is_score(tensor: str) -> bool:
    """Whether a tensor of a file belongs to scores of pixels or what follows them."""
    return bool(_SCORES.match(tensor))


def is_spare(tensor: str) -> bool:
    """Whether a network is whole without a tensor of its file."""
    return bool(_SPARE.match(tensor))


def _vgg_fcn(network: nn.Module) -> Layers:
    assert isinstance(network, FCN)
    return {**_vgg_trunk("trunk"), **_heads(network.head, "head")}


def _vgg_trunk(prefix: str) -> Layers:
    return {**{name: f"{prefix}.vgg.{name}" for name in VGG}, "fc6": f"{prefix}.fc6.0", "fc7": f"{prefix}.fc7.0"}


def _heads(head: nn.Module, prefix: str, suffix: str = "") -> Layers:
    return {f"{name}{suffix}": f"{prefix}.{name}" for name, _ in head.named_children()}


def _alexnet(network: nn.Module) -> Layers:
    trunk = {f"conv{index}": f"trunk.conv{index}" for index in range(1, 6)}
    head = {"score_fr": "head.score_fr", "upscore": "head.upscore"}
    return {**trunk, "fc6": "trunk.fc6.0", "fc7": "trunk.fc7.0", **head}


def _googlenet(network: nn.Module) -> Layers:
    table = {"conv1/7x7_s2": "conv1", "conv2/3x3_reduce": "conv2.0", "conv2/3x3": "conv2.1"}
    parts = {
        "1x1": "conv1x1", "3x3_reduce": "conv3x3.0", "3x3": "conv3x3.1", "5x5_reduce": "conv5x5.0", "5x5": "conv5x5.1",
        "pool_proj": "project.1",
    }  # fmt: skip
    for name in INCEPTIONS:
        table |= {f"inception_{name}/{layer}": f"inception_{name}.{path}" for layer, path in parts.items()}
    trunk = {layer: f"trunk.{path}.conv" for layer, path in table.items()}
    return {**trunk, "score_fr": "head.score_fr", "upscore": "head.upscore"}


def _late_fusion(network: nn.Module) -> Layers:
    table: Layers = {}
    for ours, theirs in (("colour", "color"), ("hha", "hha")):
        table |= {f"{layer}{theirs}": path for layer, path in _vgg_trunk(f"trunk.{ours}").items()}
        table |= _heads(network.get_submodule(f"head.{ours}"), f"head.{ours}", theirs)
    return {layer.replace("upscorecolor", "upscore"): path for layer, path in table.items()}  # of both, hence plain


def _sift_flow(network: nn.Module) -> Layers:
    heads = {"semantic": "_sem", "geometric": "_geo"}
    table = _vgg_trunk("trunk")
    for ours, suffix in heads.items():
        table |= _heads(network.get_submodule(ours), ours, suffix)
    return table


def _deeplab_v1(network: nn.Module) -> Layers:
    fully = {"fc6": "fc6.0", "fc7": "fc7.0", "fc8": "fc8"}
    return {**{name: f"vgg.{name}" for name in VGG}, **fully}


def _deeplab_v1_msc(network: nn.Module) -> Layers:
    branches = {f"{source}_{part}": f"branches.{source}.{part}" for source in SOURCES for part in ("conv", "fc", "ms")}
    return {**below("base", _deeplab_v1(network)), **branches}


def _deeplab_v2_vgg(network: nn.Module) -> Layers:
    table = {name: f"vgg.{name}" for name in VGG}
    count = len(network.get_submodule("head.branches")._modules)
    for index in range(count):
        suffix, path = "" if count == 1 else f"_{index + 1}", f"head.branches.{index}"
        table |= {f"fc6{suffix}": f"{path}.fc6.0", f"fc7{suffix}": f"{path}.fc7.0", f"fc8{suffix}": f"{path}.fc8"}
    return table


def _deeplab_v2_resnet(network: nn.Module) -> Layers:
    table = {"conv1": "resnet.conv1.conv", "bn_conv1": "resnet.conv1.bn"}
    for stage, blocks in enumerate(BLOCKS[101], 2):
        for index in range(blocks):
            letter = (
                f"b{index}" if blocks > 3 and index else "abc"[index]
            )  # res2a res2b res2c; res4a res4b1 ... res4b22
            parts = {"2a": "reduce", "2b": "conv3x3", "2c": "increase"} | ({} if index else {"1": "shortcut"})
            for branch, part in parts.items():
                path = f"resnet.res{stage}.{index}.{part}"
                table |= {f"res{stage}{letter}_branch{branch}": f"{path}.conv"}
                table |= {f"bn{stage}{letter}_branch{branch}": f"{path}.bn"}
    count = len(network.get_submodule("head.branches")._modules)
    return table | {f"c{index}": f"head.branches.{index}" for index in range(count)}


_TABLES = {  # the first that fits: the networks before what they are made of
    FCNAlexNet: _alexnet,
    FCNGoogLeNet: _googlenet,
    FCN: _vgg_fcn,
    LateFusionFCN: _late_fusion,
    SiftFlowFCN: _sift_flow,
    DeepLabV1: _deeplab_v1,
    DeepLabV1MSc: _deeplab_v1_msc,
    DeepLabV2VGG: _deeplab_v2_vgg,
    DeepLabV2ResNet: _deeplab_v2_resnet,
}
