"""A network on overlapping tiles of an image too large for it, for inference.

    logits = sum over tiles t of w_t(i) network(tile t)(i) / sum over tiles of w_t(i),    w = the tent over the tile

A pixel far from the edges of a tile sees most of its surroundings there and counts most. A CRF comes once, on the
whole: ``WithCRF(Tiled(network, 1024), crf)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crfnet.inputs import whole_number


class Tiled(nn.Module):
    """A network applied tile by tile; memory is that of one tile, and of the logits of the image.

    Args:
        network: from images ``(B, G, h, w)`` to logits ``(B, L, h, w)`` of the same size.
        size: height and width of a tile, or one number for both; an image that is smaller is one tile along that axis.
        overlap: pixels that neighbours share at least, fewer than ``size``; a quarter of the shorter side unless given.

    Shape:
        image ``(B, G, H, W)`` → logits ``(B, L, H, W)``.

    DeepLab v2 predicts Cityscapes on overlapping tiles (arXiv:1606.00915, section 4.4), whose size and fusion are not
    published: these are ours.

    Raises:
        ValueError: a size or overlap that is none, an image of another shape.
        TypeError: the network returns something else than logits of the tile's size.
    """

    def __init__(self, network: nn.Module, size: int | Sequence[int], *, overlap: int | None = None) -> None:
        super().__init__()
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2:
            raise ValueError(f"size must be one number or two, height and width, got {size}")
        for side in sides:
            whole_number("size", side, 1)
        overlap = min(sides) // 4 if overlap is None else overlap
        whole_number("overlap", overlap, 0)
        if overlap >= min(sides):
            raise ValueError(f"overlap must be less than the tile's {sides}, got {overlap}")
        self.network, self.size, self.overlap = network, sides, overlap

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's own size."""
        if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape:
            raise ValueError(f"image must be (B, G, H, W), not empty, got {tuple(getattr(image, 'shape', ()))}")
        H, W = image.shape[2:]
        h, w = min(self.size[0], H), min(self.size[1], W)
        weight = torch.outer(_tent(h), _tent(w)).to(image.device)
        total: Tensor | None = None
        for top in _starts(H, h, self.overlap):
            for left in _starts(W, w, self.overlap):
                logits = self._logits(image[:, :, top : top + h, left : left + w])
                if total is None:
                    dtype = torch.promote_types(logits.dtype, torch.float32)  # bfloat16 would add up badly
                    total = logits.new_zeros((*logits.shape[:2], H, W), dtype=dtype)
                    weights = torch.zeros((H, W), device=logits.device)
                total[:, :, top : top + h, left : left + w] += logits * weight
                weights[top : top + h, left : left + w] += weight
        assert total is not None  # an image has a tile
        return total / weights

    def _logits(self, tile: Tensor) -> Tensor:
        logits = self.network(tile)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[2:] != tile.shape[2:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"network must return logits (B, L, {tile.shape[2]}, {tile.shape[3]}), got {got}")
        return logits


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover ``length`` and overlap enough, evenly spread."""
    count = 1 if side >= length else -(-(length - overlap) // (side - overlap))
    return [round(k * (length - side) / max(1, count - 1)) for k in range(count)]


def _tent(side: int) -> Tensor:
    """1, 2, .. up to the middle and down again to 1."""
    ramp = torch.arange(1.0, side + 1)
    return ramp.minimum(ramp.flip(0))
