"""Preprocessing, geometry, initial values, several scales, start_from, backbones of one's own, a CRF on top."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from slim import NORMS, make, positive, randomise, slim
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet import DenseCRF
from crfnet.losses import multi_scale_loss
from crfnet.models import (
    ASPP,
    CRFRNN,
    BackboneDeepLab,
    Convention,
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
    Preprocess,
    ResNet,
    SiftFlowFCN,
    SmallDeepLab,
    WithCRF,
    preprocess,
    start_from,
)
from crfnet.models.dilate import dilate
from crfnet.models.geometry import bilinear_kernel, deconvolution, interp, subsample_labels, zoom
from crfnet.models.multi_scale import Scores
from crfnet.models.vgg import score_layer


def image_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(255).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# preprocessing

BGR_MEANS = {  # what each family subtracts, from BGR: FCN's voc_layers.py, DeepLab's prototxts, PAPERS.md 2 and 4.3
    "FCN": (104.00699, 116.66877, 122.67892),
    "DEEPLAB": (104.008, 116.669, 122.675),
    "SIFT_FLOW": (114.578, 115.294, 108.353),
    "PASCAL_CONTEXT": (104.007, 116.669, 122.679),
    "NYUD_COLOUR": (116.190, 97.203, 92.318),
}


@pytest.mark.parametrize("name", BGR_MEANS)
def test_caffe_networks_see_bgr_less_its_mean(name):
    image = image_of(2, 3, 4, 5, dtype=torch.float64)
    x = Preprocess(getattr(preprocess, name)).double()(image)
    for c, mean in enumerate(BGR_MEANS[name]):
        # means are stored in float32 before .double(): 1e-7 of 122
        torch.testing.assert_close(x[:, c], image[:, 2 - c] - mean, rtol=0, atol=2e-5)


def test_torchvision_networks_see_rgb_by_mean_and_deviation():
    image = image_of(2, 3, 4, 5)
    x = Preprocess(preprocess.TORCHVISION)(image)
    for c, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(x[:, c], (image[:, c] / 255 - mean) / std, rtol=0, atol=2e-6)
    googlenet = Preprocess(preprocess.TORCHVISION_GOOGLENET)(image)
    torch.testing.assert_close(googlenet, image / 127.5 - 1, rtol=0, atol=1e-6)  # -1..1


def test_depth_and_hha():
    hha = image_of(1, 3, 4, 5)
    x = Preprocess(preprocess.NYUD_HHA)(hha)  # as stored, not reversed
    torch.testing.assert_close(x, hha - torch.tensor([132.431, 94.076, 118.477]).view(3, 1, 1), rtol=0, atol=1e-5)
    depth = 1 + 60_000 * torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(1))
    x = Preprocess(preprocess.NYUD_COLOUR_DEPTH)(torch.cat([hha, depth], 1))
    torch.testing.assert_close(x[:, 3:], depth.log() - 7.844, rtol=0, atol=1e-5)
    torch.testing.assert_close(x[:, 0], hha[:, 2] - 116.190, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
def test_any_real_dtype_gives_that_of_the_network(dtype):
    image = image_of(1, 3, 4, 5).round()
    x = Preprocess(preprocess.DEEPLAB)(image.to(dtype))
    assert x.dtype == torch.float32
    assert torch.equal(x, Preprocess(preprocess.DEEPLAB)(image))  # integers up to 255 are exact in all of them


@pytest.mark.parametrize(("image", "error", "text"), [
    (torch.zeros(3, 8, 8), ValueError, r"image must be \(B, 3, H, W\), not empty, got \(3, 8, 8\).*image\[None\]"),
    (torch.zeros(1, 8, 8, 3), ValueError, r"\(1, 8, 8, 3\)"),
    (torch.zeros(1, 4, 8, 8), ValueError, r"\(1, 4, 8, 8\)"),
    (torch.zeros(0, 3, 8, 8), ValueError, "not empty"),
    (torch.zeros(1, 3, 0, 8), ValueError, "not empty"),
    (torch.ones(1, 3, 8, 8, dtype=torch.bool), TypeError, "image must be a tensor of numbers"),
    (torch.ones(1, 3, 8, 8, dtype=torch.complex64), TypeError, "image must be a tensor of numbers"),
    ([[1.0]], TypeError, "list"),
    (image_of(1, 3, 8, 8) - 110, ValueError, "was its mean subtracted"),
    (image_of(1, 3, 8, 8) * 257, ValueError, r"0\.\.255"),
    (torch.full((1, 3, 8, 8), float("nan")), ValueError, "finite"),
    (torch.cat([torch.zeros(1, 3, 8, 7), torch.full((1, 3, 8, 1), float("inf"))], 3), ValueError, "finite"),
])  # fmt: skip
@pytest.mark.parametrize("build", [lambda: Preprocess(preprocess.FCN), lambda: SmallDeepLab(2, width=2)])
def test_refused_images(build, image, error, text):
    with pytest.raises(error, match=text):
        build()(image)


@pytest.mark.parametrize("depth", [0.0, -1.0, float("nan"), float("inf")])
def test_refused_depths(depth):
    image = torch.cat([image_of(1, 3, 4, 4), torch.full((1, 1, 4, 4), 2000.0)], 1)
    image[0, 3, 1, 2] = depth
    with pytest.raises(ValueError, match="channel 3 of image must be positive and finite"):
        Preprocess(preprocess.NYUD_COLOUR_DEPTH)(image)


def test_depth_on_the_meta_device():
    with torch.device("meta"):
        x = Preprocess(preprocess.NYUD_COLOUR_DEPTH)(torch.empty(1, 4, 5, 6))
    assert x.shape == (1, 4, 5, 6)


def test_an_image_of_0_to_1_warns_where_it_was_passed():
    network = SmallDeepLab(2, width=2).eval()
    with pytest.warns(UserWarning, match="255") as seen:
        network(image_of(1, 3, 8, 8) / 255)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(torch.zeros(1, 3, 8, 8))  # black is black in both
        network(image_of(1, 3, 8, 8) / 2)


def test_gradients_pass_to_the_image():
    image = image_of(1, 3, 4, 4).requires_grad_()
    Preprocess(preprocess.TORCHVISION)(image).sum().backward()
    torch.testing.assert_close(image.grad[0, 0, 0, 0], torch.tensor(1 / 58.395))


def test_weights_carry_their_convention():
    caffe, torchvision = Preprocess(preprocess.FCN), Preprocess(preprocess.TORCHVISION)
    torchvision.load_state_dict(caffe.state_dict())
    image = image_of(1, 3, 4, 5)
    assert torch.equal(torchvision(image), caffe(image))
    assert not torch.equal(Preprocess(preprocess.TORCHVISION)(image), caffe(image))


def test_become():
    image, layer = image_of(1, 3, 4, 5), Preprocess(preprocess.FCN).double()
    layer.become(preprocess.TORCHVISION)
    assert layer.mean.dtype == torch.float64
    wanted = Preprocess(preprocess.TORCHVISION)(image)
    torch.testing.assert_close(layer(image).float(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="3 channels"):
        layer.become(preprocess.NYUD_COLOUR_DEPTH)
    plain = Convention((2, 1, 0, 3), (1.0,) * 4, (1.0,) * 4)
    with pytest.raises(ValueError, match="4 channels"):
        Preprocess(preprocess.NYUD_COLOUR_DEPTH).become(plain)  # one takes a logarithm, the other not


@pytest.mark.parametrize("wrong", [
    Convention((2, 1, 0), (5.0,), (1.0, 1.0, 1.0)),
    Convention((2, 1, 0), (5.0,) * 4, (1.0,) * 3),
    Convention((2, 1, 0), (5.0,) * 3, (1.0,)),
])  # fmt: skip
def test_a_convention_of_unequal_lengths_is_refused_and_changes_nothing(wrong):
    layer = Preprocess(preprocess.TORCHVISION)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError):
        layer.become(wrong)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError):
        Preprocess(wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_network_compiles_into_one_graph(backend):
    network = make(lambda: DeepLabV2VGG(5, head="largefov"), divisor=64)
    image = image_of(1, 3, 17, 20)
    with torch.no_grad():
        got = torch.compile(network, fullgraph=True, backend=backend)(image)
        # the same operations, fused at most: float32's rounding of sums of 100 products
        torch.testing.assert_close(got, network(image), rtol=1e-4, atol=1e-6)


def test_a_network_runs_in_lower_precision_and_channels_last():
    network, image = make(lambda: FCN8s(5), divisor=64), image_of(1, 3, 17, 20)
    randomise(network)
    with torch.no_grad():
        plain = network(image)
        assert plain.abs().max() > 0
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            last(image.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-4 * plain.abs().max()
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = network(image)
        low = copy.deepcopy(network).to(torch.bfloat16)(image)
    assert low.dtype == cast.dtype == torch.bfloat16
    for got in (cast, low):  # 2**-9 a rounding, some 40 in a row, random signs: a few percent of the largest
        assert (got.float() - plain).abs().max() < 0.1 * plain.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# geometry


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (16, 8), (32, 16), (63, 32), (64, 32)])
def test_deconvolutions_continue_a_ramp(kernel, stride):
    layer = deconvolution(2, kernel, stride).double()
    n = 6
    i = torch.arange(n, dtype=torch.float64)
    ramps = torch.stack([3 * i[:, None] - i, i[:, None] + 2 * i])[None]  # (1, 2, n, n)
    out = layer(ramps)[0]
    o = (torch.arange(out.shape[-1], dtype=torch.float64) - (kernel - 1) / 2) / stride  # where output o lies, in cells
    wanted = torch.stack([3 * o[:, None] - o, o[:, None] + 2 * o])
    inside = (o >= 0) & (o <= n - 1)  # beyond the outermost cells a neighbour is missing
    out, wanted = out[:, inside][:, :, inside], wanted[:, inside][:, :, inside]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)  # kernels are made in float32: 1e-7 of 20
    assert not layer.weight.requires_grad and deconvolution(2, 4, 2, learn=True).weight.requires_grad
    assert layer.weight[0, 1].abs().max() == 0 == layer.weight[1, 0].abs().max()


def test_bilinear_kernels_by_hand():
    line4, line3 = torch.tensor([0.25, 0.75, 0.75, 0.25]), torch.tensor([0.5, 1.0, 0.5])
    assert torch.equal(bilinear_kernel(4), line4[:, None] * line4)
    assert torch.equal(bilinear_kernel(3), line3[:, None] * line3)


def interp_matrix(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in), as interp.cpp: a step of (n_in - 1) / (n_out - 1), each output from two inputs."""
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    step = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    for out in range(n_out):
        at = step * out
        low = min(int(at), n_in - 1)
        high = min(low + 1, n_in - 1)
        matrix[out, low] += 1 - (at - low)
        matrix[out, high] += at - low
    return matrix


def caffe_interp(x: Tensor, height: int, width: int) -> Tensor:
    return interp_matrix(x.shape[2], height).to(x) @ x @ interp_matrix(x.shape[3], width).to(x).T


@pytest.mark.parametrize(("size", "factor"), [((5, 3), 8), ((1, 4), 8), ((41, 33), 2), ((2, 1), 4)])
def test_zoom_is_caffes_interp(size, factor):
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    height, width = (n + (n - 1) * (factor - 1) for n in size)
    torch.testing.assert_close(zoom(x, factor), caffe_interp(x, height, width), rtol=0, atol=1e-12)
    # scores stay as they are, but for the rounding of their places
    torch.testing.assert_close(zoom(x, factor)[..., ::factor, ::factor], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), [((321, 33), (241, 25)), ((21, 9), (41, 5)), ((4, 7), (9, 1))])
def test_interp_to_a_size(before, after):
    x = torch.randn(1, 2, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interp(x, after), caffe_interp(x, *after), rtol=0, atol=1e-12)


def test_labels_at_the_scores():
    labels = torch.arange(321 * 329).view(1, 321, 329)
    small = subsample_labels(labels)
    assert small.shape == (1, 41, 42) and small[0, 2, 3] == 16 * 329 + 24
    with torch.device("meta"):
        plain, large, scales = DeepLabV1(variant="deeplab"), DeepLabV1(), DeepLabV1MSc()
        wide = DeepLabV1(variant="deeplab", pools="3x3")
    labels = torch.arange(306 * 306).view(1, 306, 306)
    small = plain.subsample(labels)
    assert small.shape == (1, 39, 39) and small[0, 0, 0] == 306 + 1 and small[0, 1, 2] == 9 * 306 + 17
    for network in (large, scales, wide, BackboneDeepLab(Strided(3), 2)):
        small = network.subsample(torch.arange(321 * 321).view(1, 321, 321))
        assert small.shape == (1, 41, 41) and small[0, 1, 2] == 8 * 321 + 16
        with pytest.raises(ValueError, match="8 k \\+ 1"):
            network.subsample(labels)
    with pytest.raises(ValueError, match="8 k \\+ 2"):
        plain.subsample(torch.zeros(1, 321, 321))
    with pytest.raises(ValueError, match="8 k \\+ 2"):
        plain.subsample(torch.zeros(1, 1, 1))  # the first score lies at pixel 1


# ---------------------------------------------------------------------------------------------------------------------
# layers and initial values


def test_local_response_norm_is_caffes():
    """x / (1 + alpha / 5 sum of the squares of five channels) ** 0.75, channels beyond the ends being 0."""
    network = make(lambda: FCNAlexNet(), divisor=16)
    x = 100 * torch.randn(2, 9, 3, 4, generator=torch.Generator().manual_seed(0))
    for norm in (network.trunk.norm, make(lambda: FCNGoogLeNet()).trunk.norm):
        wanted = torch.empty_like(x)
        for c in range(9):
            window = x[:, max(0, c - 2) : c + 3]
            wanted[:, c] = x[:, c] / (1 + 1e-4 / 5 * window.square().sum(1)) ** 0.75
        assert not torch.allclose(wanted, x, rtol=0.1)
        torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=1e-4)


def test_average_pool_counts_padding():
    """pool5a: Caffe takes the size of the window before it is clipped."""
    pool = make(lambda: DeepLabV1()).pool5a
    ones = pool(torch.ones(1, 1, 3, 4))[0, 0]
    assert torch.allclose(ones[1, 1], torch.tensor(1.0))
    assert torch.allclose(ones[0, 0], torch.tensor(4 / 9)) and torch.allclose(ones[0, 1], torch.tensor(6 / 9))
    assert isinstance(make(lambda: DeepLabV2VGG(head="largefov")).pool5a, nn.AvgPool2d)
    assert isinstance(make(lambda: DeepLabV2VGG()).pool5a, nn.Identity)  # ASPP has none
    assert isinstance(make(lambda: DeepLabV1(variant="deeplab")).pool5a, nn.Identity)


@pytest.mark.parametrize(("build", "channels"), [
    (lambda: FCN32s(), 3), (lambda: FCN16s(), 3), (lambda: FCN8s(), 3), (lambda: FCN8s(at_once=True), 3),
    (lambda: FCNAlexNet(), 3), (lambda: FCNGoogLeNet(), 3), (lambda: FCNGoogLeNet(style="torchvision"), 3),
    (lambda: LateFusionFCN(), 6), (lambda: SiftFlowFCN(stride=8), 3),
    (lambda: FCN32s(40, convention=preprocess.NYUD_COLOUR_DEPTH), 4),
])  # fmt: skip
def test_fcn_scores_start_at_zero(build, channels):
    logits = make(build)(image_of(1, channels, 20, 24) + 1e-3)
    for out in logits if isinstance(logits, tuple) else (logits,):
        assert out.shape[2:] == (20, 24) and (out == 0).all()


@pytest.mark.parametrize(("build", "rates"), [
    (lambda: DeepLabV2VGG(), (6, 12, 18, 24)), (lambda: DeepLabV2VGG(head="aspp-s"), (2, 4, 8, 12)),
    (lambda: DeepLabV2VGG(head="largefov"), (12,)), (lambda: DeepLabV2ResNet(), (6, 12, 18, 24)),
    (lambda: DeepLabV2ResNet(head="largefov"), (12,)),
])  # fmt: skip
def test_heads_are_sums_over_their_rates(build, rates):
    head = randomise(make(build).head).double()
    weights = list(head.parameters())
    layers = len(weights) // (2 * len(rates))  # 3 on VGG-16: fc6, fc7, fc8; 1 on ResNet
    assert layers == (3 if "VGG" in type(make(build)).__name__ else 1)
    x = torch.randn(2, weights[0].shape[1], 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(())
    for k, rate in enumerate(rates):
        own = weights[2 * layers * k : 2 * layers * (k + 1)]
        y = F.conv2d(x, own[0], own[1], padding=rate, dilation=rate)
        for weight, bias in zip(own[2::2], own[3::2], strict=True):
            y = F.conv2d(y.relu(), weight, bias)
        wanted = wanted + y
    with torch.no_grad():
        torch.testing.assert_close(head(x), wanted, rtol=0, atol=1e-11 * float(wanted.detach().abs().max()))


def test_deeplab_scores_start_small():
    """Gaussian of 0.01, biases 0: statistics of 20 000 draws and more, five of their standard errors."""
    torch.manual_seed(0)
    layers = [score_layer(4096, 21, std=0.01), *ASPP(2048, 21).branches, ASPP(256, 21, hidden=1024).branches[1].fc8]
    for layer in layers:
        n = layer.weight.numel()
        assert abs(layer.weight.mean()) < 5 * 0.01 / n**0.5
        assert abs(layer.weight.std() / 0.01 - 1) < 5 / (2 * n) ** 0.5
        assert (layer.bias == 0).all()
    largefov = make(lambda: DeepLabV1())
    assert abs(largefov.fc8.weight.std() / 0.01 - 1) < 5 / (2 * largefov.fc8.weight.numel()) ** 0.5


def test_msc_branches_start_as_their_fillers_say():
    network = make(lambda: DeepLabV1MSc(), divisor=1)
    for name, branch in network.branches.items():
        wanted = {
            "conv": 0.001,
            "fc": 0.005 if name == "pool4" else 0.001,
            "ms": 0.0 if name == "pool3" else 0.01,
        }
        for part, std in wanted.items():
            layer = getattr(branch, part)
            assert (layer.bias == 0).all()
            if std == 0:
                assert (layer.weight == 0).all()
            else:
                assert abs(layer.weight.std() / std - 1) < 5 / (2 * layer.weight.numel()) ** 0.5, (name, part)


def test_dropout_is_there_in_training_only():
    for build, count, p in [
        (lambda: FCN8s(), 2, 0.5), (lambda: DeepLabV1(), 2, 0.5), (lambda: DeepLabV2VGG(), 8, 0.5),
        (lambda: FCNAlexNet(), 2, 0.5), (lambda: DeepLabV2ResNet(), 0, 0.5), (lambda: FCNGoogLeNet(), 1, 0.4),
    ]:  # fmt: skip
        assert [m.p for m in make(build).modules() if isinstance(m, nn.Dropout)] == [p] * count
    network, image = randomise(make(lambda: DeepLabV2VGG(), divisor=8)), image_of(1, 3, 17, 17)
    with torch.no_grad():
        assert torch.equal(network(image), network(image))
        network.train()
        assert not torch.equal(network(image), network(image))
        branch = randomise(make(lambda: DeepLabV1MSc(), divisor=8)).train().branches["pool2"]
        x = torch.rand(1, branch.conv.in_channels, 9, 9, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(branch(x, 1), branch(x, 1))


def test_frozen_norm_stays_as_it_is():
    frozen, free = make(lambda: DeepLabV2ResNet(), divisor=32), make(lambda: DeepLabV2ResNet(freeze_norm=False))
    for network, changes in ((frozen, False), (WithCRF(frozen, DenseCRF(21)).network, False), (free, True)):
        randomise(network).train()
        norms = [m for m in network.modules() if isinstance(m, NORMS)]
        assert len(norms) == 104 and all(m.weight.requires_grad == m.bias.requires_grad == changes for m in norms)
        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        network(image_of(2, 3, 33, 33))
        for norm, (mean, variance) in zip(norms, before, strict=True):
            assert (
                torch.equal(norm.running_mean, mean) != changes and torch.equal(norm.running_var, variance) != changes
            )
    with torch.no_grad():
        norm, image = frozen.resnet.conv1.bn, torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
        column = (1, 2, 1, 1)
        wanted = (image - norm.running_mean.view(column)) / (norm.running_var.view(column) + 1e-5).sqrt()
        wanted = wanted * norm.weight.view(column) + norm.bias.view(column)
        torch.testing.assert_close(norm(image), wanted, rtol=1e-5, atol=1e-6)  # float32, four roundings
        image = image_of(1, 3, 33, 33)
        assert torch.equal(frozen.train()(image), frozen.eval()(image))  # and no dropout there


def test_at_once_scales_the_pools():
    """score_pool4(0.01 pool4), score_pool3(0.0001 pool3): a staged net with weights scaled so gives the same."""
    once, staged = make(lambda: FCN8s(at_once=True)).double(), make(lambda: FCN8s()).double()
    staged.load_state_dict(randomise(once).state_dict())
    image = image_of(1, 3, 20, 24)
    with torch.no_grad():
        assert not torch.allclose(once(image), staged(image))
        staged.head.score_pool4.weight *= 0.01
        staged.head.score_pool3.weight *= 0.0001
        torch.testing.assert_close(once(image), staged(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("stride", "plain"), [(32, FCN32s), (16, FCN16s), (8, FCN8s)])
def test_late_fusion_is_the_mean_of_two_networks(stride, plain):
    fused = randomise(make(lambda: LateFusionFCN(stride=stride))).double()
    colour = make(lambda: plain(40, convention=preprocess.NYUD_COLOUR)).double()
    hha = make(lambda: plain(40, convention=preprocess.NYUD_HHA)).double()
    for network, name in ((colour, "colour"), (hha, "hha")):
        network.trunk.load_state_dict(fused.trunk[name].state_dict())
        missing = network.head.load_state_dict(fused.head[name].state_dict(), strict=False)
        assert not missing.unexpected_keys and len(missing.missing_keys) == (name == "hha")  # HHA's last deconvolution
    image = image_of(1, 6, 21, 30, dtype=torch.float64)
    with torch.no_grad():
        a, b = colour(image[:, :3]), hha(image[:, 3:])
        assert a.std() > 0 and b.std() > 0 and not torch.allclose(a, b)
        torch.testing.assert_close(fused(image), 0.5 * a + 0.5 * b, rtol=1e-10, atol=1e-10)


def test_sift_flow_is_two_networks_on_one_trunk():
    both = randomise(make(lambda: SiftFlowFCN(stride=8))).double()
    image = image_of(1, 3, 21, 30, dtype=torch.float64)
    with torch.no_grad():
        for out, head, labels in ((0, both.semantic, 33), (1, both.geometric, 3)):
            one = make(lambda labels=labels: FCN8s(labels, convention=preprocess.SIFT_FLOW)).double()
            one.trunk, one.head = both.trunk, head
            torch.testing.assert_close(both(image)[out], one(image), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# DeepLab-MSc, from its prototxts


def msc_by_hand(network: DeepLabV1MSc, x: Tensor, *, train: bool) -> Tensor:
    """Blob by blob; x preprocessed, 8 k + 1 pixels an axis."""
    weights = dict(network.named_parameters())

    def conv(name: str, x: Tensor, **settings) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)

    blobs, size = {"data": x}, x.shape[2:]
    for stage, (count, stride, hole) in enumerate([(2, 2, 1), (2, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 2)], 1):
        for index in range(1, count + 1):
            x = conv(f"base.vgg.conv{stage}_{index}", x, padding=hole, dilation=hole).relu()
        x = blobs[f"pool{stage}"] = F.max_pool2d(x, 3, stride, 1, ceil_mode=True)
    ones = torch.ones(x.shape[1], 1, 3, 3).to(x) / 9
    x = F.conv2d(x, ones, padding=1, groups=x.shape[1])  # pool5a
    x = conv("base.fc6.0", x, padding=12, dilation=12).relu()
    total = conv("base.fc8", conv("base.fc7.0", x).relu())
    zooms = {"data": 1, "pool1": 2, "pool2": 4, "pool3": 8, "pool4": 8}
    if not train:
        total = caffe_interp(total, *size)
    for (name, factor), stride in zip(zooms.items(), (8, 4, 2, 1, 1), strict=True):
        y = conv(f"branches.{name}.conv", blobs[name], stride=stride if train else 1, padding=1).relu()
        y = conv(f"branches.{name}.ms", conv(f"branches.{name}.fc", y).relu())
        if not train:
            height, width = ((n - 1) * factor + 1 for n in y.shape[2:])
            assert (height, width) == tuple(size)
            y = caffe_interp(y, height, width)
        total = total + y
    return total


@pytest.mark.parametrize("size", [(33, 49), (9, 1)])
@pytest.mark.parametrize("upsample", [False, True])
def test_msc_is_the_sum_of_its_prototxt(size, upsample):
    network = randomise(make(lambda: DeepLabV1MSc(), divisor=8)).double()
    image = image_of(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = msc_by_hand(network, network.base.preprocess(image), train=not upsample)
        base = network.base(image, upsample=upsample)
        got = network(image, upsample=upsample)
    assert got.shape[2:] == (size if upsample else tuple((n - 1) // 8 + 1 for n in size))
    assert (got - base).abs().max() > 0.01 * got.abs().max()  # the branches do matter
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


def test_msc_pads_other_sizes_and_refuses_them_in_training():
    network = randomise(make(lambda: DeepLabV1MSc(), divisor=8)).double()
    image = image_of(1, 3, 20, 30, dtype=torch.float64)
    with torch.no_grad():
        x = F.pad(network.base.preprocess(image), (0, 3, 0, 5))  # 25 x 33
        wanted = msc_by_hand(network, x, train=False)[..., :20, :30]
        torch.testing.assert_close(network(image), wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
    with pytest.raises(ValueError, match="8 k \\+ 1"):
        network(image, upsample=False)


# ---------------------------------------------------------------------------------------------------------------------
# several scales


class Strided(nn.Module):
    """Convolutions of stride 2."""

    def __init__(self, halvings: int, width: int = 4, form: str = "tensor") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width if i else 3, width, 3, 2, padding=1) for i in range(halvings))
        self.form = form

    def forward(self, x: Tensor):
        maps = []
        for layer in self.layers:
            x = layer(x).tanh()
            maps.append(x)
        return {
            "tensor": x,
            "list": maps,
            "dict": OrderedDict((f"layer{i}", x) for i, x in enumerate(maps)),
        }[self.form]


class Toy(nn.Module):
    output_stride, aligned = 8, True

    def __init__(self, labels: int = 4) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocess.TORCHVISION)
        self.trunk, self.classifier = Strided(3), nn.Conv2d(4, labels, 1)
        nn.init.normal_(self.classifier.weight)

    def scores(self, x: Tensor) -> Tensor:
        return self.classifier(self.trunk(x))


def test_three_scales_and_their_four_losses():
    torch.manual_seed(0)
    toy = Toy().double()
    network, image = MultiScale(toy), image_of(2, 3, 321, 321, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 321, 321), generator=torch.Generator().manual_seed(1))
    labels[:, :100, :160] = 255
    scores = network(image, upsample=False)
    loss = multi_scale_loss(scores, labels)
    gradients = torch.autograd.grad(loss, list(toy.parameters()))

    x = toy.preprocess(image)
    full, half = toy.scores(x), toy.scores(caffe_interp(x, 161, 161))
    three = toy.scores(caffe_interp(x, 241, 241))
    assert [s.shape[-1] for s in (full, three, half)] == [41, 31, 21]
    three = caffe_interp(three, 41, 41)
    fused = torch.stack([full, three, caffe_interp(half, 41, 41)]).amax(0)

    def mean_loss(scores: Tensor, labels: Tensor) -> Tensor:
        valid = labels != 255
        p = scores.log_softmax(1).gather(1, labels.where(valid, 0)[:, None])[:, 0]
        return -(p * valid).sum() / valid.sum()

    eighth, sixteenth = labels[:, 0:321:8, 0:321:8], labels[:, 0:321:16, 0:321:16]
    assert eighth.shape[1:] == (41, 41) and sixteenth.shape[1:] == (21, 21)
    wanted = sum(mean_loss(s, eighth) for s in (fused, full, three)) + mean_loss(half, sixteenth)
    for got, by_hand in zip(scores, (fused, full, three, half), strict=True):
        torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-11)
    assert (fused == full).any() and (fused > full).any()
    torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=0)
    for got, by_hand in zip(gradients, torch.autograd.grad(wanted, list(toy.parameters())), strict=True):
        torch.testing.assert_close(got, by_hand, rtol=1e-8, atol=1e-11)

    with torch.no_grad():
        torch.testing.assert_close(network(image), caffe_interp(fused, 321, 321), rtol=0, atol=1e-11)


def test_three_scales_pad_to_32_k_and_1():
    torch.manual_seed(0)
    toy = Toy().double()
    image = image_of(1, 3, 40, 70, dtype=torch.float64)
    with torch.no_grad():
        x = F.pad(toy.preprocess(image), (0, 27, 0, 25))  # 65 x 97
        full, half = toy.scores(x), toy.scores(caffe_interp(x, 33, 49))
        three = toy.scores(caffe_interp(x, 49, 73))
        assert three.shape[2:] == (7, 10)
        fused = torch.stack([full, caffe_interp(three, 9, 13), caffe_interp(half, 9, 13)]).amax(0)
        wanted = caffe_interp(fused, 65, 97)[..., :40, :70]
        torch.testing.assert_close(MultiScale(toy)(image), wanted, rtol=0, atol=1e-11)


class Linear(nn.Module):
    """Three 3x3 convolutions of stride 2 and positive weights: score i sees 15 pixels around pixel 8 i."""

    output_stride, aligned = 8, True

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = nn.Identity()
        self.layers = nn.Sequential(*(nn.Conv2d(1, 1, 3, 2, padding=1, bias=False) for _ in range(3)))

    def scores(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("width", [321, 337])  # 32 k + 1 and 16 k + 1
def test_scores_of_all_scales_lie_on_each_other_or_the_size_is_refused(width):
    network = MultiScale(positive(Linear()).double())
    image = torch.ones(1, 1, 33, width, dtype=torch.float64, requires_grad=True)
    try:
        scores = network(image, upsample=False)
        multi_scale_loss(scores, torch.zeros(1, 33, width, dtype=torch.int64))
    except ValueError:
        return
    for part, stride in ((scores.full, 8), (scores.three_quarters, 8), (scores.half, 16)):
        for i in (3, part.shape[3] - 4):
            (seen,) = torch.autograd.grad(part[0, 0, 1, i], image, retain_graph=True)
            seen = seen.sum((0, 1, 2))
            place = float((seen * torch.arange(width)).sum() / seen.sum())
            assert abs(place - stride * i) < 1e-6, f"score {i} of stride {stride} lies at {place:.2f}"


def test_labels_of_another_size_are_refused_by_the_four_losses():
    scores = Scores(*(torch.zeros(1, 2, n, n) for n in (41, 41, 41, 21)))
    multi_scale_loss(scores, torch.zeros(1, 321, 321, dtype=torch.int64))
    for size in (320, 313, 41, 337):
        with pytest.raises(ValueError):
            multi_scale_loss(scores, torch.zeros(1, size, size, dtype=torch.int64))


@pytest.mark.parametrize("network", [
    nn.Conv2d(3, 2, 1), SmallDeepLab(2, width=2),
])  # fmt: skip
def test_networks_without_scores_are_refused(network):
    with pytest.raises(ValueError, match="network must have scores at every 8th pixel"):
        MultiScale(network)


@pytest.mark.parametrize("halvings", [4, 5])
def test_three_scales_of_another_stride_have_the_images_size_or_are_refused(halvings):
    network, image = BackboneDeepLab(Strided(halvings), 3), image_of(1, 3, 33, 50)
    try:
        logits = MultiScale(network)(image)
    except (TypeError, ValueError):
        return
    assert logits.shape == (1, 3, 33, 50)


def test_three_scales_of_patches_have_the_images_size_or_are_refused():
    image = image_of(1, 3, 33, 50)
    try:
        logits = MultiScale(BackboneDeepLab(nn.Conv2d(3, 4, 8, 8), 3))(image)
    except (TypeError, ValueError):
        return
    assert logits.shape == (1, 3, 33, 50)


def test_three_scales_of_deeplab_v1_work_or_are_refused():
    image = image_of(1, 3, 33, 50)
    try:
        logits = MultiScale(make(lambda: DeepLabV1()))(image)
    except (TypeError, ValueError):
        return
    assert logits.shape == (1, 21, 33, 50)


# ---------------------------------------------------------------------------------------------------------------------
# start_from


def trained(build, seed: int) -> nn.Module:
    return randomise(make(build), seed).double()


def test_finer_networks_start_with_the_coarser_ones_scores():
    """New score layers are zero, so a finer net's scores are the coarser's, enlarged by the bilinear deconvolution.

    Enlarging by 2 and then by 16 is not enlarging by 32, but both continue a plane exactly.
    """
    image = image_of(1, 3, 70, 90, dtype=torch.float64)
    coarse, middle, fine = trained(FCN32s, 1), make(FCN16s).double(), make(FCN8s).double()
    left = start_from(middle, coarse)
    assert set(left) >= {"head.score_pool4.weight", "head.score_pool4.bias"}
    assert not any(name.startswith("trunk") or "score_fr" in name for name in left)
    with torch.no_grad():
        scores32 = coarse(image, upsample=False)
        assert scores32.std() > 0
        assert torch.equal(middle.trunk(middle.preprocess(image))[2], coarse.trunk(coarse.preprocess(image))[2])
        # the same layers; sizes and cropping are those of test_networks
        torch.testing.assert_close(middle(image, upsample=False), middle.head.upscore2(scores32), rtol=0, atol=1e-12)
        randomise(middle.head, 5)
        left = start_from(fine, middle)
        assert set(left) >= {"head.score_pool3.weight", "head.score_pool3.bias"}
        assert not any("pool4.bias" in name or "score_fr" in name for name in left)
        scores16 = middle(image, upsample=False)
        torch.testing.assert_close(fine(image, upsample=False), fine.head.upscore_pool4(scores16), rtol=0, atol=1e-12)


def test_logits_stay_nearly_the_same_where_scores_are_smooth():
    """Enlarging twice against once: on scores that are a plane both are the plane, away from the border."""
    coarse, middle, fine = (make(build).double() for build in (FCN32s, FCN16s, FCN8s))
    n = 500
    i = torch.arange(16, dtype=torch.float64)
    plane = (3 * i[:, None] - 2 * i).expand(1, 21, 16, 16)
    one = coarse.head.enlarge(plane, (n, n))
    two = middle.head.enlarge(middle.head.upscore2(plane), (n, n))
    three = fine.head.enlarge(fine.head.upscore_pool4(fine.head.upscore2(plane)), (n, n))
    inner = (..., slice(64, -64), slice(64, -64))  # two cells of 32
    torch.testing.assert_close(one[inner], two[inner], rtol=0, atol=1e-9)
    torch.testing.assert_close(one[inner], three[inner], rtol=0, atol=1e-9)


def test_sift_flow_starts_from_a_coarser_one():
    coarse, fine = trained(lambda: SiftFlowFCN(stride=32), 1), make(lambda: SiftFlowFCN(stride=16)).double()
    left = start_from(fine, coarse)
    assert {"semantic.score_pool4.weight", "geometric.score_pool4.weight"} <= set(left)
    assert torch.equal(fine.geometric.score_fr.weight, coarse.geometric.score_fr.weight)


def test_the_coarser_ones_colours_come_along():
    coarse = make(lambda: FCN32s(convention=preprocess.SIFT_FLOW))
    fine = make(FCN16s)
    start_from(fine, coarse)
    assert torch.equal(fine.preprocess.mean, coarse.preprocess.mean)


@pytest.mark.parametrize(("finer", "coarser"), [
    (lambda: FCN16s(21), lambda: FCN32s(33)),
    (lambda: FCN32s(), lambda: FCN16s()),
    (lambda: FCN16s(), lambda: FCN8s()),
    (lambda: FCN32s(), lambda: FCN8s()),
    (lambda: FCN16s(), lambda: FCNAlexNet()),
    (lambda: FCN16s(21), lambda: FCN32s(21, convention=preprocess.NYUD_COLOUR_DEPTH)),
    (lambda: FCN16s(), lambda: SiftFlowFCN(stride=32)),
])  # fmt: skip
def test_start_from_another_network_is_refused_and_changes_nothing(finer, coarser):
    finer, coarser = make(finer), randomise(make(coarser), 3)
    before = copy.deepcopy(finer.state_dict())
    with pytest.raises(ValueError, match="coarser must be"):
        start_from(finer, coarser)
    assert all(torch.equal(value, before[name]) for name, value in finer.state_dict().items())


def test_at_once_started_from_a_staged_network_keeps_its_scores_or_refuses():
    """Its pool4 is scaled by 0.01: weights of a net without that scale are a hundred times too small there."""
    coarse, fine = trained(FCN16s, 1), make(lambda: FCN8s(at_once=True)).double()
    image = image_of(1, 3, 40, 40, dtype=torch.float64)
    try:
        start_from(fine, coarse)
    except ValueError:
        return
    with torch.no_grad():
        wanted = fine.head.upscore_pool4(coarse(image, upsample=False))
        torch.testing.assert_close(fine(image, upsample=False), wanted, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# backbones of one's own


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
@pytest.mark.parametrize("halvings", [3, 4, 5])
def test_backbones_of_any_stride_and_answer(halvings, form):
    network = BackboneDeepLab(Strided(halvings, form=form), 3)
    stride = 2**halvings
    assert network.output_stride == stride and network.aligned
    wanted = {8: (6, 12, 18, 24), 16: (3, 6, 9, 12)}.get(stride)
    rates = tuple(branch.dilation[0] for branch in network.head.branches)
    if wanted is None:  # 1.5, 3, 4.5, 6 in whole cells
        assert all(abs(rate - ideal) <= 0.5 for rate, ideal in zip(rates, (1.5, 3, 4.5, 6), strict=True))
    else:
        assert rates == wanted
    for height, width in [(1, 1), (31, 65), (40, 97), (64, 33)]:
        image = image_of(1, 3, height, width)
        assert network(image).shape == (1, 3, height, width)
    scores = network(image_of(1, 3, 65, 97), upsample=False)
    assert scores.shape == (1, 3, 64 // stride + 1, 96 // stride + 1)
    labels = network.subsample(torch.zeros(1, 65, 97, dtype=torch.int64))
    assert labels.shape[1:] == scores.shape[2:]
    network(image_of(1, 3, 40, 40)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.backbone.parameters())


def test_a_backbone_is_not_touched_by_being_examined():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(backbone.state_dict())
    network = BackboneDeepLab(backbone, 2, head="largefov")
    assert network.backbone is backbone and backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_own_heads_and_rates_and_refusals():
    assert BackboneDeepLab(Strided(3), 2, head=nn.Conv2d(4, 2, 1))(image_of(1, 3, 20, 20)).shape == (1, 2, 20, 20)
    head = BackboneDeepLab(Strided(3), 2, rates=(1, 2)).head
    assert [branch.dilation for branch in head.branches] == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="head"):
        BackboneDeepLab(Strided(3), 2, head="pyramid")
    with pytest.raises(ValueError, match="rates"):
        BackboneDeepLab(Strided(3), 2, rates=(0, 2))
    with pytest.raises(ValueError, match="rates"):
        BackboneDeepLab(Strided(3), 2, rates=())
    with pytest.raises(TypeError, match="backbone must return features"):
        BackboneDeepLab(nn.Sequential(Strided(3), nn.Flatten()), 2)
    assert BackboneDeepLab(nn.Conv2d(3, 4, 3, 3), 2).output_stride == 3
    with pytest.raises(ValueError, match="whole stride"):
        BackboneDeepLab(nn.Conv2d(3, 4, 3, (2, 4)), 2)


@pytest.mark.parametrize("backbone", [
    nn.Sequential(Strided(3), nn.AdaptiveAvgPool2d(1)),  # a classifier's trunk, pool and all
    nn.Sequential(Strided(3), nn.AdaptiveAvgPool2d(8)),  # 8 cells of any image
])  # fmt: skip
def test_features_that_do_not_grow_with_the_image_are_refused(backbone):
    with pytest.raises((TypeError, ValueError), match="backbone"):
        BackboneDeepLab(backbone, 2)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 24, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).permute(0, 2, 3, 1)


def test_features_with_channels_last_are_refused():
    """As timm's Swin returns them: (B, h, w, F)."""
    with pytest.raises((TypeError, ValueError), match="backbone"):
        BackboneDeepLab(ChannelsLast(), 2)


def averages(ceil: bool = False, first: int = 3) -> nn.Sequential:
    """VGG's arrangement at stride 32, averages for maxima."""
    layers: list[nn.Module] = []
    for stage in range(5):
        layers += [
            nn.Conv2d(first if stage == 0 else 1, 1, 3, padding=1, bias=False),
            nn.AvgPool2d(2, 2, ceil_mode=ceil),
        ]
    return nn.Sequential(*layers)


def valid() -> nn.Sequential:
    """AlexNet's arrangement: 11x11 of stride 4, pools of 3x3, little padding."""
    layers: list[nn.Module] = [nn.Conv2d(3, 1, 11, 4, padding=2, bias=False), nn.AvgPool2d(3, 2)]
    layers += [nn.Conv2d(1, 1, 5, padding=2, bias=False), nn.AvgPool2d(3, 2), nn.Conv2d(1, 1, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.AvgPool2d(3, 2))


def dilated() -> nn.Module:
    return dilate(averages(), 8)


class ToLast(nn.Module):
    """A 3x3 head that sees one cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backbone", [
    lambda: nn.Sequential(*(nn.Conv2d(3 if i == 0 else 1, 1, 3, 2, padding=1, bias=False) for i in range(3))),
    lambda: nn.Conv2d(3, 1, 16, 16, bias=False),
    averages,
    lambda: averages(ceil=True),
    dilated,
    lambda: valid(),
    lambda: dilate(valid(), 8),
], ids=["3x3", "patches", "2x2", "2x2 rounding up", "2x2 dilated", "valid", "valid dilated"])  # fmt: skip
def test_logits_lie_where_the_backbone_looks(backbone):
    """The mean place that a pixel's logit sees is that pixel, whatever the backbone: weights are positive."""
    network = positive(BackboneDeepLab(backbone(), 1, head=ToLast())).double()
    image = torch.ones(1, 3, 64, 513, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    for pixel in (256, 259, 270):
        (seen,) = torch.autograd.grad(logits[0, 0, 32, pixel], image, retain_graph=True)
        seen = seen.sum((0, 1, 2))
        place = float((seen * torch.arange(513)).sum() / seen.sum())
        assert abs(place - pixel) < 1, f"pixel {pixel} sees the image around {place:.1f}"


def test_a_dilated_backbone_under_three_scales_and_a_crf():
    torch.manual_seed(0)
    network = BackboneDeepLab(dilate(Strided(5), 8), 3, head="largefov")
    assert network.output_stride == 8 and network.aligned
    image = image_of(1, 3, 33, 50)
    both = WithCRF(MultiScale(network), DenseCRF(3)).eval()
    with torch.no_grad():
        assert both(image).shape == (1, 3, 33, 50)


def test_timm_backbones():
    timm = pytest.importorskip("timm")
    network = BackboneDeepLab(timm.create_model("resnet18", features_only=True, output_stride=8), 3).eval()
    assert network.output_stride == 8 and network.aligned
    with torch.no_grad():
        assert network(image_of(1, 3, 40, 50)).shape == (1, 3, 40, 50)


def test_our_resnet_is_a_backbone():
    backbone = make(lambda: ResNet(50, output_stride=16, stride_on="conv3x3"))
    network = BackboneDeepLab(backbone, 21, head="largefov").eval()
    assert network.output_stride == 16 and network.aligned and network.head.branches[0].dilation == (6, 6)
    with torch.no_grad():
        assert network(image_of(1, 3, 40, 50)).shape == (1, 21, 40, 50)


# ---------------------------------------------------------------------------------------------------------------------
# with a CRF


def small_crf(labels: int = 3) -> DenseCRF:
    return DenseCRF(labels, theta_alpha=8.0, theta_beta=20.0)


def test_small_logits_are_enlarged_and_preprocessing_is_the_networks_alone():
    torch.manual_seed(0)
    own, crf = nn.Conv2d(3, 3, 3, 4, padding=1), small_crf()
    both = WithCRF(own, crf, preprocess=Preprocess(preprocess.TORCHVISION)).eval()
    image = image_of(1, 3, 20, 24)
    with torch.no_grad():
        x = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        logits = F.interpolate(own(x), (20, 24), mode="bilinear", align_corners=False)
        # float32 in another order in x, then ten iterations of a smooth map
        torch.testing.assert_close(both(image), crf(logits, image), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both(image), logits, atol=1e-2)


class Answers(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, image: Tensor):
        return self.answer


@pytest.mark.parametrize(("answer", "text"), [
    ({"out": torch.zeros(1, 3, 8, 8)}, "dict"),
    ((torch.zeros(1, 3, 8, 8),), "tuple"),
    (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
    (None, "NoneType"),
])  # fmt: skip
def test_networks_that_return_no_logits_are_refused(answer, text):
    with pytest.raises(TypeError, match=r"network must return logits \(B, L, H, W\), one tensor, got " + text):
        WithCRF(Answers(answer), small_crf())(image_of(1, 3, 8, 8))


@pytest.mark.parametrize(("answer", "text"), [
    (torch.zeros(1, 2, 8, 8), "logits must be"),
    (torch.zeros(1, 2, 4, 4), "logits must be"),
    (torch.zeros(2, 3, 8, 8), "image must be"),
])  # fmt: skip
def test_other_labels_and_batches_are_refused(answer, text):
    with pytest.raises(ValueError, match=text):
        WithCRF(Answers(answer), small_crf())(image_of(1, 3, 8, 8))


def test_crf_rnn_is_fcn_8s_under_a_crf_of_5_and_10_iterations():
    network = make(lambda: CRFRNN())
    assert network.crf.num_iterations == 5 and network.crf.num_iterations_eval == 10
    head = network.network.head
    assert head.upscore2.bias is not None and (head.upscore2.bias == 0).all()
    assert head.upscore_pool4.bias is None and head.upscore8.bias is None
    learns = [layer.weight.requires_grad for layer in (head.upscore2, head.upscore_pool4, head.upscore8)]
    assert learns == [True, True, False]
    plain = randomise(make(lambda: FCN8s()), 4)
    left = start_from(network.network, plain)
    image = image_of(1, 3, 12, 14)
    with torch.no_grad():
        assert torch.equal(network.network(image), plain(image))
        assert "head.upscore2.bias" in left
        assert torch.equal(network(image), network.crf(plain(image), image))
    eye = torch.eye(21)
    assert torch.equal(network.crf.kernels["spatial"].weight.detach(), 3 * eye)
    assert torch.equal(network.crf.kernels["bilateral"].weight.detach(), 5 * eye)


def test_numbers_of_labels_are_at_least_one():
    for build in (lambda: FCN32s(0), lambda: DeepLabV1(0), lambda: DeepLabV2VGG(0), lambda: DeepLabV2ResNet(0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of layers without elements
            with torch.device("meta"), pytest.raises(ValueError, match="num_classes"):
                build()


@pytest.mark.parametrize(("build", "text"), [
    (lambda: DeepLabV1(variant="large"), "variant"), (lambda: DeepLabV2VGG(head="aspp"), "head"),
    (lambda: DeepLabV2ResNet(head="aspp-l"), "head"), (lambda: ResNet(34), "depth"),
    (lambda: ResNet(101, output_stride=4), "output_stride"), (lambda: ResNet(101, stride_on="first"), "stride_on"),
    (lambda: FCNAlexNet(style="pytorch"), "style"), (lambda: FCNGoogLeNet(style="pytorch"), "style"),
    (lambda: SiftFlowFCN(stride=4), "stride"), (lambda: LateFusionFCN(stride=4), "stride"),
    (lambda: DeepLabV1MSc(variant="7x7"), "variant"), (lambda: DeepLabV1(pools="4x4"), "pools"),
    (lambda: ASPP(3, 2, rates=()), "rates"),
])  # fmt: skip
def test_unknown_choices_are_refused_by_name(build, text):
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        build()


def test_wide_convolutions_with_holes_are_those_of_torch():
    """They take another way on a CPU, from 2048 channels on."""
    from crfnet.models.vgg import WideConv2d

    torch.manual_seed(0)
    layer = WideConv2d(3, 2050, 3, padding=2, dilation=2).double()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    plain = nn.functional.conv2d(x, layer.weight, layer.bias, padding=2, dilation=2)
    wanted = torch.autograd.grad(plain.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_response_normalisation_does_not_overflow_a_half(dtype):
    from crfnet.models.fcn_alexnet import LocalResponseNorm

    x = torch.full((1, 8, 2, 2), 1000.0)  # its square is beyond float16
    got, wanted = LocalResponseNorm()(x.to(dtype)), LocalResponseNorm()(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_backbones_that_want_whole_multiples_get_them():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, 8, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] % 8 or x.shape[3] % 8:
                raise RuntimeError(f"sizes must be multiples of 8, got {tuple(x.shape)}")
            return self.layer(x)

    network = BackboneDeepLab(Whole(), 2)
    assert network.aligned and network.remainder == 0 and network(image_of(1, 3, 20, 33)).shape == (1, 2, 20, 33)
    assert BackboneDeepLab(Strided(3), 2).remainder == 1


def test_scores_between_pixels_have_no_labels():
    network = BackboneDeepLab(nn.Conv2d(3, 4, 8, 8), 2)
    with pytest.raises(ValueError, match="do not lie at every 8th pixel"):
        network.subsample(torch.zeros(1, 32, 32, dtype=torch.int64))


def test_small_deeplab_has_holes_of_1_2_4():
    convs = [
        m for m in SmallDeepLab(2, width=2).stages.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert [conv.dilation[0] for conv in convs] == [1, 1, 1, 1, 1, 1, 2, 2, 4, 4]


def test_what_is_no_network_or_crf_is_refused():
    for arguments in (
        (DenseCRF(3), SmallDeepLab(3, width=2)),
        (SmallDeepLab(3, width=2), 21),
        (lambda x: x, DenseCRF(3)),
    ):
        with pytest.raises(TypeError, match="network must be a module and crf a DenseCRF"):
            WithCRF(*arguments)
    with torch.device("meta"), pytest.raises(ValueError, match="crf must be a DenseCRF of 3 classes"):
        CRFRNN(3, crf=DenseCRF(4))
    with pytest.raises(TypeError, match="convention"):
        Preprocess("TORCHVISION")
    with pytest.raises(ValueError, match="rates"):
        ASPP(4, 2, rates=6)
    with pytest.raises(ValueError, match="num_classes"):
        SmallDeepLab(2.5)


def test_a_frozen_resnet_starts_within_bounds():
    torch.manual_seed(0)
    with slim(8):
        network = DeepLabV2ResNet(3).eval()
    with torch.no_grad():
        assert network(image_of(1, 3, 65, 65)).abs().max() < 100
