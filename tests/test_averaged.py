"""Averages over scales and mirror images against a loop that writes them out, for networks of every kind of output."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crfnet import DenseCRF, models
from crfnet.models import Averaged, SmallDeepLab, WithCRF
from crfnet.models.preprocess import TORCHVISION, Preprocess

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)


def picture(batch: int = 1, height: int = 21, width: int = 30, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(batch, channels, height, width, generator=generator)


class Conv(nn.Module):
    """Logits at stride 2: neither mirror symmetric nor of the image's size."""

    def __init__(self, labels: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, labels, 3, 2, 1)
        self.sizes: list[tuple[int, ...]] = []
        with torch.no_grad():
            weight = torch.randn(self.conv.weight.shape, generator=torch.Generator().manual_seed(1))
            self.conv.weight.copy_(weight / 100)
            self.conv.bias.zero_()

    def forward(self, image):
        self.sizes.append(tuple(image.shape[2:]))
        return self.conv(image)


def by_hand(network, image, scales, mirror):
    """The mean of the probabilities, every one of them kept."""
    H, W = image.shape[2:]
    all_probabilities = []
    for scale in scales:
        size = [max(1, round(scale * H)), max(1, round(scale * W))]
        small = F.interpolate(image, size, mode="bilinear", antialias=True)
        for flipped in [False, True][: 1 + mirror]:
            logits = network(torch.flip(small, [3]) if flipped else small)
            if flipped:
                logits = torch.flip(logits, [3])
            all_probabilities.append(F.interpolate(logits, (H, W), mode="bilinear").softmax(1))
    return torch.stack(all_probabilities).mean(0)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.7), SCALES])
@torch.no_grad()
def test_average_is_the_mean_of_probabilities(scales, mirror):
    network, image = Conv().double(), picture(2).double()
    out = Averaged(network, scales=scales, mirror=mirror)(image)
    assert out.shape == (2, 4, 21, 30) and out.dtype == torch.float64
    expected = by_hand(network, image, scales, mirror)
    # both in double precision; what the order of flipping and enlarging rounds differently
    torch.testing.assert_close(out.exp(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.softmax(1), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_defaults_are_five_scales_each_mirrored():
    network = Conv()
    Averaged(network)(picture())
    sizes = [(10, 15), (16, 22), (21, 30), (26, 38), (32, 45)]
    assert network.sizes == [size for size in sizes for _ in range(2)]


@torch.no_grad()
def test_one_scale_without_mirror_is_the_network():
    network, image = SmallDeepLab(5, width=4).eval(), picture()
    out = Averaged(network, scales=(1.0,), mirror=False)(image)
    torch.testing.assert_close(out, network(image).log_softmax(1))


@torch.no_grad()
def test_mirroring_the_image_mirrors_the_average():
    average, image = Averaged(Conv().double()), picture().double()
    torch.testing.assert_close(average(image.flip(-1)), average(image).flip(-1), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_crf_comes_once_on_the_average_and_sees_the_image_as_it_came():
    crf = DenseCRF(4, num_iterations=2).eval()
    calls = []
    crf.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    network, image = Conv(), picture(2)
    out = Averaged(WithCRF(network, crf), scales=(0.5, 1.0))(image)
    assert calls == [(2, 4, 21, 30)]
    logits = Averaged(network, scales=(0.5, 1.0))(image)
    torch.testing.assert_close(out, crf(logits, image))
    torch.testing.assert_close(out, WithCRF(Averaged(network, scales=(0.5, 1.0)), crf)(image))

    mask = torch.ones(2, 21, 30, dtype=torch.bool)
    mask[:, :, 20:] = False
    masked = Averaged(WithCRF(network, crf), scales=(0.5, 1.0))(image, mask)
    assert torch.equal(masked[..., 20:], logits[..., 20:]) and not torch.equal(masked[..., :20], out[..., :20])


@torch.no_grad()
def test_a_networks_own_preprocess_follows_the_resizing():
    crf, image = DenseCRF(4, num_iterations=1).eval(), picture()
    preprocess, network = Preprocess(TORCHVISION), Conv()
    out = Averaged(WithCRF(network, crf, preprocess=preprocess), scales=(0.5, 1.0))(image)
    expected = Averaged(nn.Sequential(preprocess, network), scales=(0.5, 1.0))(image)
    torch.testing.assert_close(out, crf(expected, image))


class Two(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(4), Conv(2)

    def forward(self, image):
        return Two(self.a(image), self.b(image))


@torch.no_grad()
def test_several_labellings_are_averaged_each_for_itself():
    network, image = TwoHeads(), picture()
    out = Averaged(network, scales=(0.5, 1.0))(image)
    assert type(out) is Two
    assert torch.equal(out.first, Averaged(network.a, scales=(0.5, 1.0))(image))
    assert torch.equal(out.second, Averaged(network.b, scales=(0.5, 1.0))(image))


NETWORKS = {
    "fcn-32s": lambda: models.FCN32s(4),
    "fcn-8s": lambda: models.FCN8s(4),
    "alexnet": lambda: models.FCNAlexNet(4),
    "googlenet": lambda: models.FCNGoogLeNet(4),
    "colour and hha": lambda: models.LateFusionFCN(4),
    "two labellings": lambda: models.SiftFlowFCN(4, 4, stride=8),
    "deeplab v1": lambda: models.DeepLabV1(4),
    "deeplab v1 msc": lambda: models.DeepLabV1MSc(4),
    "deeplab v2 vgg": lambda: models.DeepLabV2VGG(4),
    "three scales": lambda: models.MultiScale(models.DeepLabV2VGG(4)),
    "small": lambda: models.SmallDeepLab(4),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_of_this_package_go_through(name):
    with torch.device("meta"):  # shapes alone: neither weights nor time
        network = NETWORKS[name]().eval()
        image = torch.empty(1, 6 if name == "colour and hha" else 3, 33, 25)
    out = Averaged(network, scales=(0.5, 1.5))(image)
    for part in out if isinstance(out, tuple) else (out,):
        assert part.shape == (1, 4, 33, 25)


@torch.no_grad()
def test_one_pixel_and_colours_at_the_ends_of_their_range():
    network = SmallDeepLab(3, width=4).eval()
    out = Averaged(network, scales=(0.1, 1.0, 2.0))(torch.full((1, 3, 1, 1), 255.0))
    assert out.shape == (1, 3, 1, 1) and float(out.exp().sum()) == pytest.approx(1, abs=1e-5)
    whole = torch.randint(0, 256, (1, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Averaged(Conv())(whole), Averaged(Conv())(whole.float()))


@torch.no_grad()
def test_labels_without_any_probability_stay_finite_or_minus_infinity():
    class Sure(nn.Module):
        def forward(self, image):
            return torch.tensor([0.0, -math.inf, -200.0]).view(1, 3, 1, 1).expand(1, 3, *image.shape[2:])

    out = Averaged(Sure(), scales=(1.0, 1.0))(picture())
    assert (out[:, 0] == 0).all() and (out[:, 1] == -math.inf).all()
    torch.testing.assert_close(out[:, 2], torch.full_like(out[:, 2], -200.0))


def test_averaged_errors():
    for scales in ((), (0.0,), (1.0, -1.0), (math.nan,), (math.inf,)):
        with pytest.raises(ValueError, match="scales must be at least one, positive and finite"):
            Averaged(Conv(), scales=scales)
    with pytest.raises(ValueError, match=r"Sequential holds a CRF \(0\.crf\).*with WithCRF, and it runs once"):
        Averaged(nn.Sequential(WithCRF(Conv(), DenseCRF(4))))
    with pytest.raises(ValueError, match="mask is for a CRF"):
        Averaged(Conv())(picture(), torch.ones(1, 21, 30, dtype=torch.bool))
    for image in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"image must be \(B, G, H, W\), not empty"):
            Averaged(Conv())(image)
    with pytest.raises(TypeError, match=r"network must return logits .* got \(1, 27\)"):
        Averaged(nn.Flatten(), scales=(1.0,))(torch.zeros(1, 3, 3, 3))
    with pytest.raises(TypeError, match="must return one tensor of logits, got 2"):
        Averaged(WithCRF(TwoHeads(), DenseCRF(4)), scales=(1.0,))(picture())
