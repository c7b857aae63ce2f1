"""The Gaussian filter of a regular grid, exact: one pass along each axis.

    out_i = sum_j exp(-sum_a (p_ia - p_ja)² / (2 theta_a²)) v_j,    p = pixel index on a grid of 1 to 3 axes.

The kernel is a product over axes, so K = K_1 ⊗ ... ⊗ K_k, and nothing is ever read outside the image: its border acts
as the zeros of the definition. Along one axis K_a[i, j] = G_0(i - j) with G_m(r) = r^(2m) exp(-r² / (2 theta²)), a band
matrix as soon as theta is small against the axis. Since d G_m / d theta = G_(m+1) / theta³, the same pass with a higher
moment m gives the gradient to theta, of any order. On a GPU a pass is the kernel of `gpu.grid`.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from . import gpu
from .reference import EPS, NORMALIZATIONS, SELF_FLOOR, normalized

# Rows of the band matrix multiplied at once. Fewer rows waste less on the corners outside the band, more rows keep the
# matrix product busy; 16 to 24 were the fastest at 500 x 375 x 21 and theta = 3.
BLOCK = 16


def _radius(theta: float, moment: int, dtype: torch.dtype) -> int:
    """Smallest distance beyond which the whole rest of G_m is below one rounding of its sum."""
    tail = -NormalDist().inv_cdf(0.5 * torch.finfo(dtype).eps)  # 5.3 in float32, 8.1 in float64
    # the factor t^(2m) costs at most another 4m in the exponent t² / 2, for t < 9
    return math.ceil(theta * math.sqrt(tail**2 + 8 * moment) - 0.5)


def _band(rows: Tensor, columns: Tensor, theta: float, moment: int) -> Tensor:
    """G_m(i - j) for integer positions i, j, float64."""
    r = (rows - columns).double()
    return r.square() ** moment * torch.exp(-0.5 * (r / theta).square())


def _fast(x: Tensor) -> bool:
    """Whether passes are convolutions: all that shares a position on the axis, side by side as channels."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not gpu.serves(x)
    return plain and torch.backends.mkldnn.is_available()


def _smooth(
    x: Tensor,  # (before, n, after, C) contiguous
    theta: float,
    moment: int,
) -> Tensor:  # the same shape
    """One pass along the axis of length n."""
    before, n, after, C = x.shape
    radius = min(_radius(theta, moment, x.dtype), n - 1)
    if _fast(x):
        channels = after * C
        taps = _band(torch.arange(-radius, radius + 1), torch.zeros(1), theta, moment).to(x)
        image = x.view(1, before, n, channels).permute(0, 3, 1, 2)
        smooth = conv2d(image, taps.expand(channels, 1, 1, -1), padding=(0, radius), groups=channels)
        return smooth.permute(0, 2, 3, 1).reshape(before, n, after, C)
    x = x.view(before, n, after * C)
    out = torch.empty_like(x)
    toeplitz = _toeplitz(theta, moment, radius, n).to(x)
    for item in range(before):
        _multiply_band(toeplitz, x[item], 0, out[item])
    return out.view(before, n, after, C)


def _toeplitz(theta: float, moment: int, radius: int, n: int) -> Tensor:
    """(block, block + 2 radius) float64: the band matrix, the same for every block of rows, from column i - radius."""
    block = min(n, BLOCK)
    return _band(torch.arange(block)[:, None], torch.arange(block + 2 * radius) - radius, theta, moment)


def _multiply_band(
    toeplitz: Tensor,  # (block, block + 2 radius)
    x: Tensor,  # (n, M)
    first: int,
    out: Tensor,  # (rows, M): rows ``first`` and following of the product of the whole band matrix with x
) -> None:
    block, radius = len(toeplitz), (toeplitz.shape[1] - len(toeplitz)) // 2
    for start in range(0, len(out), block):
        rows, at = min(block, len(out) - start), first + start
        low, high = max(0, at - radius), min(len(x), at + rows + radius)
        torch.mm(toeplitz[:rows, low - at + radius : high - at + radius], x[low:high], out=out[start : start + rows])


def _on(device: torch.device, theta: Tensor) -> Tensor:
    """Theta on the device. Mere numbers are filled in there, since copying them would wait."""
    if theta.device == device:
        return theta
    return torch.stack([torch.full((), width, dtype=theta.dtype, device=device) for width in theta.tolist()])


def _passes(x: Tensor, theta: Tensor, shape: Sequence[int], moments: Sequence[int]) -> Tensor:
    """One pass an axis, ``(B, N, C)`` to ``(B, N, C)`` contiguous; no gradients are recorded."""
    B, N, C = x.shape
    before, after = B, N
    x = x.contiguous()
    if gpu.serves(x):
        from .gpu.grid import smooth

        for n, theta_a, moment in zip(shape, _on(x.device, theta), moments, strict=True):
            after //= n
            x = smooth(x.view(before, n, after * C), theta_a, moment)
            before *= n
        return x.view(B, N, C)
    for n, width, moment in zip(shape, theta.tolist(), moments, strict=True):
        after //= n
        x = _smooth(x.view(before, n, after, C), width, moment)
        before *= n
    return x.view(B, N, C)


def _separable(x: Tensor, theta: Tensor, shape: Sequence[int], moments: Sequence[int]) -> Tensor:
    """(K_1 ⊗ ... ⊗ K_k) x, each K_a made of G_m with its own theta and moment m. Differentiable any number of times."""
    apply = _graph_passes if torch.compiler.is_compiling() else _Separable.apply
    return apply(x, theta, list(shape), list(moments))


def _gradients(ctx: Any, grad: Tensor, apply: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, theta = ctx.saved_tensors
    grad_x = grad_theta = None
    with torch.autocast(grad.device.type, enabled=False):
        if ctx.needs_input_grad[0]:  # K is symmetric
            grad_x = apply(grad, theta, ctx.shape, ctx.moments)
        if ctx.needs_input_grad[1]:
            parts = []
            for axis in range(len(ctx.shape)):
                moments = [m + (a == axis) for a, m in enumerate(ctx.moments)]
                parts.append((grad * apply(x, theta, ctx.shape, moments)).sum().to(theta))
            grad_theta = torch.stack(parts) / theta**3
    return grad_x, grad_theta, None, None


class _Separable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, shape: list[int], moments: list[int]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, theta)
        ctx.shape, ctx.moments = shape, moments
        return _passes(x, theta, shape, moments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _gradients(ctx, grads[0], _Separable.apply)


@torch.library.custom_op("crfnet::separable", mutates_args=())
def _graph_passes(x: Tensor, theta: Tensor, shape: Sequence[int], moments: Sequence[int]) -> Tensor:
    """The same for graphs, which cannot look into a pass."""
    return _passes(x, theta, shape, moments)


@_graph_passes.register_fake
def _(x: Tensor, theta: Tensor, shape: Sequence[int], moments: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _graph_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, theta, ctx.shape, ctx.moments = inputs
    ctx.save_for_backward(x if theta.requires_grad else None, theta)


def _graph_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    return _gradients(ctx, grad, _graph_passes)


_graph_passes.register_autograd(_graph_gradients, setup_context=_graph_save)


def _unusable(kept: Tensor) -> bool:
    """Whether autograd would refuse what was computed in inference mode."""
    return not torch.compiler.is_compiling() and kept.is_inference() and not torch.is_inference_mode_enabled()


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
        self.shape = tuple(shape)
        self.N = math.prod(self.shape)
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"shape must have 1 to 3 axes of at least 1 pixel, got {tuple(shape)}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != self.N):
            raise ValueError(f"mask must be (B, {self.N}) bool, got {tuple(mask.shape)} {mask.dtype}")
        theta = theta if isinstance(theta, Tensor) else torch.as_tensor(theta, dtype=torch.float64)
        if theta.ndim > 1 or (theta.ndim == 1 and len(theta) not in (1, len(self.shape))):
            raise ValueError(f"theta must be one number or {len(self.shape)}, one per axis, got {tuple(theta.shape)}")
        # one on a GPU was learnt, comes out of an exponential, and a look at it would wait for the device
        readable = gpu.host_may_read(theta) and not theta.is_cuda
        if readable and not bool((theta.isfinite() & (theta > 0)).all()):
            raise ValueError(f"theta must be positive and finite, got {theta.tolist()}")
        self.theta = theta.double().expand(len(self.shape))  # (axes,), kept in float64: it is tiny, its kernel is not
        self.normalization, self.mask, self.remove_self = normalization, mask, remove_self
        # Row sums that carry a gradient belong to the graph of one call; the others are kept from the first.
        self._n: Tensor | None = None

    def _row_sums(self, values: Tensor) -> Tensor:  # (1 or B, N, 1), like the values
        """The normaliser n = K 1."""
        n = self._n
        fits = n is not None and n.dtype == values.dtype and n.device == values.device
        if n is None or not fits or _unusable(n):
            n = self._all_sums(values)
            if self.remove_self:
                n = (n - 1.0).clamp(min=SELF_FLOOR)
            n = n.to(values)
            if not (self.theta.requires_grad or gpu.capturing(n)):  # what is captured holds nothing before it runs
                self._n = n
        return n

    def _all_sums(self, values: Tensor) -> Tensor:  # (1 or B, N, 1)
        """Row sums, self included, in float64 where that is cheap; without a mask an outer product over the axes."""
        on_gpu = gpu.serves(values)
        if self.mask is not None or on_gpu:
            ones = values.new_ones(1, self.N, 1) if self.mask is None else self.mask[..., None]
            ones = ones.to(values.dtype if on_gpu else torch.float64)
            return _separable(ones, self.theta, self.shape, (0,) * len(self.shape))
        n = self.theta.new_ones(1, 1, 1)
        for size, theta in zip(self.shape, self.theta, strict=True):
            sums = _separable(self.theta.new_ones(1, size, 1), theta[None], (size,), (0,))
            n = (n * sums.mT).reshape(1, -1, 1)
        return n

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``(B, N, C)``."""
        self._check_values(values)
        n = None if self.normalization == "none" else self._row_sums(values)
        with torch.autocast(values.device.type, enabled=False):
            out = normalized(self._apply, self._sent(values), n, self.normalization)
        return out if self.mask is None else out.masked_fill(~self.mask[..., None], 0)

    def factor(self, like: Tensor) -> Tensor | None:
        """What a `message` still has to be multiplied by, ``(1 or B, N, 1)``, or None.

        Prepares the row sums for values of such a dtype and device in any case.
        """
        if self.normalization == "none":
            return None
        factors = self._row_sums(like).clamp(min=EPS).reciprocal()
        return factors if self.normalization == "after" else None

    def message(self, values: Tensor) -> Tensor:
        """The same but for `factor`, for callers who multiply by something anyway; 0 where the mask is False."""
        if self.normalization != "after":
            return self(values)
        self._check_values(values)
        with torch.autocast(values.device.type, enabled=False):
            return self._sent(self._apply(self._sent(values)))

    def _apply(self, x: Tensor) -> Tensor:  # (B, N, C) → (B, N, C)
        theta = self.theta.clone() if _unusable(self.theta) else self.theta
        smooth: Tensor = _separable(x, theta, self.shape, (0,) * len(self.shape))
        return smooth - x if self.remove_self else smooth

    def _sent(self, values: Tensor) -> Tensor:
        return values if self.mask is None else values.masked_fill(~self.mask[..., None], 0)

    def _check_values(self, values: Tensor) -> None:
        batch = None if self.mask is None else self.mask.shape[0]
        if values.ndim != 3 or values.shape[1] != self.N or (batch is not None and values.shape[0] != batch):
            wanted = f"({'B' if batch is None else batch}, {self.N}, C)"
            raise ValueError(f"values must be {wanted} for the grid {self.shape}, got {tuple(values.shape)}")
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"values must be float32 or float64, got {values.dtype}")

    def send(self, values: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
        """Filter values ``(B, N, C)`` piece by piece, without gradients, for callers that keep pieces in the cache.

        The values are read as pieces are asked for, and must stay as they are until the last.

        Returns:
            a function of start and stop, points of ``(B N)`` that fill whole rows of one item: what they receive,
            ``(stop - start, C)``, and their factors ``(stop - start, 1)`` or None.
        """
        B, N, C = values.shape
        simple = self.mask is None and not self.remove_self and self.normalization in ("none", "after")
        if not (simple and _fast(values) and values.is_contiguous()):
            out = self(values).flatten(0, 1)
            return lambda start, stop: (out[start:stop], None)
        n, row = self.shape[0], self.N // self.shape[0]
        rows = values.view(B, n, row * C)
        widths = self.theta.tolist()
        toeplitz = _toeplitz(widths[0], 0, min(_radius(widths[0], 0, values.dtype), n - 1), n).to(values)
        n_of_rows = None if self.normalization == "none" else self._row_sums(values)
        factors = None if n_of_rows is None else n_of_rows.detach().view(N, 1).reciprocal()

        def receive(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
            item, first, last = start // N, start % N // row, (stop - 1) % N // row + 1
            x = values.new_empty(last - first, row * C)
            _multiply_band(toeplitz, rows[item], first, x)
            before, after = last - first, row
            for size, width in zip(self.shape[1:], widths[1:], strict=True):
                after //= size
                x = _smooth(x.view(before, size, after, C), width, 0)
                before *= size
            return x.view(-1, C), None if factors is None else factors[start % N : start % N + stop - start]

        return receive
