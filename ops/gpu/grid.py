"""One pass of the separable Gaussian filter along an axis of a grid, in Triton.

    out_i = sum_j G_m(i - j) x_j,    G_m(r) = r^(2m) exp(-r² / (2 theta²)),    |i - j| <= radius(theta).

A program holds a few positions of many columns: each value is read once for all of them, and so is each power of two
computed once for all columns of a thread. Whatever shares a position on the axis is one of ``M = before * inner``
columns, so that axes with few channels waste no lanes. Bandwidths are read on the device: nothing waits for them, and a
bandwidth that changes recompiles nothing.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of
from .target import TARGETS, Build, Target, target_of
from .tune import pick

CONFIGS: dict[str, list[dict[str, int]]] = {
    name: [
        {"BLOCK": 8, "BLOCK_M": 256, "num_warps": 2},
        {"BLOCK": 8, "BLOCK_M": 128, "num_warps": 1},
        {"BLOCK": 16, "BLOCK_M": 256, "num_warps": 2},
    ]
    for name in TARGETS
}
UNROLL = tl.constexpr(4)  # positions whose values are on their way at once
MOMENTS = (0, 1, 2)  # values, their gradient to theta, and that one's; more are compiled when asked for

TAIL = -NormalDist().inv_cdf(0.5 * torch.finfo(torch.float32).eps)  # 5.3 bandwidths: the rest is below one rounding


def reach(moment: int) -> float:
    """Radius of the band in bandwidths, by the rule of the plain engine."""
    return math.sqrt(TAIL**2 + 8 * moment)


@triton.jit(do_not_specialize=["theta", "n", "inner", "M"])
def smooth_kernel(
    x, theta, out,  # (before, n, inner) float32, 0-d float64, (before, n, inner) float32
    n, inner, M,  # M = before * inner columns
    REACH: tl.constexpr, MOMENT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK positions of BLOCK_M columns."""
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    first, first_column = program % blocks * BLOCK, (program // blocks).to(tl.int64) * BLOCK_M
    # column m lies at x[m // inner, :, m % inner]; only scalars are divided in 64 bits, which is slow, and from the
    # program's first item on 32 bits address all elements unless the items are WIDE, which saves registers
    local = (first_column % inner).to(tl.int32) + tl.arange(0, BLOCK_M)
    origin = first_column // inner * n * inner
    item, stride, i = local // inner, inner, first + tl.arange(0, BLOCK)
    if WIDE:
        item, stride = item.to(tl.int64), inner.to(tl.int64)
    column = item * n * stride + local % inner  # [BLOCK_M], offset of position 0
    inside = first_column + tl.arange(0, BLOCK_M) < M

    width = tl.load(theta).to(tl.float32)
    width = tl.where((width > 0.0) & (width < float("inf")), width, float("nan"))  # and so will be all that is stored
    radius = tl.where(width > 0.0, tl.minimum(tl.ceil(width * REACH - 0.5), n - 1.0), 0.0).to(tl.int32)
    scale = 0.8493218002880191 / width  # (log2(e) / 2)^½
    scale = tl.where(scale > 100.0, 100.0, scale)  # neighbours hear 2^-10000; a minimum would lose NaN on a GPU
    unit = tl.minimum(tl.maximum(width, 1.0), n + 0.0)  # in units of this no moment overflows, however long the axis

    total = tl.zeros((BLOCK, BLOCK_M), tl.float32)
    for j in tl.range(tl.maximum(first - radius, 0), tl.minimum(first + BLOCK + radius, n), loop_unroll_factor=UNROLL):
        values = tl.load(x + origin + (column + j * stride), mask=inside, other=0.0)
        r = (i - j).to(tl.float32)
        band = tl.exp2(-(r * scale) * (r * scale))  # NaN throughout for a bandwidth that is none
        for _ in tl.static_range(MOMENT):
            band *= (r / unit) * (r / unit)
        total += band[:, None] * values[None, :]
    for _ in tl.static_range(MOMENT):
        total *= unit * unit
    tl.store(out + origin + (column[None, :] + i[:, None] * stride), total, mask=(i[:, None] < n) & inside[None, :])


def smooth(
    x: Tensor,  # (before, n, inner) contiguous float32
    theta: Tensor,  # 0-d float64, on the device of x; positive
    moment: int,
) -> Tensor:  # (before, n, inner)
    """One pass along the axis of length n. Never waits for the device."""
    before, n, inner = x.shape
    out = torch.empty_like(x)
    target = target_of(x)

    def run(config: dict[str, int]) -> None:
        programs = triton.cdiv(n, config["BLOCK"]) * triton.cdiv(before * inner, config["BLOCK_M"])
        smooth_kernel[(programs,)](
            x, theta, out, n, inner, before * inner,
            REACH=reach(moment), MOMENT=moment, WIDE=_wide(n, inner, config["BLOCK_M"]), **config,
        )  # fmt: skip

    if x.numel():
        with on_device_of(x):
            run(pick("grid", (n, inner, before, moment), CONFIGS[target.name], run, x))
    return out


def _wide(n: int, inner: int, columns: int) -> bool:
    """Whether offsets among so many columns, counted from the beginning of the first one's item, pass 31 bits."""
    return (columns // inner + 2) * n * inner >= 2**31


def builds(target: Target) -> Iterator[Build]:
    """Every configuration that ships."""
    types = {"x": "*fp32", "theta": "*fp64", "out": "*fp32", "n": "i32", "inner": "i32", "M": "i32"}
    for config in CONFIGS[target.name]:
        for moment, wide in [*((moment, False) for moment in MOMENTS), (0, True)]:
            constants = {"REACH": reach(moment), "MOMENT": moment, "WIDE": wide}
            blocks = {"BLOCK": config["BLOCK"], "BLOCK_M": config["BLOCK_M"]}
            yield Build(smooth_kernel, types, constants | blocks, {"num_warps": config["num_warps"]})
