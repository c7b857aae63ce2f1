"""Weights of other people's networks: the outputs of theirs, nothing silently elsewhere, and errors that name the keys.

tests/foreign.py computes each network from arrays under the names of its file; here they are written to such a file,
loaded, and both networks run on one image. Channels are a sixteenth of the published ones, as in tests/slim.py: names,
layers and geometry are all there. Where numbers of channels count, they are the published ones.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import foreign
import pytest
import torch
from caffe_writer import write_caffemodel
from foreign import (
    Arrays,
    Net,
    Table,
    alexnet,
    alexnet_table,
    aspp,
    aspp_table,
    bgr,
    caffe_layers,
    caffe_names,
    caffe_norms,
    classifier_trunk,
    conv,
    crf_rnn,
    crf_rnn_table,
    deconv,
    deeplab,
    deeplab_table,
    draw,
    fcn,
    fcn_alexnet,
    fcn_googlenet,
    fcn_head,
    fcn_table,
    fcn_trunk,
    flat,
    fully_table,
    googlenet,
    googlenet_table,
    imagenet,
    largefov,
    late_fusion,
    late_fusion_table,
    msc_largefov,
    msc_table,
    multi_scale,
    resnet,
    resnet_head,
    resnet_head_table,
    resnet_table,
    sadeepj_names,
    torch_names,
    torchvision_vgg,
    torchvision_vgg_table,
    vgg_table,
    zoom,
)
from slim import slim
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crfnet import DenseCRF, weights
from crfnet.models import (
    CRFRNN,
    BackboneDeepLab,
    DeepLabV1,
    DeepLabV1MSc,
    DeepLabV2ResNet,
    DeepLabV2VGG,
    FCN8s,
    FCN16s,
    FCN32s,
    FCNAlexNet,
    FCNGoogLeNet,
    LateFusionFCN,
    MultiScale,
    SiftFlowFCN,
    SmallDeepLab,
    WithCRF,
)
from crfnet.models import preprocess as conventions
from crfnet.models.preprocess import Preprocess

pytest.importorskip("google.protobuf")
pytest.importorskip("safetensors")

FCN_MEAN = (104.00698793, 116.66876762, 122.67891434)
DEEPLAB_MEAN = (104.008, 116.669, 122.675)
WB = ("weight", "bias")
HEAD = ("aspp.c0", "aspp.c1", "aspp.c2", "aspp.c3")
THETAS = ("crf.kernels.*.log_theta_*",)  # CRF-RNN's are fixed, and in no file
COUNTER = "num_batches_tracked"  # of no effect
FC1 = ("fc1_voc12_c0", "fc1_voc12_c1", "fc1_voc12_c2", "fc1_voc12_c3")


class Uninitialised(TorchFunctionMode):
    """Within it nothing is drawn: most of the time that a large network takes to build."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def blank(build: Callable[[], nn.Module], divisor: int = 16) -> nn.Module:
    """A network of NaN, so that whatever a file does not fill shows in the outputs."""
    with slim(divisor), Uninitialised():
        network = build().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and "preprocess" not in name and "log_theta" not in name:
            tensor.fill_(torch.nan)
    return network


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Patches of colour under grain of some levels, RGB in 0..255: colours and edges count, to a CRF too."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(1, channels, 4, 5, generator=generator) * 230 + 10
    image = torch.nn.functional.interpolate(patches, (height, width), mode="nearest")
    return (image + 2 * torch.randn(image.shape, generator=generator)).clamp(1, 255)


def assert_same_outputs(ours: Tensor, theirs: Tensor) -> None:
    """Up to 1e-4 of the outputs' spread.

    Float32 rounds a sum of n products to about sqrt(n) 6e-8 of their size, n up to 25088, and up to a hundred layers
    follow each other: 1e-5. A wrong layer, pad, order or mean changes outputs by a tenth of their spread and more.
    """
    assert ours.shape == theirs.shape and bool(theirs.isfinite().all())
    spread = theirs.std()
    assert spread > 0.01 and (ours - theirs).abs().max() <= 1e-4 * spread, ((ours - theirs).abs().max() / spread).item()


class Case(NamedTuple):
    """A file, the network it is for, and how both make something of an image of RGB in 0..255."""

    build: Callable[[], nn.Module]
    table: Table
    theirs: Callable[[Net, Tensor], Any]
    file: Callable[[Arrays], Any] = lambda arrays: arrays  # arrays by layer for Caffe, else tensors by name
    ours: Callable[[Any, Tensor], Any] = lambda network, image: network(image)
    size: tuple[int, int] = (41, 49)
    channels: int = 3
    divisor: int = 16
    version: str = "v2"
    wrapper: str = ""  # key under which a state dict lies
    kept: tuple[str, ...] = ()  # patterns of the network's parameters that the file has nothing for
    unused: tuple[str, ...] = ()  # patterns of the file's names
    mean: tuple[float, ...] = FCN_MEAN
    origin: str | None = None


def _features(network: Any, image: Tensor) -> Tensor:
    return network.trunk(network.preprocess(image))[-1]


def _marginals(network: Any, image: Tensor) -> Tensor:
    return network(image).log_softmax(1)  # what all labels of a pixel share is arbitrary


def _with_copies(arrays: Arrays) -> Arrays:
    """The prototxt of three scales has three of every layer, which share their weights."""
    file = caffe_norms(arrays)
    copies: Arrays = {}
    for layer, blobs in file.items():
        for scale in ("res05", "res075"):
            name = layer.replace("voc12", f"voc12_{scale}") if layer.startswith("fc1") else f"{layer}_{scale}"
            copies[name] = blobs
    return copies | file


def _crf(labels: int = 4) -> DenseCRF:
    return DenseCRF(labels, engine="exact", precision="float32")


def _nyud(image: Tensor) -> Tensor:
    """Colour and a depth, as nyud_layers.py has them."""
    return torch.cat([bgr(image[:, :3], 116.190, 97.203, 92.318), image[:, 3:].log() - 7.844], 1)


def _hha(image: Tensor) -> Tensor:
    return image - torch.tensor([132.431, 94.076, 118.477]).view(3, 1, 1)


VGG16 = vgg_table() | fully_table()
VGG16_CLASSES = VGG16 | {"fc8": conv(1000, 4096, 1)}
NYUD_COLOUR_MEAN = (116.190, 97.203, 92.318)
SIFT_TABLE = {stride: VGG16 | fcn_table(5, stride, "_sem") | fcn_table(3, stride, "_geo") for stride in (32, 16, 8)}


def _sift(stride: int) -> Case:
    def theirs(net: Net, image: Tensor) -> list[Tensor]:
        x = bgr(image, 114.578, 115.294, 108.353)
        features = fcn_trunk(net, x)
        return [fcn_head(net, features, x, stride, suffix) for suffix in ("_sem", "_geo")]

    mean = (114.578, 115.294, 108.353)
    return Case(lambda: SiftFlowFCN(5, 3, stride=stride), SIFT_TABLE[stride], theirs, mean=mean)


def _wkentaro(build: Callable[[], nn.Module], stride: int, wrapper: str = "") -> Case:
    table = VGG16 | fcn_table(4, stride)
    return Case(build, table, lambda net, i: fcn(net, bgr(i, *FCN_MEAN), stride), torch_names, wrapper=wrapper)


def _kazuto(style: str, prefix: str, names: tuple[str, ...], **others: Any) -> Case:
    return Case(
        lambda: DeepLabV2ResNet(4),
        resnet_table(style) | (resnet_head_table(4, names) if "c0" in names[0] else {names[0]: conv(91, 2048, 1)}),
        lambda net, i: resnet_head(net, resnet(net, bgr(i, *DEEPLAB_MEAN), style), names),
        lambda arrays: torch_names(arrays, prefix),
        lambda network, i: network(i, upsample=False),
        mean=DEEPLAB_MEAN,
    )._replace(**others)


CASES = {
    # Caffe
    "VGG-16": Case(
        lambda: FCN32s(4), VGG16_CLASSES, lambda net, i: classifier_trunk(net, bgr(i, *FCN_MEAN)),
        lambda arrays: flat(arrays, "fc6", "fc7", "fc8"), _features, kept=("head.*",), unused=("fc8.?",),
    ),
    "VGG-16 of 2014": Case(
        lambda: FCN8s(4), VGG16_CLASSES, lambda net, i: classifier_trunk(net, bgr(i, *FCN_MEAN)),
        lambda arrays: flat(arrays, *arrays, four=True), _features, kept=("head.*",), unused=("fc8.?",), version="v1",
    ),
    "CaffeNet": Case(
        lambda: FCNAlexNet(4), alexnet_table("caffe") | {"fc8": conv(1000, 4096, 1)},
        lambda net, i: alexnet(net, bgr(i, *FCN_MEAN), "caffe"),
        lambda arrays: flat(arrays, "fc6", "fc7", "fc8", four=True), _features, kept=("head.*",), unused=("fc8.?",),
        version="v1",
    ),
    "bvlc_googlenet": Case(
        lambda: FCNGoogLeNet(4), googlenet_table("caffe") | {"loss3/classifier": conv(1000, 1024, 1)},
        lambda net, i: googlenet(net, bgr(i, *FCN_MEAN), "caffe"), ours=_features, size=(70, 97), divisor=1,
        kept=("head.*",), unused=("loss3/classifier.?",), version="v1",
    ),
    "FCN-GoogLeNet": Case(
        lambda: FCNGoogLeNet(4),
        googlenet_table("caffe") | {"score_fr": conv(4, 1024, 1), "upscore": deconv(4, 63)},
        lambda net, i: fcn_googlenet(net, bgr(i, *FCN_MEAN)), size=(70, 97),
    ),
    "FCN-AlexNet": Case(
        lambda: FCNAlexNet(4),
        alexnet_table("caffe") | {"score_fr": conv(4, 4096, 1), "upscore": deconv(4, 63)},
        lambda net, i: fcn_alexnet(net, bgr(i, *FCN_MEAN)),
    ),
    "FCN-32s": Case(lambda: FCN32s(4), VGG16 | fcn_table(4, 32), lambda net, i: fcn(net, bgr(i, *FCN_MEAN), 32)),
    "FCN-16s": Case(
        lambda: FCN16s(4), VGG16 | fcn_table(4, 16), lambda net, i: fcn(net, bgr(i, *FCN_MEAN), 16), version="v1"
    ),
    "FCN-8s": Case(lambda: FCN8s(4), VGG16 | fcn_table(4, 8), lambda net, i: fcn(net, bgr(i, *FCN_MEAN), 8)),
    "FCN-8s under a CRF": Case(
        lambda: WithCRF(FCN8s(4), _crf()), VGG16 | fcn_table(4, 8), lambda net, i: fcn(net, bgr(i, *FCN_MEAN), 8),
        ours=lambda network, i: network.network(i), kept=("crf.*",),
    ),
    "FCN-8s at once": Case(
        lambda: FCN8s(4, at_once=True), VGG16 | fcn_table(4, 8, at_once=True),
        lambda net, i: fcn(net, bgr(i, *FCN_MEAN), 8), unused=("scale_pool?.0",),
    ),
    "FCN-32s, NYUD colour": Case(
        lambda: FCN32s(4, convention=conventions.NYUD_COLOUR), VGG16 | fcn_table(4, 32),
        lambda net, i: fcn(net, bgr(i, *NYUD_COLOUR_MEAN), 32), mean=NYUD_COLOUR_MEAN,
    ),
    "FCN-32s, NYUD HHA": Case(
        lambda: FCN32s(4, convention=conventions.NYUD_HHA), VGG16 | fcn_table(4, 32),
        lambda net, i: fcn(net, _hha(i), 32), mean=(132.431, 94.076, 118.477),
    ),
    "FCN-32s, NYUD early fusion": Case(
        lambda: FCN32s(4, convention=conventions.NYUD_COLOUR_DEPTH),
        vgg_table(first="conv1_1_bgrd", channels=4) | fully_table() | fcn_table(4, 32),
        lambda net, i: fcn(net, _nyud(i), 32, first="conv1_1_bgrd"), channels=4, mean=(*NYUD_COLOUR_MEAN, 7.844),
    ),
    "FCN-32s, NYUD late fusion": Case(
        lambda: LateFusionFCN(4), late_fusion_table(4),
        lambda net, i: late_fusion(net, bgr(i[:, :3], *NYUD_COLOUR_MEAN), _hha(i[:, 3:])), channels=6, mean=(),
    ),
    "FCN-32s, SIFT Flow": _sift(32),
    "FCN-16s, SIFT Flow": _sift(16),
    "FCN-8s, SIFT Flow": _sift(8),
    "DeepLab": Case(
        lambda: DeepLabV1(4, variant="deeplab"), deeplab_table(4, "fc8_pascal", channels=4096, kernel=4),
        lambda net, i: deeplab(net, bgr(i, *DEEPLAB_MEAN), "fc8_pascal"), size=(42, 50), version="v1",
        mean=DEEPLAB_MEAN,
    ),
    "DeepLab-LargeFOV": Case(
        lambda: DeepLabV1(4), deeplab_table(4), lambda net, i: largefov(net, bgr(i, *DEEPLAB_MEAN)), version="v1",
        mean=DEEPLAB_MEAN, divisor=1,
    ),
    "DeepLab-LargeFOV of v2": Case(
        lambda: DeepLabV2VGG(4, head="largefov"), deeplab_table(4, "fc8_voc12_largefov"),
        lambda net, i: largefov(net, bgr(i, *DEEPLAB_MEAN), "fc8_voc12_largefov"), mean=DEEPLAB_MEAN,
    ),
    "DeepLab-MSc-LargeFOV": Case(
        lambda: DeepLabV1MSc(4), msc_table(4), lambda net, i: msc_largefov(net, bgr(i, *DEEPLAB_MEAN)), version="v1",
        mean=DEEPLAB_MEAN,
    ),
    "DeepLab v2, ASPP": Case(
        lambda: DeepLabV2VGG(4), aspp_table(4), lambda net, i: aspp(net, bgr(i, *DEEPLAB_MEAN)), mean=DEEPLAB_MEAN
    ),
    "DeepLab v2, ResNet-101": Case(
        lambda: DeepLabV2ResNet(4), resnet_table("caffe") | resnet_head_table(4, FC1),
        lambda net, i: zoom(resnet_head(net, resnet(net, bgr(i, *DEEPLAB_MEAN), "caffe"), FC1), 8),
        caffe_norms, mean=DEEPLAB_MEAN, divisor=1,
    ),
    "DeepLab v2, ResNet-101 at three scales": Case(
        lambda: MultiScale(DeepLabV2ResNet(4)), resnet_table("caffe") | resnet_head_table(4, FC1),
        lambda net, i: multi_scale(
            lambda x: resnet_head(net, resnet(net, x, "caffe"), FC1), bgr(i, *DEEPLAB_MEAN)
        ),
        _with_copies, size=(33, 65), unused=("*_res05*", "*_res075*"), mean=DEEPLAB_MEAN,
    ),
    "CRF-RNN": Case(
        lambda: CRFRNN(4, crf=_crf()), crf_rnn_table(4),
        lambda net, i: crf_rnn(net, bgr(i, *FCN_MEAN), sign=-1, iterations=10), ours=_marginals, size=(33, 40),
        kept=THETAS,
    ),
    # torchvision
    "vgg16": Case(
        lambda: FCN8s(4), torchvision_vgg_table() | {"classifier.6": conv(1000, 4096, 1)},
        lambda net, i: torchvision_vgg(net, imagenet(i)),
        lambda arrays: torch_names(flat(arrays, "classifier.0", "classifier.3", "classifier.6")), _features,
        kept=("head.*",), unused=("classifier.6.*",), mean=(),
    ),
    "vgg16_from_caffe": Case(
        lambda: FCN8s(4), torchvision_vgg_table(1 / 60) | {"classifier.6": conv(1000, 4096, 1)},
        lambda net, i: torchvision_vgg(net, bgr(i, *FCN_MEAN)),
        lambda arrays: torch_names(flat(arrays, "classifier.0", "classifier.3", "classifier.6")), _features,
        kept=("head.*",), unused=("classifier.6.*",), origin="vgg16_from_caffe",
    ),
    "alexnet": Case(
        lambda: FCNAlexNet(4, style="torchvision"),
        alexnet_table("torchvision") | {"classifier.6": conv(1000, 4096, 1)},
        lambda net, i: alexnet(net, imagenet(i), "torchvision"),
        lambda arrays: torch_names(flat(arrays, "classifier.1", "classifier.4", "classifier.6")), _features,
        kept=("head.*",), unused=("classifier.6.*",), mean=(),
    ),
    "googlenet": Case(
        lambda: FCNGoogLeNet(4, style="torchvision"),
        googlenet_table("torchvision") | {"fc": conv(1000, 1024, 1), "aux1.fc1": conv(1024, 2048, 1)},
        lambda net, i: googlenet(net, i / 127.5 - 1, "torchvision"),
        lambda arrays: torch_names(flat(arrays, "fc", "aux1.fc1")), _features, size=(70, 97), divisor=1,
        kept=("head.*",), unused=("fc.*", "aux1.*"), mean=(),
    ),
    "resnet101": Case(
        lambda: DeepLabV2ResNet(4, stride_on="conv3x3"),
        resnet_table("torchvision", raw=False) | {"fc": conv(1000, 2048, 1)},
        lambda net, i: resnet(net, imagenet(i), "torchvision"),
        lambda arrays: torch_names(flat(arrays, "fc")),
        lambda network, i: network.resnet(network.preprocess(i)), kept=("head.*",), unused=("fc.*",), mean=(),
    ),
    # the ports
    "kazuto1011": _kazuto("kazuto1011", "base.", HEAD),
    "kazuto1011, old": _kazuto("old", "scale.", tuple(name.replace("aspp.", "aspp.stages.") for name in HEAD)),
    "kazuto1011, COCO": _kazuto(
        "kazuto1011", "", ("fc",), theirs=lambda net, i: resnet(net, bgr(i, *DEEPLAB_MEAN), "kazuto1011"),
        ours=lambda network, i: network.resnet(network.preprocess(i)), kept=("head.*",), unused=("fc.*",),
    ),
    "wkentaro, FCN-32s": _wkentaro(lambda: FCN32s(4), 32),
    "wkentaro, FCN-16s in training": _wkentaro(lambda: FCN16s(4), 16, "model_state_dict"),
    "wkentaro, FCN-8s": _wkentaro(lambda: FCN8s(4), 8),
    "wkentaro, FCN-8s for CRF-RNN": _wkentaro(lambda: CRFRNN(4), 8)._replace(
        ours=lambda network, i: network.network(i), kept=("crf.*",)
    ),
    "sadeepj": Case(
        lambda: CRFRNN(4, crf=_crf()), crf_rnn_table(4),
        lambda net, i: crf_rnn(net, bgr(i, 103.939, 116.779, 123.68), sign=1, iterations=10), sadeepj_names,
        _marginals, size=(33, 40), kept=THETAS, mean=(103.939, 116.779, 123.68),
    ),
}  # fmt: skip


def put(path: Path, file: Any, *, version: str = "v2", wrapper: str = "") -> Path:
    """A Caffe model of arrays by layer, or a PyTorch file of tensors by name."""
    if isinstance(next(iter(file.values())), list):
        write_caffemodel(path, caffe_layers(file), version=version, legacy_shape=version == "v1")
    else:
        torch.save({wrapper: file, "epoch": 3} if wrapper else file, path)
    return path


def names_of(file: Any) -> set[str]:
    return set(caffe_names(file) if isinstance(next(iter(file.values())), list) else file)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """For one file, gone with the test: some are large."""
    yield tmp_path / "weights.file"
    (tmp_path / "weights.file").unlink(missing_ok=True)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_file_loads_to_the_same_outputs(path, name):
    case = CASES[name]
    arrays = draw(case.table, divisor=case.divisor)
    network, file = blank(case.build, case.divisor), case.file(arrays)
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    report = weights.load(network, put(path, file, version=case.version, wrapper=case.wrapper), origin=case.origin)
    image = picture(*case.size, case.channels)
    ours, theirs = case.ours(network, image), case.theirs(Net(arrays), image)
    for mine, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, theirs)), strict=True):
        assert_same_outputs(mine, other)
    assert trained == {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    # the report is exact
    everything = {name for name in names_of(file) if not name.endswith(COUNTER)}
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    numbers = [name for name in state if "preprocess." not in name]
    kept = {name for name in numbers if any(fnmatch.fnmatchcase(name, pattern) for pattern in case.kept)}
    assert set(report.kept) == kept and len(report.kept) == len(kept)
    assert {name for name in report.used if not name.endswith(COUNTER)} == set(numbers) - kept
    unused = {name for name in everything if any(fnmatch.fnmatchcase(name, pattern) for pattern in case.unused)}
    assert report.unused == sorted(unused)
    used = {key for keys in report.used.values() if keys for key in keys.split(", ")}
    assert {key for key in used if not key.endswith(COUNTER)} == everything - unused
    assert set(report.adapted) <= set(report.used)
    assert all(bool(state[name].isnan().all()) for name in kept if "log_theta" not in name)
    # and so is the input
    if case.mean:
        inputs = next(module for module in network.modules() if isinstance(module, Preprocess))
        torch.testing.assert_close(inputs.mean, torch.tensor(case.mean), rtol=0, atol=2e-5)
        assert inputs.std.tolist() == [1.0] * len(case.mean)
    str(report)


# what a smaller network takes of a larger one: numbers of channels count here, so they are the published ones


@pytest.fixture(scope="module")
def classification() -> Arrays:
    """Caffe's VGG-16 of ImageNet, 138 million numbers."""
    return draw(VGG16_CLASSES)


@pytest.fixture(scope="module")
def classification_file(classification, tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("vgg") / "VGG_ILSVRC_16_layers.caffemodel"
    yield put(path, flat(classification, "fc6", "fc7", "fc8", four=True), version="v1")
    path.unlink()


@torch.no_grad()
def test_the_published_vgg16_fills_fcn(classification, classification_file):
    network = blank(lambda: FCN32s(4), 1)
    report = weights.load(network, classification_file)
    image = picture(25, 33)
    assert_same_outputs(_features(network, image), classifier_trunk(Net(classification), bgr(image, *FCN_MEAN)))
    assert report.unused == ["fc8.0", "fc8.1"] and report.origin == "caffe"
    assert report.adapted["trunk.fc6.0.weight"] == "(1, 1, 4096, 25088) read as (4096, 512, 7, 7)"
    assert report.adapted["trunk.fc7.0.bias"] == "(1, 1, 1, 4096) read as (4096,)"
    assert report.kept == ["head.score_fr.weight", "head.score_fr.bias", "head.upscore.weight"]


@pytest.mark.parametrize("build", [DeepLabV1, lambda n: DeepLabV2VGG(n, head="largefov"), DeepLabV1MSc])
def test_largefov_takes_fc6_at_rows_0_3_6_and_every_fourth_channel(classification, classification_file, build):
    network = blank(lambda: build(4), 1)
    report = weights.load(network, classification_file)
    state = network.state_dict()
    prefix = {"DeepLabV1": "", "DeepLabV1MSc": "base.", "DeepLabV2VGG": "head.branches.0."}[type(network).__name__]
    (w6, b6), (w7, b7) = classification["fc6"], classification["fc7"]
    for k, row, column in [(0, 0, 0), (1, 1, 2), (17, 2, 1), (1023, 2, 2)]:
        assert torch.equal(state[f"{prefix}fc6.0.weight"][k, :, row, column], w6[4 * k, :, 3 * row, 3 * column])
    assert torch.equal(state[f"{prefix}fc6.0.weight"], w6[::4, :, ::3, ::3])
    assert torch.equal(state[f"{prefix}fc7.0.weight"], w7[::4, ::4])
    assert torch.equal(state[f"{prefix}fc6.0.bias"], b6[::4]) and torch.equal(state[f"{prefix}fc7.0.bias"], b7[::4])
    assert "[0, 3, 6]" in report.adapted[f"{prefix}fc6.0.weight"] and "4th" in report.adapted[f"{prefix}fc7.0.bias"]
    assert report.unused == ["fc8.0", "fc8.1"]
    assert all(("fc8" in name or "branches." in name) and bool(state[name].isnan().all()) for name in report.kept)


@pytest.mark.parametrize("variant", ["deeplab", "4x4"])
def test_deeplab_takes_fc6_at_rows_0_2_4_6(classification, classification_file, variant):
    network = blank(lambda: DeepLabV1(4, variant=variant), 1)
    report = weights.load(network, classification_file)
    (w6, b6), (w7, b7) = classification["fc6"], classification["fc7"]
    assert torch.equal(network.fc6[0].weight, w6[:, :, ::2, ::2]) and torch.equal(network.fc6[0].bias, b6)
    assert torch.equal(network.fc7[0].weight, w7) and torch.equal(network.fc7[0].bias, b7)
    assert "[0, 2, 4, 6]" in report.adapted["fc6.0.weight"] and "all channels" in report.adapted["fc6.0.weight"]
    assert report.kept == ["fc8.weight", "fc8.bias"]


def test_the_branches_of_aspp_begin_alike(classification):
    file = torch_names(flat(classification, "fc6", "fc7", "fc8"))
    parts = {f"features.{n}": name for n, name in zip(foreign.TORCHVISION_VGG, foreign.VGG, strict=True)}
    vgg16 = {f"{theirs}.{part}": file[f"{ours[0]}.{part}"] for theirs, ours in parts.items() for part in WB}
    for theirs, ours in (("classifier.0", "fc6"), ("classifier.3", "fc7"), ("classifier.6", "fc8")):
        vgg16 |= {f"{theirs}.{part}": file[f"{ours}.{part}"] for part in WB}
    for source, last in ((caffe_names(classification), "fc8.1"), (vgg16, "classifier.6.weight")):
        network = blank(lambda: MultiScale(DeepLabV2VGG(4)), 1)
        report = weights.load(network, source)
        assert last in report.unused and len(report.unused) == 2 and len(report.kept) == 8
        for branch in network.network.head.branches:
            assert torch.equal(branch.fc6[0].weight, classification["fc6"][0][::4, :, ::3, ::3])
            assert torch.equal(branch.fc7[0].weight, classification["fc7"][0][::4, ::4])
            assert torch.equal(branch.fc7[0].bias, classification["fc7"][1][::4])
            assert bool(branch.fc8.weight.isnan().all())


def test_what_was_trained_to_score_is_not_reduced(classification):
    """DeepLab-7x7 has VGG-16's fc6, and scores."""
    scores = {"fc8_voc.0": torch.ones(4, 4096, 1, 1), "fc8_voc.1": torch.ones(4)}
    trained = without(caffe_names(classification), "fc8.?") | scores
    network = blank(lambda: DeepLabV1(4), 1)
    refused(network, trained, "fc6.0 (4096, 512, 7, 7), wanted (1024, 512, 3, 3)")
    report = weights.load(network, trained, keep=["fc8.*"])  # but may be started from
    assert "[0, 3, 6]" in report.adapted["fc6.0.weight"]


def test_a_fourth_channel_is_the_mean_of_three():
    arrays = draw(VGG16_CLASSES, divisor=16)
    network = blank(lambda: FCN32s(4, convention=conventions.NYUD_COLOUR_DEPTH))
    report = weights.load(network, caffe_names(arrays))
    first = network.trunk.vgg.conv1_1
    assert torch.equal(first.weight[:, :3], arrays["conv1_1"][0])
    torch.testing.assert_close(first.weight[:, 3], arrays["conv1_1"][0].mean(1))
    assert "fourth channel" in report.adapted["trunk.vgg.conv1_1.weight"]
    assert network.preprocess.order.tolist() == [2, 1, 0, 3]


def test_googlenet_of_torchvision_under_a_crf():
    case = CASES["googlenet"]
    network = blank(lambda: WithCRF(FCNGoogLeNet(4, style="torchvision"), _crf()))
    report = weights.load(network, case.file(draw(case.table, divisor=16)))
    assert report.used["network.trunk.conv1.conv.weight"] == "conv1.conv.weight"
    assert {name for name in report.kept if "theta" not in name} == {
        name for name in network.state_dict() if name.startswith(("network.head.", "crf.")) and "theta" not in name
    }


def test_both_trunks_of_late_fusion_come_from_one_network():
    arrays = draw(VGG16_CLASSES, divisor=16)
    network = blank(lambda: LateFusionFCN(4))
    report = weights.load(network, caffe_names(arrays))
    for name in ("colour", "hha"):
        assert torch.equal(network.trunk[name].vgg.conv4_2.weight, arrays["conv4_2"][0])
        assert torch.equal(network.trunk[name].fc7[0].weight, arrays["fc7"][0])
    assert report.kept == [n for n in network.state_dict() if n.startswith("head.")]
    assert report.used["trunk.hha.vgg.conv1_1.bias"] == "conv1_1.1" and "adapted" not in str(report)


# the input's convention


def inputs_of(network: nn.Module) -> list[tuple[list, list, list]]:
    found = [module for module in network.modules() if isinstance(module, Preprocess)]
    return [(m.order.tolist(), [round(x, 3) for x in m.mean.tolist()], m.std.tolist()) for m in found]


def test_the_convention_comes_with_the_weights():
    network = blank(lambda: FCN8s(4))
    theirs = torch_names(draw(torchvision_vgg_table(), divisor=16))
    caffe = caffe_names(draw(VGG16 | fcn_table(4, 8), divisor=16))
    port = torch_names(draw(VGG16 | fcn_table(4, 8), divisor=16))
    rgb = [([0, 1, 2], [123.675, 116.28, 103.53], pytest.approx([58.395, 57.12, 57.375]))]
    ours = [([2, 1, 0], [104.007, 116.669, 122.679], [1.0] * 3)]
    for source, wanted in ((theirs, rgb), (caffe, ours), (theirs, rgb), (port, ours)):
        weights.load(network, source)
        assert inputs_of(network) == wanted
    weights.load(network, theirs, origin="vgg16_from_caffe")
    assert inputs_of(network) == ours
    network = blank(lambda: FCN8s(4, convention=conventions.TORCHVISION))
    weights.load(network, caffe)
    assert inputs_of(network) == ours
    hha = blank(lambda: FCN8s(4, convention=conventions.NYUD_HHA))
    for source in (caffe, port):
        weights.load(hha, source)  # as a start: its three channels are no colours
        assert inputs_of(hha) == [([0, 1, 2], [132.431, 94.076, 118.477], [1.0] * 3)]
    network = blank(lambda: LateFusionFCN(4))
    weights.load(network, theirs)
    assert inputs_of(network)[0] == rgb[0]
    assert inputs_of(network)[1][:2] == ([0, 1, 2], [132.431, 94.076, 118.477])


def test_a_port_of_three_colours_leaves_a_network_of_four_channels_alone():
    port = torch_names(draw(VGG16 | fcn_table(4, 32), divisor=16))
    network = blank(lambda: FCN32s(4, convention=conventions.NYUD_COLOUR_DEPTH))
    refused(network, port, "4 channels", "wkentaro")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "FCN8s": lambda: FCN8s(4, at_once=True, learn_upsampling=True),
    "FCN16s": lambda: FCN16s(4),
    "FCN32s": lambda: FCN32s(4, convention=conventions.NYUD_COLOUR_DEPTH),
    "FCNAlexNet": lambda: FCNAlexNet(4, style="torchvision"),
    "FCNGoogLeNet": lambda: FCNGoogLeNet(4),
    "FCNGoogLeNet, torchvision": lambda: FCNGoogLeNet(4, style="torchvision"),
    "LateFusionFCN": lambda: LateFusionFCN(4, stride=16),
    "SiftFlowFCN": lambda: SiftFlowFCN(5, 3),
    "DeepLabV1": lambda: DeepLabV1(4),
    "DeepLabV1MSc": lambda: DeepLabV1MSc(4, variant="deeplab"),
    "DeepLabV2VGG": lambda: DeepLabV2VGG(4),
    "DeepLabV2ResNet": lambda: DeepLabV2ResNet(4, freeze_norm=False),
    "MultiScale": lambda: MultiScale(DeepLabV2VGG(4, head="largefov")),
    "CRFRNN": lambda: CRFRNN(4),
    "SmallDeepLab": lambda: SmallDeepLab(4, width=32),
    "BackboneDeepLab": lambda: BackboneDeepLab(nn.Conv2d(3, 8, 3, 4, 1), 4),
    "WithCRF": lambda: WithCRF(nn.Conv2d(3, 4, 1), DenseCRF(4, weights="scalar", compatibility="potts")),
    "WithCRF of ours": lambda: WithCRF(FCN32s(4), DenseCRF(4)),
    "DenseCRF": lambda: DenseCRF(4),
}


def bits(network: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.detach().cpu().numpy().tobytes()) for name, t in network.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_save_and_load_keep_every_bit(tmp_path, name):
    with slim(32):
        torch.manual_seed(0)
        network, other = NETWORKS[name](), NETWORKS[name]()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    weights.save(network, tmp_path / "network.safetensors")
    for module in other.modules():  # as built with another convention
        if isinstance(module, Preprocess):
            module.mean.fill_(1.0), module.order.fill_(0)
    report = weights.load(other, tmp_path / "network.safetensors")
    assert bits(network) == bits(other)
    assert report.origin == "crfnet" and report.unused == report.kept == [] and not report.adapted
    assert set(report.used) == set(network.state_dict())
    torch.save(network.state_dict(), tmp_path / "network.pth")  # and so does PyTorch's own way
    weights.load(other, tmp_path / "network.pth")
    assert bits(network) == bits(other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_files_of_other_precisions(dtype):
    arrays = draw(deeplab_table(4), divisor=16)
    source = {name: tensor.to(dtype) for name, tensor in caffe_names(arrays).items()}
    network = blank(lambda: DeepLabV1(4))
    weights.load(network, source)
    assert network.fc8.weight.dtype == torch.float32
    assert torch.equal(network.vgg.conv3_1.weight, source["conv3_1.0"].float())
    double = blank(lambda: DeepLabV1(4)).double()
    weights.load(double, source)
    assert torch.equal(double.vgg.conv3_1.weight, source["conv3_1.0"].double())


def test_numbers_too_large_for_the_network_are_refused():
    arrays = {name: tensor.double() for name, tensor in caffe_names(draw(deeplab_table(4), divisor=16)).items()}
    arrays["conv3_1.0"][0, 0] = 1e300
    refused(blank(lambda: DeepLabV1(4)), arrays, "not finite conv3_1.0")


def test_a_network_shares_nothing_with_what_it_was_loaded_from():
    source = caffe_names(draw(deeplab_table(4), divisor=16))
    network = blank(lambda: DeepLabV1(4))
    weights.load(network, source)
    before = bits(network)
    for tensor in source.values():
        tensor.zero_()
    assert bits(network) == before


def test_loading_in_inference_mode_and_of_parameters():
    network = blank(lambda: DeepLabV1(4)).train()
    source = {name: nn.Parameter(t) for name, t in caffe_names(draw(deeplab_table(4), divisor=16)).items()}
    with torch.inference_mode():
        weights.load(network, source)
    assert network.training and all(p.requires_grad and p.is_leaf and p.grad is None for p in network.parameters())
    with slim(16):  # and training can begin
        network(picture(41, 49)).sum().backward()


def test_a_factor_of_0_is_caffes_batch_norm_before_training():
    file = caffe_norms(draw(resnet_table("caffe") | resnet_head_table(4, FC1), divisor=16))
    file["bn_conv1"][2].zero_()
    network = blank(lambda: DeepLabV2ResNet(4))
    report = weights.load(network, caffe_names(file))
    assert not network.resnet.conv1.bn.running_var.any() and not network.resnet.conv1.bn.running_mean.any()
    assert report.used["resnet.conv1.bn.running_var"] == "bn_conv1.1, bn_conv1.2"
    file["bn_conv1"][2] = torch.ones(4)
    refused(network, caffe_names(file), "bn_conv1.0, bn_conv1.2", "wanted (4,)")


def test_other_blobs_of_the_layer_of_crf_rnn_are_of_other_terms():
    """caffe-tvg's has up to seven."""
    arrays = draw(crf_rnn_table(4), divisor=16)
    arrays["inference1"] += [torch.ones(1, 1, 4, 4)] * 4
    network = blank(lambda: CRFRNN(4, crf=_crf()))
    report = weights.load(network, caffe_names(arrays))
    assert report.unused == [f"inference1.{index}" for index in (3, 4, 5, 6)]


@pytest.mark.parametrize("name", ["fc8_exp_1", "fc8_a_b_c", "fc8_voc12-aug", "fc8_1", "fc8_2x"])
def test_names_of_experiments(name):
    arrays = draw(deeplab_table(4, name), divisor=16)
    network = blank(lambda: DeepLabV1(4))
    report = weights.load(network, caffe_names(arrays))
    assert report.used["fc8.weight"] == f"{name}.0" and not report.kept


@pytest.mark.parametrize("experiment", ["exp_1", "a_b", "voc12-aug", "1", "aspp_2_x"])
def test_names_of_experiments_with_branches(experiment):
    arrays = draw(aspp_table(4, experiment), divisor=16)
    network = blank(lambda: DeepLabV2VGG(4))
    report = weights.load(network, caffe_names(arrays))
    for index in range(4):
        assert report.used[f"head.branches.{index}.fc8.weight"] == f"fc8_{experiment}_{index + 1}.0"
    names = [f"fc1_{experiment}_c{index}" for index in range(4)]
    copies = [f"fc1_{experiment}_{scale}_c{index}" for scale in ("res05", "res075") for index in range(4)]
    arrays = caffe_norms(draw(resnet_table("caffe") | resnet_head_table(4, [*copies, *names]), divisor=16))
    report = weights.load(blank(lambda: DeepLabV2ResNet(4)), caffe_names(arrays))
    assert report.used["head.branches.2.bias"] == f"fc1_{experiment}_c2.1" and len(report.unused) == 16


def test_a_saved_network_does_not_lose_a_branch(tmp_path):
    file = tmp_path / "aspp.safetensors"
    with slim(32):
        weights.save(DeepLabV2ResNet(4), file)
        refused(DeepLabV2ResNet(4, head="largefov"), file, "head.branches.1.bias")
        report = weights.load(DeepLabV2ResNet(4, head="largefov"), file, keep=["head.*"])
        assert len(report.kept) == 2 and len(report.unused) == 8
        weights.save(DeepLabV1(4, variant="7x7"), file)
        refused(DeepLabV1(4, variant="deeplab"), file, "fc6.0.weight (128, 16, 7, 7), wanted (128, 16, 4, 4)")


@pytest.mark.parametrize(
    ("saved", "other", "got"),
    [
        (lambda: FCN8s(4, at_once=True), lambda: FCN8s(4), "head.scale4 0.01 in the file, 1.0 in the network"),
        (lambda: DeepLabV1(4, variant="4x4"), lambda: DeepLabV1(4, variant="deeplab"), r"fc6.0.dilation [8, 8] in"),
        (lambda: DeepLabV2ResNet(4), lambda: DeepLabV2ResNet(4, stride_on="conv3x3"), "resnet.pool1.ceil_mode True"),
        (lambda: DeepLabV2VGG(4), lambda: DeepLabV2VGG(4, head="aspp-s"), "head.branches.0.fc6.0.dilation [6, 6] in"),
    ],
)
def test_a_saved_network_is_not_taken_for_another_of_the_same_shapes(tmp_path, saved, other, got):
    file = tmp_path / "saved.safetensors"
    with slim(32):
        weights.save(saved(), file)
        weights.load(saved(), file)
        network = other()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(got)):
        weights.load(network, file)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    weights.load(network, weights.read(file))  # tensors alone know nothing of it


# keep


def test_keep_leaves_scores_of_other_classes():
    arrays = draw(deeplab_table(5), divisor=16)
    network = blank(lambda: DeepLabV1(4))
    refused(network, caffe_names(arrays), "fc8_voc12.0 (5, 64, 1, 1), wanted (4, 64, 1, 1)", "fc8_voc12.1 (5,)")
    for keep in (["fc8.*"], "fc8.*", ("fc8.weight", "fc8.bias")):
        network = blank(lambda: DeepLabV1(4))
        report = weights.load(network, caffe_names(arrays), keep=keep)
        assert report.kept == ["fc8.weight", "fc8.bias"] and report.unused == ["fc8_voc12.0", "fc8_voc12.1"]
        assert bool(network.fc8.weight.isnan().all()) and len(report.used) == 30


def test_a_pattern_that_keeps_nothing_is_a_mistake():
    refused(blank(lambda: MultiScale(DeepLabV2VGG(4))), caffe_names(draw(aspp_table(4), divisor=16)), "'fc8_voc12*'",
            "head.branches.0.fc8.weight", keep=["fc8_voc12*"])  # fmt: skip


def test_keep_leaves_branches_that_a_file_lacks():
    network = blank(lambda: DeepLabV1MSc(4))
    source = caffe_names(draw(deeplab_table(4), divisor=16))
    refused(network, source, "missing data_conv.0")
    report = weights.load(network, source, keep=["branches.*"])
    assert len(report.kept) == 30 and all(name.startswith("branches.") for name in report.kept) and not report.unused


# errors: each names the file and the keys, and leaves the network as it was


def refused(network: nn.Module, source: Any, *words: str, error: type[Exception] = ValueError, **options: Any) -> str:
    before = bits(network)
    with pytest.raises(error) as caught:
        weights.load(network, source, **options)
    message = str(caught.value)
    if error is ValueError:
        assert message.startswith("source: " if isinstance(source, dict) else f"{source}: "), message
    for word in words:
        assert word in message, message
    assert bits(network) == before and len(message) < 8000
    return message


def without(source: dict[str, Any], *patterns: str) -> dict[str, Any]:
    return {name: x for name, x in source.items() if not any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def renamed(source: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): x for name, x in source.items()}


LARGEFOV = caffe_names(draw(deeplab_table(4), divisor=16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: without(s, "conv3_2.1"), ["missing conv3_2.1;"]),
        (lambda s: without(s, "fc8_voc12.1"), ["missing fc8_voc12.1"]),
        (lambda s: without(s, "conv3_2.?", "fc7.0"), ["missing conv3_2.0, conv3_2.1, fc7.0"]),
        (lambda s: renamed(s, "conv3_2", "conv3_two"), ["missing conv3_2.0, conv3_2.1", "in the network conv3_two.0"]),
        (lambda s: renamed(s, "fc8", "classes"), ["missing fc8_*.0, fc8_*.1", "place in the network classes_voc12.0"]),
        (lambda s: s | {"conv3_2.0": s["conv3_2.0"][:, :-1]}, ["conv3_2.0 (16, 15, 3, 3), wanted (16, 16, 3, 3)"]),
        (lambda s: s | {"conv3_2.0": s["conv3_2.0"].flatten(1).T}, ["conv3_2.0 (144, 16), wanted (16, 16, 3, 3)"]),
        (lambda s: s | {"conv3_2.1": s["conv3_2.1"].reshape(4, 4)}, ["conv3_2.1 (4, 4), wanted (16,)"]),
        (lambda s: s | {"conv3_2.1": s["conv3_2.1"] / 0}, ["not finite conv3_2.1"]),
        (lambda s: s | {"conv3_2.0": s["conv3_2.0"] * torch.nan}, ["not finite conv3_2.0"]),
        (lambda s: s | {"conv3_2.2": s["conv3_2.1"]}, ["without a place in the network conv3_2.2"]),
        (lambda s: s | {"fc8_coco.0": s["fc8_voc12.0"]}, ["fc8_coco", "fc8_voc12"]),
        (lambda s: s | {"conv3_4.0": s["conv3_2.0"], "conv3_4.1": s["conv3_2.1"]}, ["conv3_4.0, conv3_4.1"]),  # VGG-19
        (lambda s: s | {"data_conv.0": torch.zeros(8, 3, 3, 3)}, ["data_conv.0"]),  # MSc
        (lambda s: {}, ["must have tensors, got none"]),
        (lambda s: s | {"mean": torch.zeros(3)}, ["got names of none", "the file has conv1_1.0", "mean"]),
        (lambda s: {"model_state_dict": s, "epoch": 3}, ["got names of none", "the file has epoch, model_state_dict"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(change, words):
    refused(blank(lambda: DeepLabV1(4)), change(LARGEFOV), *words)


def _tv(name: str) -> dict[str, Tensor]:
    """torchvision's networks by name, in files of names alone where others than ours are meant."""
    case = CASES.get(name)
    if case is not None:
        return case.file(draw(case.table, divisor=16))
    if name == "vgg19":
        convolutions = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
        return torch_names({f"features.{n}": [torch.zeros(4, 4, 3, 3), torch.zeros(4)] for n in convolutions})
    if name == "vgg16_bn":
        pairs = {0: 4, 3: 4, 7: 8, 10: 8, 14: 16, 17: 16, 20: 16, 24: 32, 27: 32, 30: 32, 34: 32, 37: 32, 40: 32}
        return torch_names(
            {f"features.{n + k}": [torch.ones(c)] * 4 if k else [torch.zeros(c, c, 3, 3), torch.zeros(c)]
             for n, c in pairs.items() for k in (0, 1)}
        )  # fmt: skip
    assert name == "resnet152"
    state = _tv("resnet101")
    more = {k.replace("layer3.22.", f"layer3.{n}."): t for k, t in state.items() for n in range(23, 36)}
    more |= {k.replace("layer2.3.", f"layer2.{n}."): t for k, t in state.items() for n in range(4, 8)}
    return state | more


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (lambda: FCN8s(4), "vgg16_bn", ["batch norm", "features.1.bias"]),
        (lambda: FCN8s(4), "vgg19", ["vgg16", "features.10.bias"]),
        (lambda: FCN8s(4), "alexnet", ["missing", "conv1_1", "features.10.bias"]),
        (lambda: FCN8s(4), "resnet101", ["ResNet", "layer1.0.bn1.bias"]),
        (lambda: FCN8s(4), "googlenet", ["FCNGoogLeNet", "aux1.fc1.bias"]),
        (lambda: FCNAlexNet(4), "alexnet", ["features.0.weight (4, 3, 11, 11), wanted (6, 3, 11, 11)"]),
        (lambda: FCNAlexNet(4), "vgg16", ["missing conv1.bias", "features.28.bias"]),
        (lambda: FCNAlexNet(4, style="torchvision"), "CaffeNet", ["conv1.0 (6, 3, 11, 11), wanted (4, 3, 11, 11)"]),
        (lambda: FCNGoogLeNet(4), "googlenet", ['style="torchvision"', "aux1.fc1.bias"]),
        (lambda: FCNGoogLeNet(4, style="torchvision"), "bvlc_googlenet", ["inception_3a/1x1.1", "wanted"]),
        (lambda: DeepLabV2ResNet(4), "resnet101", ['stride_on="conv3x3"', "bn1.bias"]),
        (lambda: DeepLabV2ResNet(4, stride_on="conv3x3"), "kazuto1011", ['stride_on="reduce"', "base.aspp.c0.bias"]),
        (lambda: DeepLabV2ResNet(4, stride_on="conv3x3"), "DeepLab v2, ResNet-101", ['"reduce"', "bn2a_branch1.0"]),
        (lambda: DeepLabV2ResNet(4, stride_on="conv3x3"), "resnet152", ["layer2.4.bn1.bias"]),
        (lambda: DeepLabV2ResNet(4, head="largefov"), "kazuto1011", ["base.aspp.c1.bias", "base.aspp.c3.weight"]),
        (lambda: DeepLabV2ResNet(4, head="largefov"), "DeepLab v2, ResNet-101", ["fc1_voc12_c1.0", "fc1_voc12_c3.1"]),
        (lambda: DeepLabV2ResNet(4), "FCN-8s", ["missing bn2a_branch1.0", "conv1_1.0"]),
        (lambda: DeepLabV2VGG(4, head="largefov"), "DeepLab v2, ASPP", ["layer fc8_*, got ['fc8_voc12_1'", "fc6_1.0"]),
        (lambda: DeepLabV2VGG(4), "DeepLab-LargeFOV", ["missing fc8_*_1.0", "fc8_voc12.0"]),
        (lambda: DeepLabV1(4), "DeepLab-MSc-LargeFOV", ["data_conv.0"]),
        (lambda: DeepLabV1(4), "DeepLab", ["fc6.0"]),
        (lambda: FCN8s(4), "FCN-8s at once", ["scale pool4 and pool3 by 1 and 1", "at_once", "score_fr.0"]),
        (lambda: FCN8s(4, at_once=True), "FCN-8s", ["by 0.01 and 0.0001", "[1.0, 1.0]"]),
        (lambda: FCN16s(4), "FCN-8s", ["missing upscore16.0"]),
        (lambda: FCN8s(4), "FCN-16s", ["missing score_pool3.0, score_pool3.1, upscore8.0, upscore_pool4.0"]),
        (lambda: FCN8s(4), "CRF-RNN", ["without a place in the network", "score2.1"]),
        (lambda: FCN8s(4), "sadeepj", ["without a place in the network", "upscore2.bias"]),
        (lambda: FCN8s(4), "FCN-8s, SIFT Flow", ["missing score_fr.0", "score_fr_geo.0"]),
        (lambda: FCN32s(4), "FCN-32s, NYUD late fusion", ["missing conv1_1.0", "conv1_1color.0"]),
        (lambda: LateFusionFCN(4), "FCN-32s, NYUD colour", ["missing conv1_1color.0", "conv1_1.0"]),
        (lambda: FCN32s(4), "FCN-32s, NYUD early fusion", ["conv1_1_bgrd.0 (4, 4, 3, 3), wanted (4, 3, 3, 3)"]),
        (lambda: SiftFlowFCN(5, 3, stride=8), "FCN-8s", ["missing score_fr_geo.0"]),
        (lambda: CRFRNN(5), "CRF-RNN", ["inference1.0 (1, 1, 4, 4), wanted (5, 5)"]),
        (lambda: CRFRNN(5), "sadeepj", ["crfrnn.spatial_ker_weights (4, 4), wanted (5, 5)"]),
        (lambda: CRFRNN(4, crf=DenseCRF(4, weights="scalar")), "CRF-RNN", ['weights="full"', "inference1.0"]),
        (lambda: WithCRF(FCN8s(4), _crf()), "CRF-RNN", ["without a place in the network inference1.0", "score2.1"]),
        (lambda: DeepLabV2VGG(4, head="largefov"), "DeepLab-MSc-LargeFOV", ["data_conv.0"]),
        (lambda: FCN32s(4, convention=conventions.NYUD_COLOUR_DEPTH), "vgg16", ["4 channels", "features.0.weight"]),
    ],
)  # fmt: skip
def test_a_file_of_another_network_is_refused(build, name, words):
    case = CASES.get(name)
    if case is None or not isinstance(next(iter((file := case.file(draw(case.table, divisor=16))).values())), list):
        refused(blank(build), _tv(name), *words)
    else:
        refused(blank(build), caffe_names(file), *words)


@pytest.mark.parametrize(
    "name", ["CRF-RNN", "FCN-8s", "sadeepj", "kazuto1011", "DeepLab v2, ASPP", "FCN-16s, SIFT Flow"]
)
def test_no_tensor_of_a_file_may_be_missing(name):
    case = CASES[name]
    file = case.file(draw(case.table, divisor=16))
    source = caffe_names(file) if isinstance(next(iter(file.values())), list) else file
    network = blank(case.build)
    for key in [key for key in source if not key.endswith(COUNTER)][:: max(1, len(source) // 40)] + [*source][-4:]:
        refused(network, without(source, key), *([] if key == "base.layer1.conv1.conv.weight" else [key]))


def test_origins_and_networks_that_are_unknown():
    network = blank(lambda: DeepLabV1(4))
    refused(network, LARGEFOV, "must be one of", "'caffe'", "got 'tensorflow'", origin="tensorflow")
    for origin in ("torchvision", "kazuto1011", "wkentaro", "sadeepj", "crfnet", "vgg16_from_caffe"):
        refused(network, LARGEFOV, "conv1_1.0", origin=origin)
    refused(blank(lambda: DeepLabV2ResNet(4)), LARGEFOV, "conv1_1.0", origin="kazuto1011")
    message = refused(nn.Conv2d(3, 4, 1), LARGEFOV, "got Conv2d", "DeepLabV2ResNet", "read", error=TypeError)
    assert "MultiScale" in message


def test_a_trunk_without_scores_and_classifier_is_taken_with_a_warning():
    """So does an init model look, and a file that was cut short before its scores."""
    network, source = blank(lambda: DeepLabV1(4)), without(LARGEFOV, "fc8*")
    with pytest.warns(UserWarning, match="source: has neither scores nor a classifier"):
        report = weights.load(network, source)
    assert report.kept == ["fc8.weight", "fc8.bias"]
    ports = {name[:-2] + (".weight" if name.endswith(".0") else ".bias"): value for name, value in source.items()}
    refused(blank(lambda: DeepLabV1(4)), ports, "missing fc8.bias", origin="wkentaro")


def test_frozen_and_learnt_batch_norm_take_each_others_files(tmp_path):
    file = tmp_path / "norm.safetensors"
    with slim(32):
        frozen, learnt = DeepLabV2ResNet(4), DeepLabV2ResNet(4, freeze_norm=False)
    weights.save(learnt, file)
    weights.load(frozen, file)
    weights.save(frozen, file)
    weights.load(learnt, file)


def test_a_crf_of_another_form_is_refused(tmp_path):
    file = tmp_path / "crf.safetensors"
    weights.save(WithCRF(nn.Conv2d(3, 2, 1), DenseCRF(2)), file)
    refused(WithCRF(nn.Conv2d(3, 2, 1), DenseCRF(2, normalization="symmetric")), file, "crf.normalization after in the")


def test_networks_in_data_parallel_or_compiled_are_themselves(tmp_path):
    file, plain = tmp_path / "net.safetensors", SmallDeepLab(2, width=2)
    weights.save(nn.DataParallel(plain), file)
    other = SmallDeepLab(2, width=2)
    weights.load(torch.compile(other, backend="eager"), file)
    assert bits(other) == bits(plain)
    assert "channels [0, 1, 2] of the image" in str(weights.load(other, file))


def test_files_that_are_cut_short(path, tmp_path):
    network = blank(lambda: DeepLabV1(4))
    source = draw(deeplab_table(4), divisor=16)
    whole = put(path, source).read_bytes()
    sizes = {len(put(tmp_path / "part", dict(list(source.items())[:count])).read_bytes()) for count in range(1, 15)}
    for size in (*sorted(sizes), 10, 1000, len(whole) // 2, len(whole) - 1):  # between layers, and within them
        path.write_bytes(whole[:size])
        message = refused(network, path)
        assert ("missing" in message and "fc7.0" in message) == (size in sizes)
    path = path.with_suffix(".safetensors")
    for save in (lambda path: torch.save(caffe_names(source), path), lambda path: weights.save(network, path)):
        save(path)
        whole = path.read_bytes()
        for size in (0, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            refused(network, path)
    refused(network, tmp_path / "nothing.pth", "nothing.pth", error=FileNotFoundError)
