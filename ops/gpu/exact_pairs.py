"""Which pairs of tiles the exact engine computes, chosen on the device: tiles, bounds, and the list.

A tile is 64 points that are close together. Between two tiles whose boxes are ``gap`` apart no kernel entry exceeds
exp(-gap²/2). For each row tile i the least cut is looked for beyond which

    sum over tiles J with gap² >= cut_i of n_J exp(-gap²/2)  <=  tolerance * (lower bound of the row sums in i),

and a pair is computed iff gap² < max(cut_i, cut_j): in both directions or in none. Row sums are bounded by convexity:
sum_(j in J) exp(-d_ij²/2) >= n_J exp(-mean_j d_ij²/2), and that mean is |f_i - mean_J|² + variance_J.

Bounds are computed in float32 and widened by more than its rounding: see the constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of
from .target import Build, Target

TILE = 64  # points to a tile
NEAR = 4.0  # radius in bandwidths up to which distances may come from split features: see exact_split
MAX_UNREAD = 2**22  # pairs up to which room is made for all of them, so that the host need not wait for their number
MAX_CAPTURED = 2**28  # the same while a CUDA graph is captured, when it cannot wait: 1 GiB
MIN_BITS = 16  # of a position, below which a sort key is given 64
HALF_LOG2E: tl.constexpr = tl.constexpr(0.5 * math.log2(math.e))  # exp(-x/2) = exp2(-x log2(e)/2)

# Margins, each some ten times what it covers. u = 2^-24.
GAP_MARGIN: tl.constexpr = tl.constexpr(1 - 2**-16)  # of gap²: D + 3 roundings, at most 19 u
SUM_MARGIN: tl.constexpr = tl.constexpr(2**-9)  # of a sum over tiles: exp2 to 4 u, and a rounding per 32 or 128 tiles
STRETCH: tl.constexpr = tl.constexpr(
    1 + 2**-10
)  # of |f - mean|²: its rounding, and half of 2 |f - mean| |error of mean|
MAX_CUT: tl.constexpr = tl.constexpr(210.0)  # squared: exp(-105) is 0 in float32
STEPS: tl.constexpr = tl.constexpr(12)  # halvings of the interval in which a cut is looked for; 210 / 4096 = 0.05


class Tiles(NamedTuple):
    """The points of all items in tiles; only the last tile of an item may be short."""

    source: Tensor  # (T, 64) int32, index of each slot's point; a short tile ends in copies of its last point
    size: Tensor  # (T,) int32, points in the tile, without copies
    first: Tensor  # (T,) int32, first tile of the tile's item
    last: Tensor  # (T,) int32, one past the last tile of the tile's item


class Pairs(NamedTuple):
    """Kept pairs of tiles, by rows: first the near ones, then those of which one tile is wide."""

    offsets: Tensor  # (T + 1,) int64, where the columns of each row tile begin
    columns: Tensor  # (at least as many as are kept,) int32
    near: Tensor  # (T,) int32, how many of the columns of each row tile are near
    points: Tensor  # (T,) int32, points in the columns of each row tile
    reached: Tensor  # (T,), bound on what a row leaves out, relative to its row sums


def split(features: Tensor, counts: list[int]) -> Tiles:
    """Split every item, again and again, along the widest axis of each group of tiles.

    The tree's shape follows from the counts alone: at level l group g of an item of t tiles begins at its tile
    t g / 2^l, rounded down. So each level is one sort of all points, and the host waits for none of them.

    Args:
        features: ``(P, D)`` float32 contiguous, the items one after the other.
        counts: points of each item.
    """
    counts = [n for n in counts if n > 0]
    T = sum(-(-n // TILE) for n in counts)
    device, D = features.device, features.shape[1]
    n = _counts(counts, device)  # (items,)
    tiles = (n + TILE - 1) // TILE
    item = torch.repeat_interleave(torch.arange(len(counts), device=device), tiles, output_size=T)
    last = tiles.cumsum(0)[item]
    first = last - tiles[item]
    rank = torch.arange(T, device=device) - first
    size = (n[item] - TILE * rank).clamp(max=TILE)
    slot = torch.arange(TILE, device=device)
    begin = (n.cumsum(0) - n)[item] + TILE * rank  # first point of each tile
    order = torch.where(slot < size[:, None], begin[:, None] + slot, -1).to(torch.int32)  # -1 where a tile is short
    first, last, size = first.to(torch.int32), last.to(torch.int32), size.to(torch.int32)
    bits = min(24, 31 - T.bit_length())  # of a position within its group; the key's others name the group
    bits, dtype = (bits, torch.int32) if bits >= MIN_BITS else (24, torch.int64)
    keys = torch.empty(T * TILE, dtype=dtype, device=device)
    low, high = features.new_empty(2, T, D)
    for level in range(max((-(-n // TILE) - 1).bit_length() for n in counts) if counts else 0):
        with on_device_of(features):
            _box_kernel[(T,)](features, order, low, high, D, num_warps=1)
            _key_kernel[(T,)](features, order, low, high, first, last, keys, level, bits, D, num_warps=4)
        order = order.view(-1)[keys.sort(stable=True)[1]].view(T, TILE)
    source = order.gather(1, slot.minimum(size[:, None] - 1))
    return Tiles(source, size, first, last)


def _counts(counts: list[int], device: torch.device) -> Tensor:
    """``(items,)`` int64 on the device, without waiting for it."""
    if len(set(counts)) <= 1:  # filled there, which a CUDA graph can do too
        return torch.full((len(counts),), counts[0] if counts else 0, device=device)
    return torch.tensor(counts, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)


def choose(points: Tensor, tiles: Tiles, tolerance: float, counts: list[int]) -> Pairs:
    """The pairs to compute for points ``(T, D, 64)``; the host waits at most once, for their number."""
    T, D, _ = points.shape
    low, high = points.amin(2), points.amax(2)  # (T, D)
    real = torch.arange(TILE, device=points.device) < tiles.size[:, None, None]  # (T, 1, 64)
    centre = (low + high) / 2
    mean = centre + ((points - centre[..., None]) * real).sum(2) / tiles.size[:, None]
    variance = ((points - mean[..., None]).square() * real).sum((1, 2)) / tiles.size  # about that mean: (T,)
    # The mean is off by its own rounding and that of the sum; see STRETCH for the other half of what this costs.
    error = 2**-22 * torch.maximum(low.abs(), high.abs()) + 2**-17 * (high - low)
    variance = variance * (1 + 2**-10) + 2**10 * error.square().sum(1)
    weight = tiles.size * torch.exp(-0.5 * variance)
    low, high, mean = low.T.contiguous(), high.T.contiguous(), mean.T.contiguous()  # (D, T)
    row_sums, cut, reached = points.new_empty(3, T)
    kept, inside = torch.empty(2, T, dtype=torch.int32, device=points.device)
    boxes = low, high, tiles.first, tiles.last
    with on_device_of(points):
        _row_sum_kernel[(T,)](points, mean, weight, tiles.first, tiles.last, row_sums, T, D, num_warps=4)
        _cut_kernel[(T,)](*boxes, tiles.size, row_sums, cut, reached, tolerance, T, D, num_warps=4)
        _count_kernel[(T,)](*boxes, tiles.size, cut, kept, inside, T, D, num_warps=4)
    offsets = torch.nn.functional.pad(kept.cumsum(0, dtype=torch.int64), (1, 0))
    columns = torch.empty(_room(offsets, counts), dtype=torch.int32, device=points.device)
    near = torch.empty(T, dtype=torch.int32, device=points.device)
    wide = ((high - low).square().sum(0) > (2 * NEAR) ** 2).to(torch.int32)
    with on_device_of(points):
        _list_kernel[(T,)](*boxes, cut, wide, offsets, columns, near, T, D, num_warps=_warps(D))
    return Pairs(offsets, columns, near, inside, reached)


def _warps(D: int) -> int:
    """Of the list kernel: the more features, the fewer columns to a thread, or they do not fit its registers."""
    return 4 if D <= 8 else 8


def _room(offsets: Tensor, counts: list[int]) -> int:
    """How many columns to make room for."""
    largest = sum((-(-n // TILE)) ** 2 for n in counts)
    if largest <= MAX_UNREAD:
        return largest
    if not (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return int(offsets[-1])
    if largest > MAX_CAPTURED:
        raise RuntimeError(
            f"the exact engine cannot be built for {max(counts)} points while a CUDA graph is captured: the host "
            f"cannot ask how many pairs of tiles matter, and {largest} are too many to make room for; build it before"
        )
    return largest


@triton.jit
def _box_kernel(features, order, low, high, D: tl.constexpr):
    """The box of one tile's points: ``(P, D)`` and ``(T, 64)`` to ``(T, D)``."""
    tile = tl.program_id(0).to(tl.int64)
    point = tl.load(order + tile * 64 + tl.arange(0, 64)).to(tl.int64)
    for d in tl.static_range(D):
        f = tl.load(features + point * D + d, mask=point >= 0, other=float("inf"))
        tl.store(low + tile * D + d, tl.min(f, 0))
        f = tl.load(features + point * D + d, mask=point >= 0, other=float("-inf"))
        tl.store(high + tile * D + d, tl.max(f, 0))


@triton.jit(do_not_specialize=["level", "bits"])
def _key_kernel(features, order, low, high, first, last, keys, level, bits, D: tl.constexpr):
    """Sort keys of one tile's points: first tile of their group, then the position along the group's widest axis."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(first + tile).to(tl.int64)
    tiles = tl.load(last + tile) - begin
    group = (((tile - begin + 1) << level) - 1) // tiles  # the one that the tile is in: see `split`
    start = begin + ((tiles * group) >> level)
    stop = begin + ((tiles * (group + 1)) >> level)
    axis, origin, width = 0, 0.0, -1.0
    for d in tl.static_range(D):
        least = tl.full((128,), float("inf"), tl.float32)
        most = tl.full((128,), float("-inf"), tl.float32)
        for block in range(start, stop, 128):
            j = block + tl.arange(0, 128)
            least = tl.minimum(least, tl.load(low + j * D + d, mask=j < stop, other=float("inf")))
            most = tl.maximum(most, tl.load(high + j * D + d, mask=j < stop, other=float("-inf")))
        at = tl.min(least, 0)
        extent = tl.max(most, 0) - at
        if extent > width:
            axis, origin, width = d, at, extent
    slot = tile * 64 + tl.arange(0, 64)
    point = tl.load(order + slot).to(tl.int64)
    f = tl.load(features + point * D + axis, mask=point >= 0, other=0.0)
    # clamped before it becomes an integer; NaN becomes 0, so that the order stays a permutation whatever comes
    position = tl.minimum(tl.maximum((f - origin) / tl.maximum(width, 1e-30), 0.0), 1.0)
    levels = 1 << bits
    position = tl.minimum((position * levels).to(tl.int32), levels - 1)
    position = tl.where(point >= 0, position, levels - 1)  # a stable sort keeps the empty slots last
    tl.store(keys + slot, ((start << bits) + position).to(keys.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _row_sum_kernel(points, mean, weight, first, last, row_sums, T, D: tl.constexpr):
    """A lower bound of (K 1)_i over the points i of one tile, at least 1."""
    tile = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, 64)
    total = tl.zeros((32, 64), tl.float32)
    stop = tl.load(last + tile)
    for block in range(tl.load(first + tile), stop, 32):
        j = block + tl.arange(0, 32)
        distance2 = tl.zeros((32, 64), tl.float32)
        for d in tl.static_range(D):
            a = tl.load(points + (tile * D + d) * 64 + i)
            b = tl.load(mean + d * T + j, mask=j < stop, other=0.0)
            distance2 += (a[None, :] - b[:, None]) * (a[None, :] - b[:, None])
        w = tl.load(weight + j, mask=j < stop, other=0.0)
        total += w[:, None] * tl.exp2(distance2 * (-HALF_LOG2E * STRETCH))
    row_sum = tl.min(tl.sum(total, 0), 0)
    tl.store(row_sums + tile, tl.maximum(row_sum * (1 - SUM_MARGIN), 1.0))


@triton.jit
def _squared_gap(low, high, tile, other, T, inside, D: tl.constexpr):
    """Least squared distance, from below, between points of a tile's box and of others'.

    The same bits whichever of the two is ``tile`` and whichever kernel asks: with `tl.fma` spelled out nothing is left
    for a compiler to contract.
    """
    total = tl.zeros(other.shape, tl.float32)
    for d in tl.static_range(D):
        above = tl.load(low + d * T + other, mask=inside, other=0.0) - tl.load(high + d * T + tile)
        below = tl.load(low + d * T + tile) - tl.load(high + d * T + other, mask=inside, other=0.0)
        gap = tl.maximum(tl.maximum(above, below), 0.0)
        total = tl.fma(gap, gap, total)
    return total * GAP_MARGIN


@triton.jit
def _mass_beyond(cut, low, high, tile, start, stop, size, T, D: tl.constexpr):
    """From above, the kernel mass of tiles whose squared gap is at least ``cut``."""
    mass = tl.zeros((128,), tl.float32)
    for block in range(start, stop, 128):
        j = block + tl.arange(0, 128)
        gap2 = _squared_gap(low, high, tile, j, T, j < stop, D)
        n = tl.load(size + j, mask=j < stop, other=0).to(tl.float32)
        mass += tl.where(gap2 >= cut, n * tl.exp2(gap2 * -HALF_LOG2E), 0.0)
    return tl.sum(mass, 0) * (1 + SUM_MARGIN)


@triton.jit(do_not_specialize=["tolerance", "T"])
def _cut_kernel(low, high, first, last, size, row_sums, cut, reached, tolerance, T, D: tl.constexpr):
    """The least cut that a row tile may use, and the fraction of its row sums that is then left out."""
    tile = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first + tile), tl.load(last + tile)
    row_sum = tl.load(row_sums + tile)
    allowed = tolerance * row_sum
    # beyond it every point of the item together stays below what is allowed; 0.01 is for rounding
    far = tl.log((stop - start) * 64.0 / tl.maximum(allowed, 1e-30)) * 2 + 0.01
    near, far = 0.0, tl.minimum(far, MAX_CUT)
    for _ in range(STEPS):
        middle = (near + far) / 2
        good = _mass_beyond(middle, low, high, tile, start, stop, size, T, D) <= allowed
        near, far = tl.where(good, near, middle), tl.where(good, middle, far)
    tl.store(cut + tile, far)
    tl.store(reached + tile, _mass_beyond(far, low, high, tile, start, stop, size, T, D) / row_sum)


@triton.jit
def _kept(low, high, tile, block, stop, cut, T, D: tl.constexpr):
    """128 column tiles, and which of them the row tile pairs up with."""
    j = block + tl.arange(0, 128)
    gap2 = _squared_gap(low, high, tile, j, T, j < stop, D)
    either = tl.maximum(tl.load(cut + tile), tl.load(cut + j, mask=j < stop, other=0.0))
    return j, (j < stop) & ((gap2 < either) | (j == tile))


@triton.jit(do_not_specialize=["T"])
def _count_kernel(low, high, first, last, size, cut, kept, points, T, D: tl.constexpr):
    """Tiles that one row tile pairs up with, and points in them."""
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.zeros((128,), tl.int32)
    inside = tl.zeros((128,), tl.int32)
    stop = tl.load(last + tile)
    for block in range(tl.load(first + tile), stop, 128):
        j, keep = _kept(low, high, tile, block, stop, cut, T, D)
        tiles += keep.to(tl.int32)
        inside += tl.load(size + j, mask=keep, other=0)
    tl.store(kept + tile, tl.sum(tiles, 0))
    tl.store(points + tile, tl.sum(inside, 0))


@triton.jit(do_not_specialize=["T"])
def _list_kernel(low, high, first, last, cut, wide, offsets, columns, near, T, D: tl.constexpr):
    """The tiles that `_count_kernel` counted: near ones from the front of the row's room, the others from its back."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + tile)
    front, back = begin, tl.load(offsets + tile + 1)
    narrow = tl.load(wide + tile) == 0
    stop = tl.load(last + tile)
    for block in range(tl.load(first + tile), stop, 128):
        j, keep = _kept(low, high, tile, block, stop, cut, T, D)
        close = keep & (tl.load(wide + j, mask=keep, other=1) == 0) & narrow
        rank = tl.cumsum(close.to(tl.int32), 0)  # counted from 1
        tl.store(columns + front + rank - 1, j, mask=close)
        front += tl.max(rank, 0)
        rank = tl.cumsum((keep & (close == 0)).to(tl.int32), 0)
        tl.store(columns + back - rank, j, mask=keep & (close == 0))
        back -= tl.max(rank, 0)
    tl.store(near + tile, (front - begin).to(tl.int32))


def builds(target: Target) -> Iterator[Build]:
    """Every kernel of this file as it is launched."""
    integers = dict.fromkeys(("order", "first", "last", "size", "kept", "columns", "wide", "near"), "*i32")
    scalars = {"level": "i32", "bits": "i32", "T": "i32", "tolerance": "fp32", "offsets": "*i64"}
    kernels = _box_kernel, _key_kernel, _row_sum_kernel, _cut_kernel, _count_kernel, _list_kernel
    for D in (1, 2, 3, 5, 6, 16):
        for kernel in kernels:
            for keys in ("*i32", "*i64") if kernel is _key_kernel else ("*i32",):
                known = {**integers, **scalars, "keys": keys}
                if kernel is _count_kernel:
                    known["points"] = "*i32"
                types = {name: known.get(name, "*fp32") for name in kernel.arg_names if name != "D"}
                warps = {_box_kernel: 1, _list_kernel: _warps(D)}.get(kernel, 4)
                yield Build(kernel, types, {"D": D}, {"num_warps": warps})
