"""The published networks: parameters and sizes against tables from the prototxts, alignment, exactness of the holes.

Nothing here is taken from the networks' code: tables are of the released prototxts, sizes of Caffe's arithmetic.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from slim import LABELS, NORMS, make, positive, randomise, slim, without_preprocessing
from torch import Tensor, nn

from crfnet import DenseCRF
from crfnet.models import (
    CRFRNN,
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
    ResNet,
    SiftFlowFCN,
)
from crfnet.models.fcn import Head8s, Head16s, Trunk
from crfnet.models.preprocess import NYUD_COLOUR_DEPTH

# ---------------------------------------------------------------------------------------------------------------------
# parameters: (outputs, inputs / groups, kernel, bias) of every layer with weights


class Layer(NamedTuple):
    name: str
    out: int
    inputs: int  # divided by the groups
    kernel: int
    bias: bool = True

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.out, self.inputs, self.kernel, self.kernel), *([(self.out,)] if self.bias else [])]


class Norm(NamedTuple):
    channels: int  # scale and shift

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.channels,), (self.channels,)]


class Matrix(NamedTuple):
    labels: int

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.labels, self.labels)]


def vgg(channels: int = 3) -> list[Layer]:
    return [
        Layer("conv1_1", 64, channels, 3), Layer("conv1_2", 64, 64, 3),
        Layer("conv2_1", 128, 64, 3), Layer("conv2_2", 128, 128, 3),
        Layer("conv3_1", 256, 128, 3), Layer("conv3_2", 256, 256, 3), Layer("conv3_3", 256, 256, 3),
        Layer("conv4_1", 512, 256, 3), Layer("conv4_2", 512, 512, 3), Layer("conv4_3", 512, 512, 3),
        Layer("conv5_1", 512, 512, 3), Layer("conv5_2", 512, 512, 3), Layer("conv5_3", 512, 512, 3),
    ]  # fmt: skip


def fcn_trunk(channels: int = 3) -> list[Layer]:
    return [*vgg(channels), Layer("fc6", 4096, 512, 7), Layer("fc7", 4096, 4096, 1)]


def fcn_head(stride: int, labels: int, *, upscore2_bias: bool = False) -> list[Layer]:
    score_fr = Layer("score_fr", labels, 4096, 1)
    if stride == 32:
        return [score_fr, Layer("upscore", labels, labels, 64, False)]
    skip4 = [Layer("upscore2", labels, labels, 4, upscore2_bias), Layer("score_pool4", labels, 512, 1)]
    if stride == 16:
        return [score_fr, *skip4, Layer("upscore16", labels, labels, 32, False)]
    skip3 = [Layer("upscore_pool4", labels, labels, 4, False), Layer("score_pool3", labels, 256, 1)]
    return [score_fr, *skip4, *skip3, Layer("upscore8", labels, labels, 16, False)]


CAFFENET = [
    Layer("conv1", 96, 3, 11), Layer("conv2", 256, 48, 5), Layer("conv3", 384, 256, 3),
    Layer("conv4", 384, 192, 3), Layer("conv5", 256, 192, 3), Layer("fc6", 4096, 256, 6), Layer("fc7", 4096, 4096, 1),
]  # fmt: skip
TORCHVISION_ALEXNET = [
    Layer("features.0", 64, 3, 11), Layer("features.3", 192, 64, 5), Layer("features.6", 384, 192, 3),
    Layer("features.8", 256, 384, 3), Layer("features.10", 256, 256, 3),
    Layer("classifier.1", 4096, 256, 6), Layer("classifier.4", 4096, 4096, 1),
]  # fmt: skip
ALEX_HEAD = [Layer("score_fr", 21, 4096, 1), Layer("upscore", 21, 21, 63, False)]


def googlenet(style: str) -> list[Layer | Norm]:
    blocks = {  # inputs; 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, projection
        "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
        "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
        "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
        "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128),
        "5b": (832, 384, 192, 384, 48, 128, 128),
    }  # fmt: skip
    caffe = style == "caffe"
    layers = [Layer("conv1", 64, 3, 7, caffe), Layer("reduce", 64, 64, 1, caffe), Layer("conv2", 192, 64, 3, caffe)]
    for name, (inputs, one, reduce3, three, reduce5, five, project) in blocks.items():
        layers += [
            Layer(f"{name}/1x1", one, inputs, 1, caffe),
            Layer(f"{name}/3x3_reduce", reduce3, inputs, 1, caffe),
            Layer(f"{name}/3x3", three, reduce3, 3, caffe),
            Layer(f"{name}/5x5_reduce", reduce5, inputs, 1, caffe),
            Layer(f"{name}/5x5", five, reduce5, 5 if caffe else 3, caffe),
            Layer(f"{name}/pool_proj", project, inputs, 1, caffe),
        ]
    return [*layers, *([] if caffe else [Norm(layer.out) for layer in layers])]


def googlenet_head() -> list[Layer]:
    return [Layer("score_fr", 21, 1024, 1), Layer("upscore", 21, 21, 63, False)]


def resnet(blocks: tuple[int, ...]) -> list[Layer | Norm]:
    layers, inputs = [Layer("conv1", 64, 3, 7, False)], 64
    for stage, count in enumerate(blocks, 2):
        out = 64 * 2**stage
        for block in range(count):
            if block == 0:
                layers.append(Layer(f"res{stage}a_branch1", out, inputs, 1, False))
            layers += [
                Layer(f"res{stage}_{block}_branch2a", out // 4, inputs, 1, False),
                Layer(f"res{stage}_{block}_branch2b", out // 4, out // 4, 3, False),
                Layer(f"res{stage}_{block}_branch2c", out, out // 4, 1, False),
            ]
            inputs = out
    return [*layers, *(Norm(layer.out) for layer in layers)]


def deeplab_v1(channels: int, kernel: int) -> list[Layer]:
    return [
        *vgg(),
        Layer("fc6", channels, 512, kernel),
        Layer("fc7", channels, channels, 1),
        Layer("fc8_voc12", 21, channels, 1),
    ]


MSC_BRANCHES = [
    layer
    for source, inputs in {"data": 3, "pool1": 64, "pool2": 128, "pool3": 256, "pool4": 512}.items()
    for layer in (
        Layer(f"{source}_conv", 128, inputs, 3),
        Layer(f"{source}_fc", 128, 128, 1),
        Layer(f"{source}_ms", 21, 128, 1),
    )
]
ASPP_VGG = [
    layer
    for k in (1, 2, 3, 4)
    for layer in (Layer(f"fc6_{k}", 1024, 512, 3), Layer(f"fc7_{k}", 1024, 1024, 1), Layer(f"fc8_{k}", 21, 1024, 1))
]


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    table: list
    total: int  # by hand from the table, or as published
    channels: int = 3


# torchvision's documentation: vgg16 138357544 less its 1000 classes; alexnet 61100840; googlenet 6624904; resnet101
# 44549160. Caffe's model zoo: CaffeNet 60965224. The heads are added.
VGG_FCN = 138_357_544 - 1000 * 4097
CASES = {
    "fcn32s": Case(lambda: FCN32s(), [*fcn_trunk(), *fcn_head(32, 21)], VGG_FCN + 21 * 4097 + 441 * 64**2),
    "fcn16s": Case(
        lambda: FCN16s(),
        [*fcn_trunk(), *fcn_head(16, 21)],
        VGG_FCN + 21 * (4097 + 513) + 441 * (16 + 1024),
    ),
    "fcn8s": Case(
        lambda: FCN8s(),
        [*fcn_trunk(), *fcn_head(8, 21)],
        VGG_FCN + 21 * (4097 + 513 + 257) + 441 * (16 + 16 + 256),
    ),
    "fcn8s-at-once": Case(
        lambda: FCN8s(at_once=True), [*fcn_trunk(), *fcn_head(8, 21)], VGG_FCN + 21 * 4867 + 441 * 288
    ),
    "alexnet": Case(
        lambda: FCNAlexNet(), [*CAFFENET, *ALEX_HEAD], 60_965_224 - 1000 * 4097 + 21 * 4097 + 441 * 63**2
    ),
    "alexnet-torchvision": Case(
        lambda: FCNAlexNet(style="torchvision"),
        [*TORCHVISION_ALEXNET, *ALEX_HEAD],
        61_100_840 - 1000 * 4097 + 21 * 4097 + 441 * 63**2,
    ),
    "googlenet": Case(
        lambda: FCNGoogLeNet(),
        [*googlenet("caffe"), *googlenet_head()],
        5_973_552 + 21 * 1025 + 441 * 63**2,
    ),
    "googlenet-torchvision": Case(
        lambda: FCNGoogLeNet(style="torchvision"),
        [*googlenet("torchvision"), *googlenet_head()],
        6_624_904 - 1000 * 1025 + 21 * 1025 + 441 * 63**2,
    ),
    "nyud-early": Case(
        lambda: FCN32s(40, convention=NYUD_COLOUR_DEPTH),
        [*fcn_trunk(4), *fcn_head(32, 40)],
        VGG_FCN + 64 * 9 + 40 * 4097 + 1600 * 64**2,
        channels=4,
    ),
    "nyud-late": Case(
        lambda: LateFusionFCN(),
        [*fcn_trunk(), *fcn_trunk(), Layer("score_frcolor", 40, 4096, 1), *fcn_head(32, 40)],
        2 * (VGG_FCN + 40 * 4097) + 1600 * 64**2,
        channels=6,
    ),
    **{
        f"sift-flow-{stride}": Case(
            lambda stride=stride: SiftFlowFCN(stride=stride),
            [*fcn_trunk(), *fcn_head(stride, 33), *fcn_head(stride, 3)],
            VGG_FCN + 36 * weights + (33**2 + 3**2) * kernels,
        )
        for stride, weights, kernels in ((32, 4097, 4096), (16, 4610, 1040), (8, 4867, 288))
    },
    "v1-deeplab": Case(lambda: DeepLabV1(variant="deeplab"), deeplab_v1(4096, 4), 65_140_565),
    "v1-7x7": Case(lambda: DeepLabV1(variant="7x7"), deeplab_v1(4096, 7), 134_346_581),
    "v1-4x4": Case(lambda: DeepLabV1(variant="4x4"), deeplab_v1(4096, 4), 65_140_565),
    "v1-largefov": Case(lambda: DeepLabV1(), deeplab_v1(1024, 3), 20_505_429),
    "msc-largefov": Case(lambda: DeepLabV1MSc(), [*deeplab_v1(1024, 3), *MSC_BRANCHES], 20_505_429 + 1_206_121),
    "msc-deeplab": Case(
        lambda: DeepLabV1MSc(variant="deeplab"), [*deeplab_v1(4096, 4), *MSC_BRANCHES], 65_140_565 + 1_206_121
    ),
    "v2-aspp-l": Case(lambda: DeepLabV2VGG(), [*vgg(), *ASPP_VGG], 37_877_652),
    "v2-aspp-s": Case(lambda: DeepLabV2VGG(head="aspp-s"), [*vgg(), *ASPP_VGG], 37_877_652),
    "v2-largefov": Case(lambda: DeepLabV2VGG(head="largefov"), deeplab_v1(1024, 3), 20_505_429),
    "resnet-aspp": Case(
        lambda: DeepLabV2ResNet(),
        [*resnet((3, 4, 23, 3)), *(Layer(f"fc1_c{k}", 21, 2048, 3) for k in range(4))],
        44_549_160 - 1000 * 2049 + 4 * 21 * (2048 * 9 + 1),
    ),
    "resnet-torchvision-aspp": Case(
        lambda: DeepLabV2ResNet(stride_on="conv3x3", freeze_norm=False),
        [*resnet((3, 4, 23, 3)), *(Layer(f"fc1_c{k}", 21, 2048, 3) for k in range(4))],
        44_549_160 - 1000 * 2049 + 4 * 21 * (2048 * 9 + 1),
    ),
    "resnet-largefov": Case(
        lambda: DeepLabV2ResNet(head="largefov"),
        [*resnet((3, 4, 23, 3)), Layer("fc1", 21, 2048, 3)],
        44_549_160 - 1000 * 2049 + 21 * (2048 * 9 + 1),
    ),
    "crf-rnn": Case(
        lambda: CRFRNN(crf=ON_CPU),  # a CRF reads its values when it is made, which meta tensors have not
        [*fcn_trunk(), *fcn_head(8, 21, upscore2_bias=True), Matrix(21), Matrix(21), Matrix(21)],
        VGG_FCN + 21 * 4867 + 441 * 288 + 21 + 3 * 441,
    ),
}  # fmt: skip
ON_CPU = DenseCRF(21)
MADE: dict[str, nn.Module] = {}


def on_meta(name: str) -> nn.Module:
    """The network without data, made once, its preprocessing left out: for shapes only."""
    if name not in MADE:
        with torch.device("meta"):
            network = CASES[name].build()
        for module in list(network.modules()):
            if hasattr(module, "preprocess") and module.preprocess is not None:
                module.preprocess = without_preprocessing(module.preprocess)
            if isinstance(module, NORMS):
                module.forward = lambda x: x  # keeps sizes, and is slow on meta
        MADE[name] = network.eval()
    return MADE[name]


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_prototxt(name):
    network, case = on_meta(name), CASES[name]
    wanted = Counter(shape for layer in case.table for shape in layer.shapes())
    assert Counter(tuple(p.shape) for p in network.parameters()) == wanted
    assert sum(p.numel() for p in network.parameters()) == case.total


@pytest.mark.parametrize(("depth", "blocks", "total"), [
    (50, (3, 4, 6, 3), 25_557_032), (101, (3, 4, 23, 3), 44_549_160), (152, (3, 8, 36, 3), 60_192_808),
])  # fmt: skip
@pytest.mark.parametrize("stride_on", ["reduce", "conv3x3"])
def test_parameters_of_resnets(depth, blocks, total, stride_on):
    with torch.device("meta"):
        network = ResNet(depth, stride_on=stride_on)
    wanted = Counter(shape for layer in resnet(blocks) for shape in layer.shapes())
    assert Counter(tuple(p.shape) for p in network.parameters()) == wanted
    assert sum(p.numel() for p in network.parameters()) == total - 1000 * 2049  # torchvision's, less its classifier


def test_counts_in_the_papers():
    """Millions, as printed: arXiv:1411.4038, table 1; arXiv:1412.7062, table 2."""
    count = {name: sum(p.numel() for p in on_meta(name).trunk.parameters()) for name in ("fcn32s", "alexnet")}
    assert round(count["fcn32s"] / 1e6) == 134 and round(count["alexnet"] / 1e6) == 57
    assert round(sum(p.numel() for p in on_meta("googlenet").trunk.parameters()) / 1e6) == 6
    for variant, millions in (("deeplab", 65.1), ("7x7", 134.3), ("4x4", 65.1), ("largefov", 20.5)):
        assert round(sum(p.numel() for p in on_meta(f"v1-{variant}").parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["fcn32s", "crf-rnn"])
def test_networks_can_be_made_and_run_on_the_meta_device(name):
    """What libraries that shard or load large models do: shapes without memory."""
    with torch.device("meta"):
        network = FCN32s() if name == "fcn32s" else CRFRNN()
        logits = (network if name == "fcn32s" else network.network)(torch.empty(1, 3, 33, 40))
    assert logits.shape == (1, 21, 33, 40)


# ---------------------------------------------------------------------------------------------------------------------
# Caffe's arithmetic along one axis: sizes, and where a cell's window is centred on the image


class Op(NamedTuple):
    kind: str  # "conv", "pool" or "deconv"
    k: int
    s: int = 1
    p: int = 0
    d: int = 1

    def size(self, n: int) -> int:
        if self.kind == "conv":
            return (n + 2 * self.p - self.d * (self.k - 1) - 1) // self.s + 1
        if self.kind == "deconv":
            return (n - 1) * self.s + self.k
        out = -((n + 2 * self.p - self.k) // -self.s) + 1  # pooling_layer.cpp rounds up
        if self.p and (out - 1) * self.s >= n + self.p:  # and drops a window that starts beyond the padding
            out -= 1
        return out

    def place(self, scale: float, offset: float) -> tuple[float, float]:
        """(a, b) of the input, cell i at pixel a i + b → those of the output."""
        middle = self.d * (self.k - 1) / 2
        if self.kind == "deconv":
            return scale / self.s, offset - scale / self.s * middle
        return scale * self.s, offset + scale * (middle - self.p)


def C(k: int, s: int = 1, p: int = 0, d: int = 1) -> Op:
    return Op("conv", k, s, p, d)


def P(k: int, s: int, p: int = 0) -> Op:
    return Op("pool", k, s, p)


def D(k: int, s: int) -> Op:
    return Op("deconv", k, s)


def sizes(n: int, *chain: Op) -> int:
    for op in chain:
        n = op.size(n)
    return n


def places(*chain: Op) -> tuple[float, float]:
    a, b = 1.0, 0.0
    for op in chain:
        a, b = op.place(a, b)
    return a, b


def vgg_ops(first: int, pools: list[Op], hole: int) -> list[list[Op]]:
    """By stage, each with its pool."""
    stages = [[C(3, p=first), C(3, p=1)], [C(3, p=1)] * 2, [C(3, p=1)] * 3, [C(3, p=1)] * 3, [C(3, p=hole, d=hole)] * 3]
    return [[*convs, pool] for convs, pool in zip(stages, pools, strict=True)]


FCN_OPS = vgg_ops(100, [P(2, 2)] * 5, 1)
POOL3, POOL4 = [op for stage in FCN_OPS[:3] for op in stage], [op for stage in FCN_OPS[:4] for op in stage]
FC7 = [*(op for stage in FCN_OPS for op in stage), C(7), C(1)]
ALEX_OPS = [
    C(11, 4, 100), P(3, 2), C(5, p=2), P(3, 2), C(3, p=1), C(3, p=1), C(3, p=1), P(3, 2), C(6), C(1)
]  # fmt: skip
GOOGLE_OPS = [C(7, 2, 3), P(3, 2), C(1), C(3, p=1), P(3, 2), P(3, 2)]
LARGE_STAGES = vgg_ops(1, [P(3, 2, 1)] * 3 + [P(3, 1, 1)] * 2, 2)
PLAIN_TEST = vgg_ops(1, [P(2, 2, 1)] * 3 + [P(2, 1, 1), P(3, 1, 1)], 2)
PLAIN_TRAIN = vgg_ops(1, [P(2, 2, 1)] * 3 + [P(2, 1, 0), P(3, 1, 1)], 2)
FC6_OPS = {"deeplab": C(4, 1, 6, 4), "7x7": C(7, 1, 12, 4), "4x4": C(4, 1, 12, 8), "largefov": C(3, 1, 12, 12)}
RESNET_OPS = [C(7, 2, 3), P(3, 2, 1), C(1, 2)]  # the strides, "reduce"
RESNET_TORCHVISION_OPS = [C(7, 2, 3), C(3, 2, 1), C(3, 2, 1)]  # its pool rounds down, as convolutions do


def flat(stages: list[list[Op]]) -> list[Op]:
    return [op for stage in stages for op in stage]


# every size once a height or a width: the axes are independent
PAIRS = [(1, 1), (2, 513), (7, 500), (31, 375), (32, 321), (33, 225), (97, 224), (375, 500), (513, 1), (224, 33)]


def run(network: Callable, height: int, width: int, channels: int = 3, **settings):
    return network(torch.empty(1, channels, height, width, device="meta"), **settings)


def test_worked_sizes():
    """Those of the sources' comments and of PAPERS.md, 4.1, 5.1 and 6.2."""
    pools = [[op for stage in FCN_OPS[:number] for op in stage] for number in range(1, 6)]
    assert [sizes(500, *chain) for chain in pools] == [349, 175, 88, 44, 22]
    assert [sizes(375, *chain) for chain in pools] == [287, 144, 72, 36, 18]
    assert sizes(500, *FC7) == 16 and sizes(375, *FC7) == 12
    assert sizes(16, D(4, 2)) == 34 and sizes(34, D(4, 2)) == 70
    assert [sizes(16, D(64, 32)), sizes(34, D(32, 16)), sizes(70, D(16, 8))] == [544, 560, 568]
    assert [sizes(12, D(64, 32)), sizes(26, D(32, 16)), sizes(54, D(16, 8))] == [416, 432, 440]
    assert [sizes(306, *flat(PLAIN_TRAIN[:k])) for k in range(1, 6)] == [154, 78, 40, 39, 39]
    assert [sizes(514, *flat(PLAIN_TEST[:k])) for k in (3, 4)] == [66, 67]
    assert [sizes(321, *flat(LARGE_STAGES[:k])) for k in range(1, 6)] == [161, 81, 41, 41, 41]
    assert [sizes(513, *flat(LARGE_STAGES[:k])) for k in (1, 2, 3)] == [257, 129, 65]
    assert [sizes(n, *RESNET_OPS) for n in (321, 241, 161, 513)] == [41, 31, 21, 65]


@pytest.mark.parametrize(("height", "width"), PAIRS)
def test_sizes_inside_fcn(height, width):
    network, seen = on_meta("fcn8s"), {}
    parts = {f"pool{k}": network.trunk.vgg.get_submodule(f"pool{k}") for k in range(1, 6)}
    parts |= {"fc7": network.trunk.fc7, "upscore2": network.head.upscore2}
    parts |= {"upscore_pool4": network.head.upscore_pool4, "upscore8": network.head.upscore8}
    hooks = [
        part.register_forward_hook(lambda m, i, out, name=name: seen.update({name: tuple(out.shape[2:])}))
        for name, part in parts.items()
    ]
    run(network, height, width)
    for hook in hooks:
        hook.remove()
    chains = {f"pool{k}": flat(FCN_OPS[:k]) for k in range(1, 6)}
    chains |= {"fc7": FC7, "upscore2": [*FC7, D(4, 2)], "upscore_pool4": [*FC7, D(4, 2), D(4, 2)]}
    chains["upscore8"] = [*chains["upscore_pool4"], D(16, 8)]
    assert seen == {name: (sizes(height, *chain), sizes(width, *chain)) for name, chain in chains.items()}


def test_literal_sizes_inside_fcn():
    network = on_meta("fcn8s")
    pool3, pool4, fc7 = run(network.trunk, 500, 375)
    assert [tuple(x.shape[2:]) for x in (pool3, pool4, fc7)] == [(88, 72), (44, 36), (16, 12)]
    assert run(network, 500, 375, upsample=False).shape == (1, 21, 70, 54)
    assert run(on_meta("fcn16s"), 500, 375, upsample=False).shape == (1, 21, 34, 26)
    assert run(on_meta("fcn32s"), 500, 375, upsample=False).shape == (1, 21, 16, 12)


def fcn_scores(stride: int) -> Callable[[int], int]:
    chain = {32: FC7, 16: [*FC7, D(4, 2)], 8: [*FC7, D(4, 2), D(4, 2)]}[stride]
    return lambda n: sizes(n, *chain)


SCORES: dict[str, Callable[[int], int]] = {
    "fcn32s": fcn_scores(32),
    "fcn16s": fcn_scores(16),
    "fcn8s": fcn_scores(8),
    "fcn8s-at-once": fcn_scores(8),
    "nyud-early": fcn_scores(32),
    "nyud-late": fcn_scores(32),
    "alexnet": lambda n: sizes(n, *ALEX_OPS),
    "alexnet-torchvision": lambda n: sizes(n, *ALEX_OPS),
    "googlenet": lambda n: sizes(max(n, 32), *GOOGLE_OPS, P(3, 2)),  # images below 32 pixels are padded to it
    "googlenet-torchvision": lambda n: sizes(max(n, 32), *GOOGLE_OPS, P(2, 2)),
    "v1-largefov": lambda n: sizes(n, *flat(LARGE_STAGES), P(3, 1, 1), FC6_OPS["largefov"]),
    **{
        f"v1-{name}": (lambda n, name=name: sizes(n, *flat(PLAIN_TRAIN), FC6_OPS[name]))
        for name in ("deeplab", "7x7", "4x4")
    },
    **{f"v2-{name}": (lambda n: sizes(n, *flat(LARGE_STAGES))) for name in ("aspp-l", "aspp-s", "largefov")},
    "resnet-aspp": lambda n: sizes(n, *RESNET_OPS),
    "resnet-largefov": lambda n: sizes(n, *RESNET_OPS),
    "resnet-torchvision-aspp": lambda n: sizes(n, *RESNET_TORCHVISION_OPS),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_size_of_caffe(name):
    network, size = on_meta(name), SCORES[name]
    labels = 40 if name.startswith("nyud") else 21
    too_small = name in ("v1-deeplab", "v1-7x7", "v1-4x4")  # training scores: pool4 without padding leaves none of 1
    for height, width in PAIRS:
        if too_small and min(height, width) < 3:
            continue
        scores = run(network, height, width, CASES[name].channels, upsample=False)
        assert scores.shape == (1, labels, size(height), size(width)), (height, width)


def test_literal_sizes_of_scores():
    for name, image, wanted in [
        ("v1-deeplab", 306, 39), ("v1-7x7", 306, 39), ("v1-4x4", 306, 39), ("v1-largefov", 321, 41),
        ("msc-largefov", 321, 41), ("msc-deeplab", 321, 41), ("msc-largefov", 513, 65),
        ("v2-aspp-l", 321, 41), ("v2-aspp-s", 513, 65), ("v2-largefov", 321, 41),
        ("resnet-aspp", 321, 41), ("resnet-aspp", 241, 31), ("resnet-aspp", 161, 21), ("resnet-largefov", 513, 65),
    ]:  # fmt: skip
        assert run(on_meta(name), image, image, upsample=False).shape[2:] == (wanted, wanted), (name, image)


def test_plain_deeplab_at_test_enlarges_67_to_529_and_crops_514():
    network, seen = on_meta("v1-deeplab"), []
    hook = network.fc8.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[2:])))
    logits = run(network, 514, 514)
    hook.remove()
    assert seen == [(67, 67)] and (67 - 1) * 8 + 1 == 529 and 529 - 7 - 8 == 514
    assert logits.shape == (1, 21, 514, 514)


@pytest.mark.parametrize("name", CASES)
def test_logits_have_the_size_of_the_image(name):
    network, labels = on_meta(name), 40 if name.startswith("nyud") else 21
    for height, width in PAIRS:
        logits = run(network.network if name == "crf-rnn" else network, height, width, CASES[name].channels)
        if name.startswith("sift"):
            assert logits.semantic.shape == (1, 33, height, width)
            assert logits.geometric.shape == (1, 3, height, width)
        else:
            assert logits.shape == (1, labels, height, width)


@pytest.mark.parametrize("name", ["v2-aspp-l", "resnet-aspp"])
def test_sizes_of_three_scales(name):
    network = MultiScale(on_meta(name))
    scores = run(network, 321, 513, upsample=False)
    assert [tuple(part.shape[2:]) for part in scores] == [(41, 65), (41, 65), (41, 65), (21, 33)]
    seen = []
    hook = network.network.head.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[2:])))
    run(network, 321, 513, upsample=False)
    hook.remove()
    assert seen == [(41, 65), (31, 49), (21, 33)]
    for height, width in [(1, 1), (2, 7), (33, 31), (97, 224), (225, 321), (500, 375)]:
        assert run(network, height, width).shape == (1, 21, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# alignment


def crop_offset(coarse: tuple[float, float], fine: tuple[float, float]) -> float:
    """Cells of ``fine`` to drop so that both begin at one pixel."""
    assert coarse[0] == fine[0]
    return (coarse[1] - fine[1]) / fine[0]


def test_crop_offsets_are_what_puts_centres_on_centres():
    score32 = places(*FC7)
    score16, score8 = places(*FC7, D(4, 2)), places(*FC7, D(4, 2), D(4, 2))
    image = (1.0, 0.0)
    assert crop_offset(image, places(*FC7, D(64, 32))) == 19 == on_meta("fcn32s").head.offset
    assert score32 == (32, 12.5)
    assert crop_offset(score16, places(*POOL4)) == 5
    assert crop_offset(image, places(*FC7, D(4, 2), D(32, 16))) == 27
    assert crop_offset(score8, places(*POOL3)) == 9
    assert crop_offset(image, places(*FC7, D(4, 2), D(4, 2), D(16, 8))) == 31
    assert crop_offset(image, places(*ALEX_OPS, D(63, 32))) == 18 == on_meta("alexnet").head.offset
    assert crop_offset(image, places(*GOOGLE_OPS, P(3, 2), D(63, 32))) == 1 == on_meta("googlenet").head.offset
    torchvision = places(*GOOGLE_OPS, P(2, 2), D(63, 32))
    assert crop_offset(image, torchvision) == 9 == on_meta("googlenet-torchvision").head.offset
    assert places(*flat(LARGE_STAGES), FC6_OPS["largefov"]) == places(*RESNET_OPS) == (8, 0)
    assert places(*RESNET_TORCHVISION_OPS) == (8, 0)
    # half a pixel off what the crop of 7 and the labels 1, 9, ... say: windows of 2 have no middle pixel
    assert places(*flat(PLAIN_TEST), FC6_OPS["deeplab"]) == places(*flat(PLAIN_TEST), FC6_OPS["7x7"]) == (8, -7.5)
    assert places(*flat(PLAIN_TRAIN), FC6_OPS["4x4"]) == (8, 0.5)


@pytest.mark.parametrize("head", [Head16s, Head8s])
def test_skips_and_deconvolutions_of_a_ramp_give_the_ramp(head):
    """Features that say where they are: every crop must bring like to like, or the sum is off by its error."""
    head, n = head(1).double(), 500
    layers = {"score_fr": FC7, "score_pool4": POOL4} | ({"score_pool3": POOL3} if head.__class__ is Head8s else {})
    features = {}
    for name, chain in layers.items():
        layer, (a, b) = getattr(head, name), places(*chain)
        nn.init.zeros_(layer.weight)
        layer.weight.data[0, 0] = 1.0
        ramp = torch.zeros(1, layer.in_channels, sizes(n, *chain), sizes(n, *chain), dtype=torch.float64)
        ramp[:, 0] = a * torch.arange(ramp.shape[3]) + b + 2 * (a * torch.arange(ramp.shape[2])[:, None] + b)
        features[name] = ramp
    pool4, fc7 = features["score_pool4"], features["score_fr"]
    pool3 = features.get("score_pool3", pool4)
    logits = head.enlarge(head.scores((pool3, pool4, fc7)), (n, n))[0, 0]
    x = torch.arange(n, dtype=torch.float64)
    inner = slice(40, n - 40)  # at the border one of four bilinear neighbours is missing
    wanted = len(layers) * (x + 2 * x[:, None])
    # sums of a few hundred numbers below 5000 in float64; a wrong crop is off by 8 at least
    torch.testing.assert_close(logits[inner, inner], wanted[inner, inner], rtol=0, atol=1e-9)


WIDTH = 1601  # 32 k + 1; more than any field of view here on both sides of the middle
SEEN = {
    "fcn32s": (lambda: FCN32s(), 3), "fcn16s": (lambda: FCN16s(), 3), "fcn8s": (lambda: FCN8s(), 3),
    "late": (lambda: LateFusionFCN(), 6), "sift": (lambda: SiftFlowFCN(stride=8), 3),
    "alexnet": (lambda: FCNAlexNet(), 3), "alexnet-torchvision": (lambda: FCNAlexNet(style="torchvision"), 3),
    "googlenet": (lambda: FCNGoogLeNet(), 3), "googlenet-torchvision": (lambda: FCNGoogLeNet(style="torchvision"), 3),
    "largefov": (lambda: DeepLabV1(), 3), "msc": (lambda: DeepLabV1MSc(), 3), "v2": (lambda: DeepLabV2VGG(), 3),
    "resnet": (lambda: DeepLabV2ResNet(), 3), "resnet-torchvision": (lambda: DeepLabV2ResNet(stride_on="conv3x3"), 3),
    "plain": (lambda: DeepLabV1(variant="deeplab"), 3), "7x7": (lambda: DeepLabV1(variant="7x7"), 3),
    "4x4": (lambda: DeepLabV1(variant="4x4"), 3), "scales": (lambda: MultiScale(DeepLabV2VGG()), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_pixels_logit_sees_the_image_around_that_pixel(name):
    """Weights positive, maxima averages: the mean place of the gradient is the pixel, for any place in a stride."""
    build, channels = SEEN[name]
    network = positive(make(build, divisor=64 if name[:3] not in ("ale", "goo") else 16)).double()
    height = 50 if name in ("plain", "7x7", "4x4") else 9  # rows enough for an even kernel with holes to hit some
    image = torch.ones(1, channels, height, WIDTH, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    logits = logits.semantic if name == "sift" else logits
    shift = -0.5 if name in ("plain", "7x7", "4x4") else 0.0  # of the windows of 2, see above
    for pixel in (800, 803, 811, 815, 830):
        (seen,) = torch.autograd.grad(logits[0, 0, height // 2, pixel], image, retain_graph=True)
        seen = seen.sum((0, 1, 2))  # (WIDTH,)
        assert seen.min() >= 0 and seen[0] == seen[-1] == 0  # all of it lies inside
        place = (seen * torch.arange(WIDTH)).sum() / seen.sum()
        # sums of 1601 products in float64, exact to about 1e-12 of a place near 800
        assert abs(place - pixel - shift) < 1e-8


@pytest.mark.parametrize("name", ["fcn8s", "largefov", "plain", "resnet", "scales"])
def test_what_a_logit_sees_is_symmetric_at_a_score(name):
    """Where all grids of scores mirror on themselves."""
    build, channels = SEEN[name]
    network = positive(make(build, divisor=64)).double()
    image = torch.ones(1, channels, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    # pixels at a score: 8 i, in plain DeepLab 8 i - 7; FCN's grids of 32 i + 12.5, 16 i - 11.5 and 8 i - 23.5 mirror
    # at 812.5, and so do pixels 812 and 813
    first, second = {"fcn8s": (812, 813), "plain": (801, 801)}.get(name, (800, 800))
    (left,) = torch.autograd.grad(logits[0, 0, 4, first], image, retain_graph=True)
    (right,) = torch.autograd.grad(logits[0, 0, 4, second], image)
    left, right = left.sum((0, 1, 2)), right.sum((0, 1, 2))
    twice = first + second - (1 if name == "plain" else 0)  # twice the centre
    mirrored = torch.zeros_like(right)
    index = twice - torch.arange(WIDTH)
    inside = (index >= 0) & (index < WIDTH)
    mirrored[inside] = right[index[inside]]
    torch.testing.assert_close(left, mirrored, rtol=1e-9, atol=1e-12 * float(left.max()))


# ---------------------------------------------------------------------------------------------------------------------
# the hole algorithm


class CircularPool(nn.MaxPool2d):
    """A 3x3 pool of stride 2 on the torus."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), 3, 2)


def on_a_torus(network: nn.Module) -> nn.Module:
    """Every padding wraps around, so that the network commutes with shifts of its stride, borders and all."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            padding = module.padding
            module.padding_mode, module._reversed_padding_repeated_twice = (
                "circular",
                [p for n in reversed(padding) for p in (n, n)],
            )
    network.pool1 = CircularPool(3, 2)
    return network


def resnet_pair(stride_on: str, divisor: int, stride: int = 32) -> tuple[ResNet, ResNet]:
    with slim(divisor):
        dense = ResNet(101, output_stride=8, stride_on=stride_on).double().eval()
        strided = ResNet(101, output_stride=stride, stride_on=stride_on).double().eval()
    strided.load_state_dict(randomise(dense).state_dict())
    return dense, strided


@pytest.mark.parametrize(("stride_on", "divisor", "stride"), [
    ("reduce", 1, 32), ("conv3x3", 2, 32), ("reduce", 8, 16), ("conv3x3", 8, 16),
])  # fmt: skip
def test_resnet_101_with_holes_is_the_strided_one_on_shifted_images(stride_on, divisor, stride):
    """All 101 layers, on a torus of one period: dense score (i, j) is the strided net's of the image shifted there."""
    dense, strided = resnet_pair(stride_on, divisor, stride)
    on_a_torus(dense), on_a_torus(strided)
    image = torch.randn(1, 3, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = stride // 8
    shifts = [(8 * i, 8 * j) for i in range(step) for j in range(step)]
    with torch.no_grad():
        wanted = dense(image)  # (1, 2048, 4, 8)
        shifted = torch.cat([image.roll((-dy, -dx), (2, 3)) for dy, dx in shifts])
        parts = strided(shifted)  # (16, 2048, 1, 2)
    assert wanted.shape[2:] == (4, 8) and parts.shape[2:] == (32 // stride, 64 // stride)
    got = torch.empty_like(wanted)
    for (dy, dx), part in zip(shifts, parts, strict=True):
        got[0, :, dy // 8 :: step, dx // 8 :: step] = part
    assert (wanted.std((2, 3)) > 0.1 * wanted.std()).double().mean() > 0.3  # scores differ by place
    # the same products in another order, a hundred layers of them: 1e-16 each, far below what one wrong hole does
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [(65, 97), (64, 100), (33, 40)])
@pytest.mark.parametrize("stride_on", ["reduce", "conv3x3"])
def test_resnet_101_with_holes_keeps_the_strided_scores_borders_and_all(stride_on, size):
    dense, strided = resnet_pair(stride_on, 8)
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fine, coarse = dense(image), strided(image)
    torch.testing.assert_close(fine[..., ::4, ::4], coarse, rtol=0, atol=1e-11 * float(coarse.abs().max()))


def test_a_wrong_hole_would_be_seen():
    """That the comparison above can fail: one 3x3 of 33 with another dilation."""
    dense, strided = resnet_pair("reduce", 8)
    conv = dense.res5[2].conv3x3.conv
    conv.dilation, conv.padding = (2, 2), (2, 2)
    image = torch.randn(1, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fine, coarse = dense(image), strided(image)
    assert (fine[..., ::4, ::4] - coarse).abs().max() > 1e-3 * coarse.abs().max()


def test_the_fcn_trunk_with_holes_is_the_strided_one_on_shifted_images():
    """VGG-16 with fc6 of 7x7 and fc7, made dense by ``dilate``; features before fc6 without biases.

    Then zeros stay zeros, and an image with a zero margin may be moved by 8, 16, 24 pixels without a border noticing.
    """
    dilate = pytest.importorskip("crfnet.models.dilate").dilate
    with slim(8):
        strided, dense = Trunk().double().eval(), Trunk().double().eval()
    randomise(strided)
    for name, module in strided.vgg.named_modules():
        if isinstance(module, nn.Conv2d):
            assert name.startswith("conv")
            nn.init.zeros_(module.bias)
    dense.load_state_dict(strided.state_dict())

    class Fc7(nn.Module):
        def __init__(self, trunk: nn.Module) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, x: Tensor) -> Tensor:
            return self.trunk(x)[2]

    strided, dense = Fc7(strided), dilate(Fc7(dense), 8)
    image = torch.zeros(1, 3, 64, 96, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    image[..., 24:, 24:] = torch.randn(1, 3, 40, 72, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        fine = dense(image)
        for dy, dx in ((0, 0), (0, 8), (8, 16), (24, 24), (16, 0)):
            coarse = strided(image.roll((-dy, -dx), (2, 3)))  # what leaves at one side is zero
            part = fine[..., dy // 8 :: 4, dx // 8 :: 4]
            rows, columns = (min(a, b) for a, b in zip(coarse.shape[2:], part.shape[2:], strict=True))
            assert rows >= coarse.shape[2] - 1 and columns >= coarse.shape[3] - 1 and min(rows, columns) >= 2
            part, coarse = part[..., :rows, :columns], coarse[..., :rows, :columns]
            assert coarse.std((2, 3)).max() > 0
            torch.testing.assert_close(part, coarse, rtol=0, atol=1e-12 * float(coarse.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# a training step

FIXED = ("upscore.weight", "upscore2.weight", "upscore_pool4.weight", "upscore16.weight", "upscore8.weight")
STEPS = {
    "fcn32s": (lambda: FCN32s(), FIXED),
    "fcn16s": (lambda: FCN16s(learn_upsampling=True), ("upscore16.weight",)),
    "fcn8s": (lambda: FCN8s(), FIXED),
    "fcn8s-at-once": (lambda: FCN8s(at_once=True, learn_upsampling=True), ("upscore8.weight",)),
    "alexnet": (lambda: FCNAlexNet(), FIXED),
    "alexnet-torchvision": (lambda: FCNAlexNet(style="torchvision"), FIXED),
    "googlenet": (lambda: FCNGoogLeNet(), FIXED),
    "googlenet-torchvision": (lambda: FCNGoogLeNet(style="torchvision"), FIXED),
    "nyud-late": (lambda: LateFusionFCN(stride=8), FIXED),
    "sift-flow": (lambda: SiftFlowFCN(stride=8), FIXED),
    "v1": (lambda: DeepLabV1(), ()),
    "v1-plain": (lambda: DeepLabV1(variant="deeplab"), ()),
    "msc": (lambda: DeepLabV1MSc(), ()),
    "v2": (lambda: DeepLabV2VGG(), ()),
    "resnet": (lambda: DeepLabV2ResNet(), ("bn.weight", "bn.bias")),
    "resnet-learnt-norm": (lambda: DeepLabV2ResNet(freeze_norm=False), ()),
    "scales": (lambda: MultiScale(DeepLabV2ResNet()), ("bn.weight", "bn.bias")),
    "crf-rnn": (lambda: CRFRNN(), ("upscore8.weight",)),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_should_learn_gets_a_gradient_and_what_is_fixed_does_not(name):
    build, fixed = STEPS[name]
    network = make(build, divisor=4 if name.startswith("goo") else 8).train()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.out_channels in (3, *LABELS) and layer.kernel_size == (1, 1):
                layer.weight.normal_(std=0.01)  # new scores are zero, and pass nothing back, until their first step
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # may drop all there is of a 1x1 map
    generator = torch.Generator().manual_seed(2)
    channels = 6 if name == "nyud-late" else 3
    logits = network(torch.rand(2, channels, 33, 41, generator=generator) * 255)
    outputs = logits if isinstance(logits, tuple) else (logits,)
    sum(out.log_softmax(1)[:, 0].mean() for out in outputs).backward()
    learning = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    frozen = {n for n, p in network.named_parameters() if fixed and n.endswith(fixed)}
    assert {n for n, _ in network.named_parameters()} - learning == frozen
    assert all(p.requires_grad == (n not in frozen) for n, p in network.named_parameters())
