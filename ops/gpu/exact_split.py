"""The exact filter in "fp16" with distances from the matrix unit too, as products of split features.

About the centre c of the sender's tile, a = f_i - c and b = f_j - c:

    -|f_i - f_j|²/2 = a·b - |a|²/2 - |b|²/2,    a·b = a_hi·b_hi + a_lo·b_hi + a_hi·b_lo + O(2^-22 |a| |b|),

where hi is a number rounded to float16 and lo what is left of it, rounded likewise: products of such are exact in the
matrix unit. What remains for each pair is two additions and the power of two, against 2 D + 1 operations where squares
of differences are summed. Tiles whose points lie farther than NEAR from their centre are left to the differences:
beyond, the three terms would cancel too much.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of
from .exact_pairs import HALF_LOG2E, TILE
from .target import Build, Target

ROOT: tl.constexpr = tl.constexpr((2 * HALF_LOG2E.value) ** 0.5)  # features times this: squares in powers of two
MAX_D = 10  # three products of each feature fit the 32 columns of two matrix instructions
MAX_BLOCK = {"sm_80": 32, "sm_90": 64, "gfx942": 64}

# of |a| |b|, in the exponent of e: 3 * 2^-22 for what is dropped and rounded, 2^-19 for up to 32 sums that round to 0
SPLIT_ERROR = 2**-18

CONFIGS: dict[str, list[dict[str, int]]] = {
    "sm_80": [{"num_warps": 4, "num_stages": s} for s in (2, 1)],  # more on its way spills a register or two
    "sm_90": [{"num_warps": 4, "num_stages": s} for s in (3, 2, 4)],
    "gfx942": [{"num_warps": 4, "num_stages": s, "matrix_instr_nonkdim": 16} for s in (2, 1)],
}


def width(D: int) -> int:
    """Columns of the product a·b: three for each feature, and zeros."""
    return 16 if 3 * D <= 16 else 32


def most_channels(D: int, target: Target) -> int:
    """Of a program, before its sums no longer fit the registers."""
    return 16 if target.name == "sm_80" and width(D) == 32 else MAX_BLOCK[target.name]


def senders(
    points: Tensor,  # (T, D, 64)
) -> tuple[Tensor, Tensor, Tensor]:
    """What a tile is as a sender.

    Returns:
        centres ``(T, Q)``, each feature three times; split ``(T, 64, Q)`` float16: b_hi, b_hi, b_lo; half ``(T, 64)``:
        |b|²/2. The latter two in units in which exp is exp2.
    """
    T, D, _ = points.shape
    Q = width(D)
    centre = (points.amin(2) + points.amax(2)) / 2
    centres = torch.nn.functional.pad(centre.repeat(1, 3), (0, Q - 3 * D))
    split = torch.empty(T, TILE, Q, dtype=torch.float16, device=points.device)
    half = torch.empty(T, TILE, device=points.device)
    with on_device_of(points):
        _senders_kernel[(T,)](points, centres, split, half, D=D, Q=Q, num_warps=4)
    return centres, split, half


@triton.jit
def _senders_kernel(points, centres, split, half, D: tl.constexpr, Q: tl.constexpr):
    """One tile, see `senders`."""
    tile = tl.program_id(0).to(tl.int64)
    slot, q = tl.arange(0, 64), tl.arange(0, Q)
    at = points + (tile * D + q % D)[None, :] * 64 + slot[:, None]
    f = tl.load(at, mask=(q < 3 * D)[None, :], other=0.0)
    b = (f - tl.load(centres + tile * Q + q)[None, :]) * ROOT
    b = tl.minimum(tl.maximum(b, -1e4), 1e4)  # of wide tiles, which nobody asks for here, what float16 can hold
    high = b.to(tl.float16)
    low = (b - high.to(tl.float32)).to(tl.float16)
    tl.store(split + (tile * 64 + slot[:, None]) * Q + q[None, :], tl.where((q < 2 * D)[None, :], high, low))
    tl.store(half + tile * 64 + slot, 0.5 * tl.sum(tl.where((q < D)[None, :], b * b, 0.0), 1))


@triton.jit(do_not_specialize=["C"])
def _split_filter_kernel(
    points, centres, split, half,  # (T, D, 64), and as in `senders`
    values, offsets, near, columns, source, size,  # (T, room for C, 64) float16, and as in exact_pairs.Pairs and Tiles
    scale, out,  # (C,), (P, C)
    C, D: tl.constexpr, Q: tl.constexpr, BLOCK_C: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program sums what a tile of points receives in BLOCK_C channels: from near tiles, then from wide ones."""
    tile = tl.program_id(0).to(tl.int64)
    slot, q = tl.arange(0, 64), tl.arange(0, Q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    room = tl.num_programs(1) * BLOCK_C
    begin = tl.load(offsets + tile)
    partners = (tl.load(offsets + tile + 1) - begin).to(tl.int32)
    split_partners = tl.load(near + tile)
    is_low = ((q >= D) & (q < 2 * D))[None, :]
    f = tl.load(points + (tile * D + q % D)[None, :] * 64 + slot[:, None], mask=(q < 3 * D)[None, :], other=0.0)
    total = tl.zeros((64, BLOCK_C), tl.float32)
    for start in range(0, split_partners, SPAN):
        part = tl.zeros((64, BLOCK_C), tl.float32)
        for k in range(start, tl.minimum(start + SPAN, split_partners)):
            other = tl.load(columns + begin + k).to(tl.int64)
            a = (f - tl.load(centres + other * Q + q)[None, :]) * ROOT
            high = a.to(tl.float16)
            rows = tl.where(is_low, (a - high.to(tl.float32)).to(tl.float16), high)
            own = 14.0 - 0.5 * tl.sum(tl.where((q < D)[None, :], a * a, 0.0), 1)  # K times 2^14, as in `exact`
            b = tl.load(split + other * 64 * Q + q[:, None] + slot[None, :] * Q)
            exponent = tl.dot(rows, b) + own[:, None] - tl.load(half + other * 64 + slot)[None, :]
            v = tl.load(values + other * room * 64 + c[None, :] * 64 + slot[:, None])
            part += tl.dot(tl.exp2(exponent).to(tl.float16), v)
        total += part
    for start in range(split_partners, partners, SPAN):
        part = tl.zeros((64, BLOCK_C), tl.float32)
        for k in range(start, tl.minimum(start + SPAN, partners)):
            other = tl.load(columns + begin + k).to(tl.int64)
            distance2 = tl.zeros((64, 64), tl.float32)
            for d in tl.static_range(D):
                own = tl.load(points + (tile * D + d) * 64 + slot)
                difference = own[:, None] - tl.load(points + (other * D + d) * 64 + slot)[None, :]
                distance2 += difference * difference
            v = tl.load(values + other * room * 64 + c[None, :] * 64 + slot[:, None])
            part += tl.dot(tl.exp2(14.0 - distance2 * HALF_LOG2E).to(tl.float16), v)
        total += part
    total = total * 2**-14 * tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    point = tl.load(source + tile * 64 + slot).to(tl.int64)
    real = (slot[:, None] < tl.load(size + tile)) & (c[None, :] < C)
    tl.store(out + point[:, None] * C + c[None, :], total, mask=real)


def builds(target: Target, span: int) -> Iterator[Build]:
    """Both kernels at several D, the candidates for tuning at one."""
    for D in (1, 2, 3, 5, 6, 10):
        sizes = {"D": D, "Q": width(D)}
        tiles = {"points": "*fp32", "centres": "*fp32", "split": "*fp16", "half": "*fp32"}
        yield Build(_senders_kernel, tiles, sizes, {"num_warps": 4})
        types = tiles | {"values": "*fp16", "offsets": "*i64"}
        types |= dict.fromkeys(("near", "columns", "source", "size"), "*i32")
        types |= {"scale": "*fp32", "out": "*fp32", "C": "i32"}
        for block in (block for block in (16, 32, 64) if block <= most_channels(D, target)):
            for config in CONFIGS[target.name][: None if D == 5 else 1]:
                constants = sizes | {"BLOCK_C": block, "SPAN": span}
                yield Build(_split_filter_kernel, types, constants, config, matrix=True)
