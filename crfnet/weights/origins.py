"""Where weights come from: for each origin, which tensor of a file makes which tensor of a network.

| origin        | files                                                                                             |
| "crfnet"      | this library's own, `crfnet.weights.save`                                                         |
| "caffe"       | .caffemodel of VGG-16, CaffeNet, GoogLeNet, FCN, DeepLab v1 and v2, CRF-RNN                       |
| "torchvision" | vgg16, alexnet, googlenet, resnet101                                                              |
| "vgg16_from_caffe" | Caffe's VGG-16 under torchvision's names, as wkentaro/pytorch-fcn has it: BGR, not normalised |
| "kazuto1011"  | kazuto1011/deeplab-pytorch: ResNet-101 of DeepLab v2, trained or on COCO                          |
| "wkentaro"    | wkentaro/pytorch-fcn: FCN-32s, -16s, -8s, 8s-at-once                                              |
| "sadeepj"     | sadeepj/crfasrnn_pytorch: CRF-RNN                                                                 |
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crfnet.crf import DenseCRF
from crfnet.models import CRFRNN, FCNGoogLeNet, preprocess
from crfnet.models.fcn import Head8s
from crfnet.models.fcn_googlenet import INCEPTIONS
from crfnet.models.preprocess import Convention, Preprocess
from crfnet.models.resnet import ResNet
from crfnet.weights.names import VGG, is_head, is_spare, layers

Tensors = Mapping[str, Tensor]


class Entry(NamedTuple):
    """How one tensor of a network comes about."""

    sources: tuple[str, ...]  # names in the file
    convert: Callable[..., Tensor] = lambda value: value  # from those tensors
    note: str = ""  # what was done to them, for the report


Plan = dict[str, Entry]  # name of ours → entry


def guess(tensors: Tensors) -> str:
    """The origin that the names tell of.

    Raises:
        ValueError: none that is known.
    """
    names = set(tensors)
    if any(re.search(r"(^|\.)preprocess\.(\w+\.)?order$", name) for name in names):
        return "crfnet"
    signs = {
        "sadeepj": set(_SADEEPJ),
        "kazuto1011": {f"{prefix}layer1.conv1.conv.weight" for prefix in ("", "base.", "scale.")},
        "wkentaro": {"conv1_1.weight"},
        "torchvision": {"features.0.weight", "inception3a.branch1.conv.weight", "layer1.0.conv1.weight"},
    }
    for origin, keys in signs.items():
        if keys & names:
            return origin
    if all(re.search(r"\.\d+$", name) for name in names):
        return "caffe"
    raise ValueError(f"file must be of one of the origins {('crfnet', *signs, 'caffe')}, got names of none")


def plan(origin: str, network: nn.Module, tensors: Tensors) -> Plan:
    """What the network takes from the file, missing names included.

    Raises:
        ValueError: the origin is unknown, or its network is another than this.
    """
    if origin == "crfnet":
        return {name: Entry((name,)) for name in network.state_dict()}
    planners = {
        "caffe": _caffe,
        "torchvision": _torchvision,
        "vgg16_from_caffe": _torchvision,
        "kazuto1011": _kazuto1011,
        "wkentaro": _caffe_names,
        "sadeepj": _sadeepj,
    }
    if origin not in planners:
        raise ValueError(f"origin must be one of {('crfnet', *planners)}, got {origin!r}")
    return planners[origin](network, tensors)


def convention(origin: str, given: Preprocess) -> Convention | None:
    """What the input of a network must be with weights of this origin; None: as it is saved with them."""
    if origin == "crfnet":
        return None
    built = given.built_for
    hha = built.mean == preprocess.NYUD_HHA.mean
    caffe = built.std == (1.0,) * len(built.order) and (hha or built.order[:3] == (2, 1, 0))
    if caffe and origin != "torchvision" and (hha or origin not in _PORTS):
        return built  # any mean of Caffe's: it belongs to the data
    if len(built.order) != 3 or built.logarithm:
        raise ValueError(
            f"network has {len(built.order)} channels, {built}, where weights of {origin} are of three colours: "
            "load Caffe's VGG-16 instead"
        )
    if origin == "torchvision":
        if built == preprocess.TORCHVISION_GOOGLENET:
            return built
        return built._replace(std=preprocess.TORCHVISION.std) if hha else preprocess.TORCHVISION
    return _PORTS.get(origin, preprocess.FCN)


_PORTS = {
    "wkentaro": preprocess.FCN,
    "kazuto1011": preprocess.DEEPLAB,
    "sadeepj": preprocess.FCN._replace(mean=(103.939, 116.779, 123.68)),
}
_SADEEPJ = [f"crfrnn.{name}" for name in ("spatial_ker_weights", "bilateral_ker_weights", "compatibility_matrix")]


def _modules(network: nn.Module) -> dict[str, list[str]]:
    """Paths of the modules that Caffe has names for → which of weight and bias each has."""
    names = set(network.state_dict())
    return {
        path: [part for part in ("weight", "bias") if f"{path}.{part}" in names] for path in layers(network).values()
    }


def _caffe(network: nn.Module, tensors: Tensors) -> Plan:
    """Blob 0 is the weight, blob 1 the bias; batch norm is mean, variance and what both are multiplied by."""
    found: Plan = {}
    parts = _modules(network)
    present = {name.rsplit(".", 1)[0] for name in tensors}
    if "fc8.1" in tensors and tensors["fc8.1"].numel() == 1000:
        present.remove("fc8")  # ImageNet's classes
    _check_at_once(network, tensors)
    if any(isinstance(module, ResNet) and module.stride_on != "reduce" for module in network.modules()):
        raise ValueError('network must be built with stride_on="reduce" for Caffe\'s ResNet, got "conv3x3"')
    for layer, path in layers(network).items():
        theirs = _actual(layer, present)
        if layer.startswith("bn"):
            scale = layer.replace("bn", "scale", 1)
            found[f"{path}.weight"], found[f"{path}.bias"] = Entry((f"{scale}.0",)), Entry((f"{scale}.1",))
            for index, statistic in enumerate(("running_mean", "running_var")):
                found[f"{path}.{statistic}"] = Entry(
                    (f"{layer}.{index}", f"{layer}.2"), _unscaled, "divided by the third blob of the layer"
                )
            continue
        for index, part in enumerate(parts[path]):
            found[f"{path}.{part}"] = _entry(f"{theirs}.{index}", tensors)
    if isinstance(network, CRFRNN) and "inference1" in present:
        found |= _crf(network.crf, ("inference1.0", "inference1.1", "inference1.2"), sign=1)
    return found


def _entry(source: str, tensors: Tensors) -> Entry:
    """One source; but CRF-RNN's deconvolution has a bias that the FCN it starts from has not."""
    weight = {"upscore2.bias": "upscore2.weight", "upscore2.1": "upscore2.0"}.get(source, "")
    if weight in tensors and source not in tensors and not any(name in tensors for name in _SADEEPJ):
        return Entry((), lambda: torch.zeros(len(tensors[weight])), "0: the file's deconvolution has no bias")
    return Entry((source,))


def _check_at_once(network: nn.Module, tensors: Tensors) -> None:
    """FCN-8s at once has its two scales in the file; the same weights without them compute something else."""
    heads = [module for module in network.modules() if isinstance(module, Head8s)]
    if not heads:
        return
    theirs = [float(tensors[f"scale_pool{n}.0"].flatten()[0]) if f"scale_pool{n}.0" in tensors else 1.0 for n in (4, 3)]
    scored = any(name.startswith("score") for name in tensors)
    if scored and not all(
        abs(a - b) <= 1e-6 * b for a, b in zip(theirs, (heads[0].scale4, heads[0].scale3), strict=True)
    ):
        raise ValueError(
            f"file must scale pool4 and pool3 by {heads[0].scale4:g} and {heads[0].scale3:g} as the network, got "
            f"{theirs}: FCN8s(at_once=True) is the one with scales"
        )


def _unscaled(statistic: Tensor, factor: Tensor) -> Tensor:
    if factor.numel() != 1:
        return factor.new_empty(0)  # of a shape that fits nothing
    divisor = factor.item()
    return statistic / divisor if divisor else torch.zeros_like(statistic)  # as Caffe has it before any training


_CRF_RNN = {  # CRF-RNN's own names in place of FCN's
    "score_fr": "score-fr",
    "upscore2": "score2",
    "score_pool4": "score-pool4",
    "upscore_pool4": "score4",
    "score_pool3": "score-pool3",
    "upscore8": "upsample",
}


def _actual(layer: str, present: set[str]) -> str:
    """The name that a layer has in this file."""
    if layer in present:
        return layer
    if layer in _CRF_RNN and "score-fr" in present:
        return _CRF_RNN[layer]
    if layer == "conv1_1" and "conv1_1_bgrd" in present:
        return "conv1_1_bgrd"
    if (plain := re.fullmatch(r"(.+?)(color|hha)", layer)) and "score_fr" not in present:
        return plain[1]  # both trunks from an ImageNet network
    if number := re.fullmatch(r"fc([67])_\d", layer):  # ASPP's branches, from a network that has none
        return f"fc{number[1]}" if f"fc{number[1]}" in present else layer
    if number := re.fullmatch(r"fc8(_\d)?", layer):
        pattern = f"fc8_*{number[1] or ''}"
    elif re.fullmatch(r"c\d", layer):
        pattern = f"fc1_*_{layer}"
    else:
        return layer
    matches = sorted(name for name in fnmatch.filter(present, pattern) if not is_spare(f"{name}.0"))
    if len(matches) > 1:
        raise ValueError(f"file must have one layer {pattern}, got {matches}")
    return matches[0] if matches else pattern


def _caffe_names(network: nn.Module, tensors: Tensors) -> Plan:
    """The ports' state dicts: Caffe's layers with .weight and .bias."""
    parts = _modules(network)
    return {
        f"{path}.{part}": _entry(f"{layer}.{part}", tensors)
        for layer, path in layers(network).items()
        for part in parts[path]
    }


def _sadeepj(network: nn.Module, tensors: Tensors) -> Plan:
    found = _caffe_names(network, tensors)
    return found | _crf(network.crf, _SADEEPJ, sign=-1) if isinstance(network, CRFRNN) else found


def _crf(crf: DenseCRF, sources: Iterable[str], *, sign: int) -> Plan:
    """Spatial weights, bilateral weights, compatibility; Caffe subtracts the message as we do, sadeepj adds it."""
    names = ("crf.kernels.spatial.weight", "crf.kernels.bilateral.weight", "crf.compatibility_matrix")
    has = {f"crf.{name}" for name in crf.state_dict()}
    if not has.issuperset(names):
        raise ValueError('network.crf must have weights="full" and compatibility="full", as CRF-RNN has')
    found = {name: Entry((source,)) for name, source in zip(names, sources, strict=True)}
    if sign < 0:
        (source,) = found[names[2]].sources
        found[names[2]] = Entry((source,), torch.neg, "sign turned: there the message is added")
    return found


def _torchvision(network: nn.Module, tensors: Tensors) -> Plan:
    if "features.0.weight" in tensors:
        return _torchvision_features(network, tensors)
    if "inception3a.branch1.conv.weight" in tensors:
        return _torchvision_googlenet(network)
    return _torchvision_resnet(network)


def _torchvision_features(network: nn.Module, tensors: Tensors) -> Plan:
    """VGG-16 and AlexNet: convolutions by number, then the classifier's linear layers."""
    numbers = sorted(int(name.split(".")[1]) for name in tensors if re.fullmatch(r"features\.\d+\.weight", name))
    vgg = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    if numbers not in (vgg, [0, 3, 6, 8, 10]):
        raise ValueError(
            f"file must be torchvision's vgg16 (without batch norm) or alexnet, got convolutions {numbers}"
        )
    theirs = VGG if numbers == vgg else [f"conv{index}" for index in range(1, 6)]
    modules = {layer: f"features.{number}" for layer, number in zip(theirs, numbers, strict=True)}
    fully = (0, 3) if numbers == vgg else (1, 4)
    modules |= {f"fc{6 + index}": f"classifier.{number}" for index, number in enumerate(fully)}
    found = {}
    parts = _modules(network)
    for layer, path in layers(network).items():
        plain = re.sub(r"^(conv\d_\d|fc[67])(color|hha|_\d)$", r"\1", layer)  # several trunks or branches, all from one
        for part in parts[path]:
            found[f"{path}.{part}"] = Entry((f"{modules.get(plain, layer)}.{part}",))
    return found


def _torchvision_googlenet(network: nn.Module) -> Plan:
    prefix = next((name for name, module in network.named_modules() if isinstance(module, FCNGoogLeNet)), None)
    prefix = f"{prefix}." if prefix else ""
    names = [name.removeprefix(prefix) for name in network.state_dict() if name.startswith(prefix)]
    if "trunk.conv1.bn.weight" not in names:
        raise ValueError(
            'network must be FCNGoogLeNet(style="torchvision") for torchvision\'s GoogLeNet, which has batch norm, 3x3 '
            f"in place of 5x5 convolutions and other pools than the paper's, got {type(network).__name__}"
        )
    table = {"trunk.conv1": "conv1", "trunk.conv2.0": "conv2", "trunk.conv2.1": "conv3"}
    branches = {
        "conv1x1": "branch1", "conv3x3.0": "branch2.0", "conv3x3.1": "branch2.1", "conv5x5.0": "branch3.0",
        "conv5x5.1": "branch3.1", "project.1": "branch4.1",
    }  # fmt: skip
    for name in INCEPTIONS:
        table |= {f"trunk.inception_{name}.{path}": f"inception{name}.{key}" for path, key in branches.items()}
    return {
        f"{prefix}{name}": Entry((f"{table[module]}.{rest}",))
        for name in names
        if (split := re.fullmatch(r"(trunk\..+?)\.((?:conv|bn)\.\w+)", name)) and (module := split[1], rest := split[2])
    }


def _torchvision_resnet(network: nn.Module) -> Plan:
    """layer1 to layer4 are res2 to res5."""
    prefix, trunk = _resnet(network)
    if trunk.stride_on == "reduce":
        raise ValueError(
            'network must be built with stride_on="conv3x3" for torchvision\'s ResNet, whose stride sits on the 3x3 '
            "convolution: with the stride elsewhere the same weights compute something else"
        )
    parts = {"reduce.conv": "conv1", "reduce.bn": "bn1", "conv3x3.conv": "conv2", "conv3x3.bn": "bn2"}
    parts |= {"increase.conv": "conv3", "increase.bn": "bn3"}
    parts |= {"shortcut.conv": "downsample.0", "shortcut.bn": "downsample.1"}

    def theirs(name: str) -> str:
        if stem := re.fullmatch(r"conv1\.(conv|bn)\.(\w+)", name):
            return f"{stem[1]}1.{stem[2]}"
        block = re.fullmatch(r"res(\d)\.(\d+)\.(\w+\.\w+)\.(\w+)", name)
        assert block is not None
        return f"layer{int(block[1]) - 1}.{block[2]}.{parts[block[3]]}.{block[4]}"

    return {f"{prefix}{name}": Entry((theirs(name),)) for name in trunk.state_dict()}


def _kazuto1011(network: nn.Module, tensors: Tensors) -> Plan:
    """Names as here but for numbers from 1, "base." in front ("scale." in old files), and the head's."""
    prefix, trunk = _resnet(network)
    if trunk.stride_on != "reduce":
        raise ValueError('network must be built with stride_on="reduce" for the weights of DeepLab v2, got "conv3x3"')
    theirs = next((p for p in ("base.", "scale.") if f"{p}layer1.conv1.conv.weight" in tensors), "")
    old = any(".proj." in name for name in tensors)
    found = {}
    for name in trunk.state_dict():
        key = re.sub(r"^res(\d)\.(\d+)", lambda match: f"layer{match[1]}.block{int(match[2]) + 1}", name)
        key = re.sub(r"^conv1", "layer1.conv1", key)
        found[f"{prefix}{name}"] = Entry((theirs + (key.replace(".shortcut.", ".proj.") if old else key),))
    for layer, path in layers(network).items():
        if is_head(layer):
            stages = "stages." if f"{theirs}aspp.stages.{layer}.weight" in tensors else ""
            for part in ("weight", "bias"):
                found[f"{path}.{part}"] = Entry((f"{theirs}aspp.{stages}{layer}.{part}",))
    return found


def _resnet(network: nn.Module) -> tuple[str, ResNet]:
    for name, module in network.named_modules():
        if isinstance(module, ResNet):
            return (f"{name}." if name else ""), module
    raise ValueError(f"network must have a ResNet for this file, got {type(network).__name__}")


def brief(names: Iterable[str], most: int = 40) -> str:
    """The first names of many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
