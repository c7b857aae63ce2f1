"""The Gaussian filter of a regular grid, exact: one pass along each axis.

    out_i = sum_j exp(-sum_a (p_ia - p_ja)² / (2 theta_a²)) v_j,    p = pixel index on a grid of 1 to 3 axes.

The kernel is a product over axes, so K = K_1 ⊗ ... ⊗ K_k, and nothing is ever read outside the image: its border acts
as the zeros of the definition. Along one axis K_a[i, j] = G_0(i - j) with G_m(r) = r^(2m) exp(-r² / (2 theta²)), a band
matrix as soon as theta is small against the axis. Since d G_m / d theta = G_(m+1) / theta³, the same pass with a higher
moment m gives the gradient to theta, of any order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import NORMALIZATIONS, SELF_FLOOR, normalized

# Rows of the band matrix multiplied at once. Fewer rows waste less on the corners outside the band, more rows keep the
# matrix product busy; 16 to 24 were the fastest at 500 x 375 x 21 and theta = 3 (radius 18).
MIN_BLOCK = 24


def _radius(theta: float, moment: int, dtype: torch.dtype) -> int:
    """Distance beyond which G_m is below half a unit of rounding of its largest entry: such summands are lost."""
    # exp(-t² / 2) < eps / 2 needs t² > 2 log(2 / eps); the factor t^(2m) costs another 4m in the exponent for t < 9.
    return math.ceil(theta * math.sqrt(2 * (math.log(2 / torch.finfo(dtype).eps) + 4 * moment)))


def _smooth_first_axis(
    x: Tensor,  # (B, n, M, C) contiguous
    theta: float,
    moment: int,
) -> Tensor:  # (B, M, n, C): the smoothed axis becomes the last one, so that k passes restore the order of k axes
    B, n, M, C = x.shape
    radius = min(_radius(theta, moment, x.dtype), n - 1)
    block = min(n, max(MIN_BLOCK, radius))
    # Every block of rows sees the same Toeplitz matrix; row i of it belongs to the pixel at column i + radius.
    row = torch.arange(block, dtype=torch.float64)[:, None]
    r = torch.arange(-radius, block + radius, dtype=torch.float64) - row
    kernel = (r.square() ** moment * torch.exp(-0.5 * (r / theta).square())).to(x)  # (block, block + 2 radius)
    out = x.new_empty(B, M, n, C)
    rows = x.new_empty(B, block, M * C)
    x = x.view(B, n, M * C)
    for start in range(0, n, block):
        stop, low, high = min(n, start + block), max(0, start - radius), min(n, start + block + radius)
        band = kernel[: stop - start, low - start + radius : high - start + radius]
        part = rows[:, : stop - start]
        torch.bmm(band.expand(B, -1, -1), x[:, low:high], out=part)
        out[:, :, start:stop] = part.view(B, -1, M, C).transpose(1, 2)  # while the block is still in the cache
    return out


class _Separable(torch.autograd.Function):
    """(K_1 ⊗ ... ⊗ K_k) x, each K_a made of G_m with its own theta and moment m. Differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, shape: tuple[int, ...], moments: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, theta)
        ctx.shape, ctx.moments = shape, moments
        B, N, C = x.shape
        for n, width, moment in zip(shape, theta.tolist(), moments, strict=True):
            x = _smooth_first_axis(x.reshape(B, n, N // n, C).contiguous(), width, moment)
        return x.view(B, N, C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, theta = ctx.saved_tensors
        grad_x = grad_theta = None
        if ctx.needs_input_grad[0]:  # K is symmetric
            grad_x = _Separable.apply(grad, theta, ctx.shape, ctx.moments)
        if ctx.needs_input_grad[1]:
            parts = []
            for axis in range(len(ctx.shape)):
                moments = tuple(m + (a == axis) for a, m in enumerate(ctx.moments))
                parts.append((grad * _Separable.apply(x, theta, ctx.shape, moments)).sum().to(theta))
            grad_theta = torch.stack(parts) / theta**3
        return grad_x, grad_theta, None, None


class GridFilter:
    """The Gaussian filter whose features are pixel index / theta, exact up to rounding, built once for a grid.

    Args:
        shape: sizes of the 1 to 3 axes of the grid, for example ``(H, W)``.
        theta: bandwidth in pixels, positive; a number, one number per axis, or a tensor of either, which may require
            gradients.
        normalization: "none", "before", "after" or "symmetric", see :func:`crfnet.ops.reference.normalized`.
        mask: ``(B, N)`` bool, True = the pixel takes part; the others neither send nor receive and get 0.
        remove_self: leave out j = i.

    Shape:
        values ``(B, N, C)``, float32 or float64, ``N = prod(shape)`` in row-major order → ``(B, N, C)``.

    Gradients reach the values and theta, to any order.

    Raises:
        ValueError: an argument has the wrong shape, range or dtype.
    """

    def __init__(
        self,
        shape: Sequence[int],
        theta: float | Sequence[float] | Tensor,
        *,
        normalization: str = "none",
        mask: Tensor | None = None,
        remove_self: bool = False,
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.N = math.prod(self.shape)
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"shape must have 1 to 3 axes of at least 1 pixel, got {tuple(shape)}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != self.N):
            raise ValueError(f"mask must be (B, {self.N}) bool, got {tuple(mask.shape)} {mask.dtype}")
        theta = torch.as_tensor(theta)
        if theta.ndim > 1 or (theta.ndim == 1 and len(theta) not in (1, len(self.shape))):
            raise ValueError(f"theta must be one number or {len(self.shape)}, one per axis, got {tuple(theta.shape)}")
        if not bool((theta.isfinite() & (theta > 0)).all()):
            raise ValueError(f"theta must be positive and finite, got {theta.tolist()}")
        self.theta = theta.double().expand(len(self.shape))  # (axes,), kept in float64: it is tiny, its kernel is not
        self.normalization, self.mask, self.remove_self = normalization, mask, remove_self
        # Row sums that carry a gradient belong to the graph of one call; the others are computed once.
        self._n = None if self.theta.requires_grad or normalization == "none" else self._row_sums()

    def _row_sums(self) -> Tensor:  # (1 or B, N, 1) float64
        """The normaliser n = K 1."""
        if not self.remove_self:
            return self._all_sums()
        return (self._all_sums() - 1.0).clamp(min=SELF_FLOOR)

    def _all_sums(self) -> Tensor:  # (1 or B, N, 1) float64
        """Row sums, self included; without a mask an outer product over the axes."""
        if self.mask is not None:
            return _Separable.apply(self.mask[..., None].double(), self.theta, self.shape, (0,) * len(self.shape))
        n = self.theta.new_ones(1, 1, 1)
        for size, theta in zip(self.shape, self.theta, strict=True):
            sums = _Separable.apply(self.theta.new_ones(1, size, 1), theta[None], (size,), (0,))
            n = (n * sums.mT).reshape(1, -1, 1)
        return n

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``(B, N, C)``."""
        batch = None if self.mask is None else len(self.mask)
        if values.ndim != 3 or values.shape[1] != self.N or batch not in (None, len(values)):
            wanted = f"({'B' if batch is None else batch}, {self.N}, C)"
            raise ValueError(f"values must be {wanted} for the grid {self.shape}, got {tuple(values.shape)}")
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"values must be float32 or float64, got {values.dtype}")
        n = None
        if self.normalization != "none":
            n = (self._row_sums() if self._n is None else self._n).to(values)
        outside = None if self.mask is None else ~self.mask[..., None]
        if outside is not None:
            values = values.masked_fill(outside, 0)

        def apply(x: Tensor) -> Tensor:
            smooth: Tensor = _Separable.apply(x, self.theta, self.shape, (0,) * len(self.shape))
            return smooth - x if self.remove_self else smooth

        out = normalized(apply, values, n, self.normalization)
        return out if outside is None else out.masked_fill(outside, 0)
