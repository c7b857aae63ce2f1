"""Where scores lie on the image: Caffe's Crop and Interp layers, bilinear deconvolutions, and labels at the scores.

Interp is linear with corners on corners: n scores of stride s become (n - 1) s + 1 pixels, score i at pixel s i. Pools
round up (``ceil_mode``) as Caffe's do, and torch drops the same windows that would begin beyond the padded border.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def crop(x: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    """``(B, C, h, w)`` → ``(B, C, *size)``, ``offset`` pixels dropped at the top and the left."""
    return x[..., offset : offset + size[0], offset : offset + size[1]]


def pad_to(x: Tensor, stride: int, remainder: int) -> Tensor:
    """Zeros (the mean colour) at the bottom and the right, until height and width are ``k * stride + remainder``."""
    bottom, right = ((remainder - n) % stride for n in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom))


def interp(x: Tensor, size: Sequence[int]) -> Tensor:
    """Caffe's Interp layer to ``size``: bilinear, corners on corners."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def zoom(x: Tensor, factor: int) -> Tensor:
    """Interp with ``zoom_factor``: n → (n - 1) factor + 1."""
    return interp(x, [(n - 1) * factor + 1 for n in x.shape[2:]])


def place(scores: Tensor, size: Sequence[int], stride: int, first: Sequence[float]) -> Tensor:
    """Linear interpolation to ``(B, L, *size)`` of scores whose cell i lies at pixel ``first + stride * i``.

    Pixels beyond the outermost cells get those cells' scores.
    """
    rows, columns = (
        _hat(n, cells, stride, begin, scores) for n, cells, begin in zip(size, scores.shape[2:], first, strict=True)
    )
    return rows @ scores @ columns.mT


def _hat(n: int, cells: int, stride: int, first: float, like: Tensor) -> Tensor:
    """``(n, cells)``: how much of each cell a pixel gets, max(0, 1 - distance in cells)."""
    at = ((torch.arange(n, device=like.device, dtype=like.dtype) - first) / stride).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells, device=like.device)).abs()).clamp_min(0)


def bilinear_kernel(size: int) -> Tensor:
    """``(size, size)``, product of 1 - |x - c| / f an axis; f = floor((size + 1) / 2), c = f - 1, if even f - 1 / 2.

    Source: shelhamer/fcn.berkeleyvision.org, surgery.py.
    """
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    line = 1 - (torch.arange(size) - centre).abs() / factor
    return line[:, None] * line[None]


def deconvolution(
    num_classes: int, kernel: int, stride: int, *, learn: bool = False, bias: bool = False
) -> nn.ConvTranspose2d:
    """A deconvolution that starts as bilinear interpolation, each label for itself; fixed unless ``learn``."""
    layer = nn.ConvTranspose2d(num_classes, num_classes, kernel, stride, bias=bias)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(num_classes), range(num_classes)] = bilinear_kernel(kernel)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer.requires_grad_(learn)


def subsample_labels(labels: Tensor, *, stride: int = 8, offset: int = 0) -> Tensor:
    """Labels ``(B, H, W)`` of the pixels ``offset + stride * i``, where the scores of a crop of that size lie.

    Raises:
        ValueError: the last score would lie beyond the labels, or some labels beyond it: 321 pixels have 41 scores.
    """
    for n in labels.shape[-2:]:
        if (n - 1 - offset) % stride or n <= offset:
            raise ValueError(
                f"labels must have {stride} k + {offset + 1} pixels an axis, such as {40 * stride + offset + 1}: "
                f"scores end there; got {tuple(labels.shape[-2:])}"
            )
    return labels[..., offset::stride, offset::stride]
