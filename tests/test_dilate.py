"""Dilated networks: equal to the strided network on every shifted image, in float64; what is refused; what is kept."""

import copy
import itertools
import math
import pickle
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.models.dilate import dilate
from crfnet.models.holed import HoledAvgPool2d
from crfnet.models.small import SmallDeepLab


def prepare(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep the signal's size through any depth, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return network.double().eval()


def draw(*size: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def field(path: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Of (kernel, stride, padding) layers: stride T, how many pixels before and after pixel T i output i sees."""
    T, before, after = 1, 0, 0
    for k, s, p in path:
        T, before, after = T * s, before + T * p, after + T * (k - 1 - p)
    return T, before, after


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.numel() > 1 and theirs.std() > 1e-3 * theirs.abs().max() > 0  # not all the same
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@torch.no_grad()
def assert_dense(
    strided: nn.Module,
    OS: int,
    path: Iterable[tuple[int, int, int]],
    *,
    channels: int = 3,
    borders: bool = True,
    dense: nn.Module | None = None,
) -> nn.Module:
    """The dense network at every offset is the strided network on the image shifted by it, where no padding is seen.

    With ``borders``, offset 0 is the strided network's whole output.
    """
    T, before, after = field(path)
    first = math.ceil(before / T)  # the first output that sees only the image
    h = T * (first + math.ceil(after / T) + 2)  # of a shifted image, with a few outputs that see only that
    w = h + T
    image = draw(h + T, w + T, channels=channels)
    dense = dilate(copy.deepcopy(strided), OS) if dense is None else dense
    ours = dense(image)
    for dy, dx in itertools.product(range(0, T, OS), repeat=2):
        if dy != dx and (T // OS > 4 or h > 350):  # to be quick: the diagonal has every offset of either axis
            continue
        theirs = strided(image[..., dy : dy + h, dx : dx + w])
        rows = [i for i in range(first, theirs.shape[2]) if T * i + after < h]
        columns = [i for i in range(first, theirs.shape[3]) if T * i + after < w]
        there = theirs[..., rows, :][..., columns]
        y, x = ([(d + T * i) // OS for i in inside] for d, inside in ((dy, rows), (dx, columns)))
        assert_same(ours[..., y, :][..., x], there)
    if borders:
        assert_same(ours[..., :: T // OS, :: T // OS], strided(image))
    return dense


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


# VGG-16

WIDTHS = (3, 4, 5, 6, 6)
DEPTHS = (2, 2, 3, 3, 3)
VGG = [layer for depth in DEPTHS for layer in [(3, 1, 1)] * depth + [(2, 2, 0)]]


def vgg(*, head: bool = False, pool: tuple[dict, ...] = ({},) * 5, dilations: tuple[int, ...] = (1,) * 5) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth, settings_, d in zip(WIDTHS, DEPTHS, pool, dilations, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=d, dilation=d), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, **settings_))
    if head:
        layers += [
            nn.Conv2d(channels, 8, 7),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 3, 1),
        ]
    return prepare(nn.Sequential(*layers))


@pytest.mark.parametrize("OS", [16, 8, 4])
def test_vgg(OS):
    dense = assert_dense(vgg(), OS, VGG)
    last = [m for m in dense if isinstance(m, nn.Conv2d)][-1]
    assert last.dilation == last.padding == (16 // OS,) * 2


def test_vgg_with_its_fully_connected_layers():
    dense = assert_dense(vgg(head=True), 8, [*VGG, (7, 1, 0)])
    fc6 = next(m for m in dense if getattr(m, "kernel_size", 0) == (7, 7))
    assert (fc6.dilation, fc6.padding, fc6.stride) == ((4, 4), (0, 0), (1, 1))  # valid it stays


def test_the_comparison_notices_pools_without_holes():
    """DeepLab's convolutions, by hand: right with holes in pool5, wrong without."""
    strided, dilations = vgg(), (1, 1, 1, 1, 2)
    for holes, right in ((2, True), (1, False)):
        last = [{"stride": 1}, {"stride": 1, "dilation": holes}]
        by_hand = vgg(pool=({}, {}, {}, *last), dilations=dilations)
        by_hand.load_state_dict(strided.state_dict())
        if right:
            assert_dense(strided, 8, VGG, dense=by_hand, borders=False)
        else:
            with pytest.raises(AssertionError):
                assert_dense(strided, 8, VGG, dense=by_hand, borders=False)


# Residual networks


class Gate(nn.Module):
    """Squeeze and excitation. Its mean is over another grid once dense, so weights of zero make the test exact."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(0 * x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, *, caffe: bool, average: bool, gate: bool) -> None:
        super().__init__()
        outputs = 2 * width
        first, second = (stride, 1) if caffe else (1, stride)
        self.conv1, self.conv2 = conv(inputs, width, 1, first), conv(width, width, 3, second)
        self.conv3 = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.gate = Gate(outputs) if gate else nn.Identity()
        pool = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)] if average and stride > 1 else []
        project = nn.Conv2d(inputs, outputs, 1, 1 if pool else stride, bias=False)
        self.downsample = nn.Sequential(*pool, project) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.conv3(self.conv2(self.conv1(x))))
        y += x if self.downsample is None else self.downsample(x)
        return y.relu_()


class ResNet(nn.Module):
    """Of four stages and two blocks each, with a mean, checks of shape and range, and a classifier that can be off."""

    def __init__(
        self, pool: nn.Module, *, caffe: bool = False, average: bool = False, gate: bool = False, classes: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        self.stem, channels, blocks = nn.Sequential(conv(3, 4, 7, 2), pool), 4, []
        for width, stride in ((2, 1), (3, 2), (4, 2), (5, 2)):
            for s in (stride, 1):
                blocks.append(Bottleneck(channels, width, s, caffe=caffe, average=average, gate=gate))
                channels = 2 * width
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, classes) if classes else None

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be (B, 3, H, W), got {tuple(image.shape)}")
        if not math.isfinite(float(image.sum())):
            raise ValueError("image must be finite")
        x = self.blocks(self.stem(image - self.mean))
        return x if self.classifier is None else self.classifier(torch.flatten(self.pool(x), 1))


def residual(*, caffe: bool, pool: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The longest path, of 3x3 convolutions."""
    stages = [(1, 2)[not caffe and stage > 0] for stage in range(4)]
    path = [(7, 2, 3), pool]
    for stage, stride in enumerate(stages):
        if caffe and stage:
            path.append((1, 2, 0))
        path += [(3, stride, 1), (3, 1, 1)]
    return path


@pytest.mark.parametrize("OS", [16, 8, 4])
@pytest.mark.parametrize("caffe", [False, True])
def test_resnet(OS, caffe):
    network = prepare(ResNet(nn.MaxPool2d(3, 2, 1), caffe=caffe))
    dense = assert_dense(network, OS, residual(caffe=caffe, pool=(3, 2, 1)))
    # where the 3x3 convolution has the stride, it keeps the dilation of the stage before
    last = [block.conv2[0].dilation[0] for block in dense.blocks[-2:]]
    assert last == ([32 // OS] * 2 if caffe else [16 // OS, 32 // OS])


@pytest.mark.parametrize("OS", [8, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_resnet_with_a_pool_in_ceil_mode(OS, padding):
    network = prepare(ResNet(nn.MaxPool2d(3, 2, padding, ceil_mode=True), caffe=True))
    path = residual(caffe=True, pool=(3, 2, padding))
    assert_dense(network, OS, path, borders=padding == 0 or OS == 8)  # at OS=2 the window over the edge is lost


@pytest.mark.parametrize("OS", [16, 8, 4])
def test_average_pools_in_shortcuts(OS):
    dense = assert_dense(
        prepare(ResNet(nn.MaxPool2d(3, 2, 1), average=True)), OS, residual(caffe=False, pool=(3, 2, 1))
    )
    assert sum(isinstance(m, HoledAvgPool2d) for m in dense.modules()) == int(math.log2(32 // OS))


def test_squeeze_and_excitation_is_left_alone():
    network = prepare(ResNet(nn.MaxPool2d(3, 2, 1), gate=True))
    dense = assert_dense(network, 8, residual(caffe=False, pool=(3, 2, 1)))
    assert {m.expand.dilation for m in dense.modules() if isinstance(m, Gate)} == {(1, 1)}


def test_a_classifier_behind_global_pooling_still_works():
    network = prepare(ResNet(nn.MaxPool2d(3, 2, 1), classes=7))
    assert dilate(network, 8)(draw(64, 96)).shape == (1, 7)
    assert isinstance(network.pool, nn.AdaptiveAvgPool2d)


# Other shapes of network


class Inception(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv(inputs, 2, 1),
                nn.Sequential(conv(inputs, 2, 1), conv(2, 2, 3)),
                nn.Sequential(conv(inputs, 2, 1), conv(2, 2, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(inputs, 2, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Reduction(nn.Module):
    """A convolution and a pool of stride 2 in parallel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.pool = conv(channels, 4, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.pool(x)], 1)


@pytest.mark.parametrize("OS", [16, 8])
def test_googlenet(OS):
    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    layers = [conv(3, 4, 7, 2), pool(), nn.LocalResponseNorm(3), conv(4, 4, 1), conv(4, 6), nn.LocalResponseNorm(3)]
    layers += [pool(), Inception(6), Inception(8), pool(), Inception(8), Reduction(8), Inception(12)]
    inception, pooled = (5, 1, 2), (3, 2, 0)
    path = [(7, 2, 3), pooled, (3, 1, 1), pooled, inception, inception, pooled, inception]
    path += [(4, 2, 1), inception]  # what the reduction's branches see together
    assert_dense(prepare(nn.Sequential(*layers)), OS, path)


class ChannelsLast(nn.Module):
    """ConvNeXt's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def test_convnext():
    """Patches of 2x2 without padding: convolutions that are padded at the end."""
    layers = [nn.Conv2d(3, 4, 4, 4), ChannelsLast(4)]
    for width in (4, 5, 6):
        layers += [nn.Conv2d(width, width + 1, 2, 2), ChannelsLast(width + 1)]
    assert_dense(prepare(nn.Sequential(*layers)), 8, [(4, 4, 0), (7, 1, 3), *[(2, 2, 0), (7, 1, 3)] * 3])


class Focus(nn.Module):
    """YOLO's stem: four subsampled images; a functional pool; a decoder's detour up and down."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1)
        x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)
        return F.max_pool2d(F.interpolate(x, scale_factor=2.0), 2)


def test_functions_with_strides_are_fine_where_nothing_has_to_change():
    layers = [
        Focus(),
        conv(6, 4),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.ZeroPad2d(1),
        nn.MaxPool2d(3, 2),
        nn.ZeroPad2d((1, 0, 1, 0)),
    ]
    network = prepare(nn.Sequential(*layers, nn.Conv2d(4, 4, 2)))
    path = [(4, 2, 0), (3, 1, 1), (3, 2, 1), (3, 2, 1), (2, 1, 1)]
    # the first convolution does not tell how many channels the network takes
    assert_dense(network, 2, path, dense=(dense := dilate(copy.deepcopy(network), 2, example=draw(64, 96))))
    assert (dense[3].padding, dense[5].padding) == ((2, 2, 2, 2), (4, 0, 4, 0))


def test_average_pools_count_what_they_did():
    """Borders and all: padding counts or not, windows over the edge, fixed divisors."""
    for settings_ in ({}, {"count_include_pad": False}, {"divisor_override": 5}, {"ceil_mode": True, "padding": 0}):
        kept = {"kernel_size": 3, "stride": 2, "padding": 1} | settings_
        smooth = {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": kept.get("count_include_pad", True)}
        layers = [nn.AvgPool2d(**kept), nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(**kept), nn.AvgPool2d(**smooth)]
        p = kept["padding"]
        assert_dense(prepare(nn.Sequential(*layers)), 1, [(3, 2, p), (3, 1, 1), (3, 2, p), (3, 1, 1)])


def test_maxima_of_negative_numbers():
    """Padding by anything but -inf would win."""
    lower = nn.Conv2d(3, 4, 1)
    network = prepare(nn.Sequential(lower, nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)))
    lower.bias.data -= 100
    assert_dense(network, 1, [(3, 2, 1), (3, 2, 1), (2, 2, 0)])


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (nn.MaxPool2d(2), 32),
        (nn.MaxPool2d(2, ceil_mode=True), 32),
        (nn.MaxPool2d(3, 2), 30),  # 32 → 15
        (nn.MaxPool2d(3, 2, ceil_mode=True), 32),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 32),  # 32 → 17, whose last is lost
        (nn.AvgPool2d(5, 3, 2), 32),
        (nn.AvgPool2d(4, 4), 32),
        (nn.Conv2d(3, 3, 11, 4), 24),  # 32 → 6
        (nn.Conv2d(3, 3, 3, 1), 30),
    ],
)
def test_sizes(pool, size):
    """A layer keeps the size that it divided; where it also cut pieces off, it cuts off as much."""
    first = nn.Conv2d(3, 3, 1, 1)
    for stride in (1, 2):  # of what comes before, hence of the holes
        dense = dilate(nn.Sequential(nn.Conv2d(3, 3, 1, stride), copy.deepcopy(pool), nn.Conv2d(3, 3, 1, 2), first), 1)
        assert dense(torch.zeros(1, 3, stride * 32, stride * 32)).shape[2:] == (stride * size,) * 2


def test_images_smaller_than_a_hole():
    pools = [nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)]
    dense = dilate(prepare(nn.Sequential(nn.Conv2d(3, 4, 3, 8, 1), *pools)), 1)
    assert dense(draw(3, 2)).isfinite().all()


def test_axes_of_different_strides():
    layers = [
        nn.Conv2d(3, 4, 3, (2, 1)),
        nn.MaxPool2d((3, 2), (3, 2)),
        nn.Conv2d(4, 4, 2, (1, 2)),
        nn.AvgPool2d((2, 3), 1),
    ]
    strided, image = prepare(nn.Sequential(*layers)), draw(60, 56)
    dense = dilate(copy.deepcopy(strided), 2)(image)  # of stride 6 along y, 4 along x
    for dy, dx in itertools.product((0, 2, 4), (0, 2)):
        theirs = strided(image[..., dy:, dx:])
        ours = dense[..., dy // 2 :: 3, dx // 2 :: 2]
        assert_same(ours[..., : theirs.shape[2], : theirs.shape[3]], theirs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name():
    same = [nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 3, 2, padding="valid")]
    assert_dense(prepare(nn.Sequential(*same)), 1, [(3, 2, 0), (3, 1, 1), (2, 1, 0)], borders=False)
    same[1] = nn.Conv2d(4, 4, 2, padding="same")
    refuses(nn.Sequential(*same), 1, "padding='same' and an even kernel")


def test_a_stride_that_is_lost_in_part():
    layers = [nn.Conv2d(3, 4, 5, 2, 2), nn.MaxPool2d(4, 4), nn.Conv2d(4, 4, 3, padding=1)]
    dense = assert_dense(prepare(nn.Sequential(*layers)), 4, [(5, 2, 2), (4, 4, 0), (3, 1, 1)])
    assert (dense[1].stride, dense[2].dilation) == ((2, 2), (2, 2))


def test_earlier_dilations_multiply():
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.MaxPool2d(3, 2, 1, dilation=2)]
    assert_dense(prepare(nn.Sequential(*layers)), 1, [(3, 2, 1), (5, 1, 2), (5, 2, 1)], borders=False)


def test_pools_padded_by_half_a_kernel():
    """Which torch refuses once the kernel has holes."""
    layers = [nn.Conv2d(3, 4, 3, 4, 1), nn.MaxPool2d(2, 1, 1), nn.MaxPool2d(4, 2, 2)]
    assert_dense(prepare(nn.Sequential(*layers)), 1, [(3, 4, 1), (2, 1, 1), (4, 2, 2)], borders=False)


@st.composite
def chains(draw_: st.DrawFn) -> list[dict]:
    chain = []
    for _ in range(draw_(st.integers(1, 5))):
        kind, k, s = draw_(st.sampled_from(["conv", "max", "avg"])), draw_(st.integers(1, 4)), draw_(st.integers(1, 3))
        p = draw_(st.integers(0, k - 1 if kind == "conv" else (k - 1) // 2))
        chain.append({"kind": kind, "k": k, "s": s, "p": p, "flag": draw_(st.booleans())})
    assume(2 <= math.prod(layer["s"] for layer in chain) <= 12)
    return chain


def layer(kind: str, k: int, s: int, p: int, flag: bool) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(2, 2, k, s, p)
    if kind == "max":
        return nn.MaxPool2d(k, s, p, ceil_mode=flag)
    return nn.AvgPool2d(k, s, p, ceil_mode=flag, count_include_pad=p % 2 == 0)


@settings(max_examples=60)
@given(chains(), st.integers(0, 5))
def test_any_chain(chain, place):
    strides = list(itertools.accumulate((layer["s"] for layer in chain), lambda a, b: a * b, initial=1))
    OS = strides[place % len(strides)]
    network = prepare(nn.Sequential(nn.Identity(), *(layer(**settings_) for settings_ in chain)))
    example = draw(240, 252, channels=2)
    dense = dilate(copy.deepcopy(network), OS, example=example)
    assert_dense(network, OS, [(c["k"], c["s"], c["p"]) for c in chain], channels=2, borders=False, dense=dense)


# What is refused, and that nothing has been changed by then


def snapshot(network: nn.Module) -> list:
    def public(module: nn.Module) -> dict:
        return {key: str(value) for key, value in vars(module).items() if not key.startswith("_")}

    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    return [(type(m), public(m)) for m in network.modules()] + [list(network.state_dict()), hooks]


def refuses(network: nn.Module, OS: int, match: str, **settings_) -> None:
    before = snapshot(network)
    with pytest.raises(ValueError, match=match):
        dilate(network, OS, **settings_)
    assert snapshot(network) == before


class Then(nn.Module):
    """Stride 4 by layers, a function, and a 3x3 convolution."""

    def __init__(self, function, *, after: nn.Module | None = None) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2))
        self.function, self.after = function, nn.Conv2d(4, 4, 3, padding=1) if after is None else after

    def forward(self, image: Tensor) -> Tensor:
        return self.after(self.function(self.start(image)))


WEIGHT = torch.ones(4, 4, 3, 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.max_pool2d(x, 2), r"max_pool2d in the network \(Then\) would have to change"),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), r"avg_pool2d in the network \(Then\) would have to change"),
        (lambda x: F.conv2d(x, WEIGHT, stride=2), r"conv2d in the network \(Then\) would have to change"),
        (lambda x: x[..., ::2, ::2], "getitem .* cuts or joins along the axes"),
        (lambda x: x[..., 1:-1, :], "getitem .* cuts or joins along the axes"),
        (lambda x: F.pad(x, (1, 1, 1, 1)), "pad at|pad in .* nn.ConstantPad2d"),
        (lambda x: x.roll(1, 2), "roll .* not known to act on each pixel alone"),
        (lambda x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1), "pixel_shuffle .* not known"),
        (lambda x: F.interpolate(x, scale_factor=2.0), r"conv2d in after \(Conv2d\) comes after interpolate"),
        (lambda x: F.interpolate(x, (128, 160)), r"conv2d in after \(Conv2d\) comes after interpolate"),
        (lambda x: x.flatten(2).unflatten(2, x.shape[2:]), "conv2d in after .* comes after flatten"),
        (lambda x: x.transpose(1, 3)[:, :4], "getitem .* cuts or joins"),
        (lambda x: torch.cat([x, x], 2), "cat .* cuts or joins"),
    ],
)
def test_functions_that_would_have_to_change_are_refused(function, message):
    refuses(Then(function), 2, message)


@pytest.mark.parametrize("function", [lambda x: x[..., ::2, ::2], lambda x: F.lp_pool2d(x, 2, 2)])
def test_functions_that_exceed_the_stride_are_refused(function):
    refuses(Then(function), 4, r"in the network \(Then\) goes to stride \(8, 8\), but is not a layer")
    assert dilate(Then(function), 8)(torch.zeros(1, 3, 32, 48)).shape == (1, 4, 4, 6)


def test_windows_along_other_axes_are_refused():
    message = r"conv2d in after .* moves along the last two axes, but those of the image are now \(-2, -3\)"
    refuses(Then(lambda x: x.transpose(1, 3), after=nn.Conv2d(160, 4, 3)), 2, message)


def test_the_same_functions_are_fine_behind_the_last_change():
    network = Then(lambda x: F.interpolate(x, scale_factor=2.0), after=nn.Conv2d(4, 2, 1))
    assert dilate(network, 2)(torch.zeros(1, 3, 32, 48)).shape == (1, 2, 32, 48)
    dilate(Then(lambda x: x.roll(1, 2)), 4)  # where nothing changes at all


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Named(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


def test_layers_that_cannot_change_are_refused():
    start = [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)]
    refuses(nn.Sequential(*start, Own(4, 4, 3)), 2, r"conv2d in 2 \(Own\) would have to change")
    refuses(nn.Sequential(*start, nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)), 2, "pad in 2")
    refuses(nn.Sequential(start[0], nn.Conv2d(4, 4, 3, 2, 1, padding_mode="reflect")), 2, "pads with other than zeros")
    refuses(nn.Sequential(*start, nn.ConvTranspose2d(4, 4, 2, 2)), 2, "conv_transpose2d in 2 .* not known")
    refuses(nn.Sequential(start[0], nn.MaxPool2d(2, return_indices=True)), 2, "returns indices")
    refuses(nn.Sequential(start[0], type("Pool", (nn.MaxPool2d,), {})(2)), 2, "made for MaxPool2d itself only")
    refuses(nn.Sequential(*start, start[1]), 2, "the layer in 1 .* several strides")
    # a class of its own is no obstacle where the forward is nn.Conv2d's, nor anything where nothing has to change
    assert dilate(nn.Sequential(*start, Named(4)), 2)[2].dilation == (2, 2)
    start = [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)]
    dilate(nn.Sequential(start[0], Own(4, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2), start[1], start[1]), 4)


class Both(nn.Module):
    """One convolution of every position and of global pooling's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.conv = nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.start(image)
        return self.conv(x) * self.conv(F.adaptive_avg_pool2d(x, 3)).mean((2, 3), keepdim=True)


def test_a_layer_for_positions_and_for_pooled_cells_is_refused():
    refuses(Both(), 2, r"the layer in conv \(Conv2d\) is used at several strides")
    dilate(Both(), 4)


def test_parametrized_weights():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1))
    network = prepare(network)
    nn.utils.parametrizations.weight_norm(network[2])
    assert_dense(network, 1, [(3, 2, 1), (3, 2, 1), (3, 1, 1)])


def test_strides_that_do_not_fit_are_refused():
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3)))
    refuses(network, 3, r"output_stride 3 .* conv2d in 1 \(Conv2d\) jumps from stride \(2, 2\) to \(4, 4\)")
    refuses(network, 16, "output_stride must be at most the network's own, 8, got 16")
    refuses(nn.Sequential(nn.Conv2d(3, 3, 3, 3)), 2, "jumps")
    for wrong in (0, -8, 2.0, "8"):
        refuses(network, wrong, "output_stride must be an int of at least 1")


def test_sums_of_different_strides_are_refused():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1, 4), nn.Conv2d(3, 3, 25)

        def forward(self, image: Tensor) -> Tensor:
            return self.a(image) + self.b(image)

    refuses(Sum(), 2, r"add .* mixes strides \[\(1, 1\), \(4, 4\)\]", example=torch.zeros(1, 3, 32, 32))


def test_examples_that_do_not_fit_are_refused():
    strided = [nn.Conv2d(3, 3, 3, 4, 1), nn.Conv2d(3, 3, 3, 2, 1)]
    fixed = nn.Sequential(*strided, nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    refuses(fixed, 4, r"network must take the example, \(1, 3, 512, 640\), but raises")
    refuses(fixed, 4, r"network, once dilated, must take the example", example=torch.zeros(1, 3, 32, 32))
    refuses(
        fixed,
        4,
        r"example must be a tensor \(B, C, H, W\), got torch.Size\(\[3, 8, 8\]\)",
        example=torch.zeros(3, 8, 8),
    )
    refuses(nn.ReLU(), 4, "example must be given for a network without nn.Conv2d, got ReLU")
    refuses(prepare(ResNet(nn.MaxPool2d(3, 2, 1))), 8, "image must be", example=torch.zeros(1, 4, 64, 64))


# What is kept


def test_weights_keys_and_modes_are_kept():
    network = ResNet(nn.MaxPool2d(3, 2, 1), average=True)
    network.train()
    network.stem.eval()
    network.blocks[0].requires_grad_(False)
    before = [(name, id(p), p.requires_grad) for name, p in network.named_parameters()]
    modes = [(name, id(m), m.training) for name, m in network.named_modules()]
    state = copy.deepcopy(network.state_dict())
    hooks = snapshot(network)[-1]
    assert dilate(network, 8) is network
    assert [(name, id(p), p.requires_grad) for name, p in network.named_parameters()] == before
    assert [(name, id(m), m.training) for name, m in network.named_modules()] == modes
    assert snapshot(network)[-1] == hooks
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    network.train()(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_dilated_networks_are_copied_and_pickled():
    network = dilate(prepare(ResNet(nn.MaxPool2d(3, 2, 1), average=True)), 4)
    image = draw(64, 96)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(image), network(image))


def test_twice_is_once_and_gradually_is_at_once():
    def convolutions(network: nn.Module) -> list:
        return [(m.stride, m.dilation, m.padding) for m in network.modules() if isinstance(m, nn.Conv2d)]

    at_once = dilate(prepare(ResNet(nn.MaxPool2d(3, 2, 1))), 4)
    gradually = prepare(ResNet(nn.MaxPool2d(3, 2, 1)))
    for OS in (32, 8, 8, 4):
        dilate(gradually, OS)
    assert convolutions(gradually) == convolutions(at_once)


def test_a_layer_alone_and_a_layer_in_two_places():
    alone = dilate(prepare(nn.Conv2d(3, 4, 2, 2)), 1)
    assert alone(draw(8, 10)).shape == (1, 4, 8, 10)
    pool = nn.MaxPool2d(2)
    shared = nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool), "also": pool})
    dilate(shared["net"], 1)
    assert shared["also"] is shared["net"][1] and shared["also"].stride == (1, 1)


def test_our_own_network():
    network = SmallDeepLab(3, width=4)
    assert dilate(network, 4)(torch.rand(1, 3, 40, 48) * 255).shape == (1, 3, 40, 48)
    assert [b.dilation for branch in network.branches for b in branch if isinstance(b, nn.Conv2d)] == [
        (2 * r, 2 * r) for r in (1, 3, 6)
    ]


def test_half_precision_and_autocast():
    network = dilate(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 3, 1)), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert network[0](torch.ones(1, 3, 6, 8)).dtype == torch.float32
    assert dilate(network.bfloat16(), 1)(torch.ones(1, 3, 6, 8, dtype=torch.bfloat16)).shape == (1, 3, 6, 8)


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "convnext_atto", "vgg11_bn"])
def test_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    settings_ = {"features_only": True, "out_indices": (-1,), "pretrained": False}
    strided = prepare(timm.create_model(name, **settings_))
    dense, image = dilate(copy.deepcopy(strided), 8), draw(64, 96)
    with torch.no_grad():
        assert_same(dense(image)[-1][..., ::4, ::4], strided(image)[-1])
        if name.startswith("resnet"):
            theirs = timm.create_model(name, output_stride=8, **settings_).double().eval()
            theirs.load_state_dict(strided.state_dict())
            assert_same(dense(image)[-1], theirs(image)[-1])
