"""Tiles of an image: what is local stays as it is, edges count little, and everything is covered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crfnet import DenseCRF
from crfnet.models import Tiled, WithCRF
from crfnet.models.tiled import _starts


def picture(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return 255 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


class Edges(nn.Module):
    """Logit 0 counts the neighbours that a pixel has, as convolutions with zeros around do; keeps the tiles' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape[2:]))
        return nn.functional.conv2d(torch.ones_like(image[:, :1]), torch.ones(1, 1, 3, 3), padding=1)


@given(
    height=st.integers(1, 23), width=st.integers(1, 23), sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    overlap=st.integers(0, 8),
)  # fmt: skip
@torch.no_grad()
def test_a_network_without_surroundings_gives_the_same_in_tiles(height, width, sides, overlap):
    network, image = nn.Conv2d(3, 4, 1).double(), picture(height, width, 2).double()
    tiled = Tiled(network, sides, overlap=min(overlap, min(sides) - 1))(image)
    torch.testing.assert_close(tiled, network(image))
    assert tiled.dtype == torch.float64


@given(length=st.integers(1, 400), side=st.integers(1, 99), overlap=st.integers(0, 98))
def test_tiles_cover_an_axis_with_the_overlap_asked_for_and_none_too_many(length, side, overlap):
    side, overlap = min(side, length), min(overlap, min(side, length) - 1)
    starts = _starts(length, side, overlap)
    assert starts[0] == 0 and starts[-1] + side == length
    assert all(0 < b - a <= side - overlap for a, b in zip(starts, starts[1:], strict=False))
    assert len(starts) == 1 or (len(starts) - 1) * (side - overlap) + overlap < length


@torch.no_grad()
def test_where_tiles_meet_the_one_further_from_its_edge_counts_more():
    network = Edges()
    out = Tiled(network, (10, 8), overlap=4)(picture(10, 12))[0, 0]
    assert network.sizes == [(10, 8)] * 2
    # columns 4..7 are in both tiles; of column 4 the first tile's weight is 4, that of the second, whose edge it is, 1
    assert float(out[5, 4]) == pytest.approx((4 * 9 + 1 * 6) / 5)
    assert float(out[5, 5]) == pytest.approx(9)
    assert torch.equal(out, out.flip(1)) and float(out[0, 0]) == 4


@torch.no_grad()
def test_a_small_image_is_one_tile():
    network, image = nn.Conv2d(3, 4, 3, padding=1), picture(7, 9)
    torch.testing.assert_close(Tiled(network, 64)(image), network(image), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_crf_comes_once_on_the_whole():
    network, crf, image = (
        nn.Conv2d(3, 4, 1),
        DenseCRF(4, learn=(), weights="scalar", compatibility="potts"),
        picture(9, 14),
    )
    torch.testing.assert_close(
        WithCRF(Tiled(network, 6), crf)(image), WithCRF(network, crf)(image), rtol=1e-4, atol=1e-4
    )


def test_gradients_reach_the_network():
    network = nn.Conv2d(3, 2, 1)
    Tiled(network, 5)(picture(8, 8)).square().mean().backward()
    assert float(network.weight.grad.abs().min()) > 0


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        (0, None, "size must be a whole number, 1 or more, got 0"),
        ((4, 5, 6), None, r"size must be one number or two, height and width, got \(4, 5, 6\)"),
        (8, 8, r"overlap must be less than the tile's \(8, 8\), got 8"),
        ((8, 4), -1, "overlap must be a whole number, 0 or more, got -1"),
    ],
)
def test_wrong_tiles_are_named(size, overlap, message):
    with pytest.raises(ValueError, match=message):
        Tiled(nn.Identity(), size, overlap=overlap)


def test_wrong_images_and_networks_are_named():
    with pytest.raises(ValueError, match=r"image must be \(B, G, H, W\), not empty, got \(3, 4, 4\)"):
        Tiled(nn.Identity(), 4)(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match=r"network must return logits \(B, L, 4, 4\), got \(1, 3, 2, 2\)"):
        Tiled(nn.MaxPool2d(2), 4)(torch.zeros(1, 3, 8, 8))
