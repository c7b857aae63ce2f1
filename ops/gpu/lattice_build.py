"""The permutohedral lattice of a set of points, built on the device: vertices, neighbours, sorted lists, in Triton.

    y = E f,    E (D + 1, D) the similarity onto the hyperplane of zero sum (../simplex.py).

Every point names the D + 1 vertices of its simplex by integer keys; a sort brings equal keys together, a running count
numbers them, and a binary search of key + step finds a vertex's neighbour along each axis. Nothing waits for the
device: the number of vertices M stays there, and what depends on it has room for the most there can be, R = P (D + 1).
Kernels walk over vertices in strides, so that the room that M leaves free costs nothing but its address.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import simplex
from ..lattice import _DENSE_SIDE, FULL, MOST_MISSING, SIDE_SLOPE, _amplitude
from . import on_device_of
from .target import Build, Target

MAX_ENTRIES = 2**30  # vertices of all points, R: numbers of entries and strides between them then fit 32 bits
MAX_FEATURES = 64  # kernels are unrolled over them; a lattice of so many would not be of use anyway
BLOCK = 128  # points, entries or vertices of a program
PROGRAMS_PER_PROCESSOR = 16  # that walk over the vertices: all a processor can hold of 4 warps each

_SCALE = tl.constexpr(math.sqrt(2.0 / 3.0) / simplex.SPACING)
_DENSE, _SLOPE = tl.constexpr(_DENSE_SIDE), tl.constexpr(SIDE_SLOPE)
_FULL, _MOST = tl.constexpr(FULL), tl.constexpr(MOST_MISSING)


@dataclass(frozen=True)
class Built:
    """A lattice on the device. Entry v P + p of R is vertex v of the simplex of point p.

    Attributes:
        count: ``(1,)`` int32, the number of vertices M.
        weights: ``(D + 1, P)`` barycentric.
        ranks: ``(D + 1, P)`` int8, of each coordinate by falling residual.
        vertices: ``(D + 1, P)`` int32, number of the vertex, from 0.
        numbers: ``(R,)`` int32, of the entries sorted by vertex: number of the vertex, from 1.
        points: ``(R,)`` int32, likewise: the point.
        splat_weights: ``(R,)`` likewise: the weight, times alpha.
        starts: ``(R + 1,)`` int32, where in this order each vertex begins; M + 1 of them are filled.
        neighbours: ``(2, D + 1, room)`` int32, the vertex a step back along each axis and the one a step on, or -1;
            M of each row are filled.
        items: ``(P,)`` int32, the item of each point; None if there is only one.
        vertex_items: ``(room,)`` int32, likewise of each vertex.
        sides: ``(items,)``, weight a of the blur (a, 1, a).
    """

    count: Tensor
    weights: Tensor
    ranks: Tensor
    vertices: Tensor
    numbers: Tensor
    points: Tensor
    splat_weights: Tensor
    starts: Tensor
    neighbours: Tensor
    items: Tensor | None
    vertex_items: Tensor | None
    sides: Tensor


def build(
    features: Tensor,  # (P, D) float32, contiguous
    counts: list[int],
) -> Built:
    """The lattice, without a wait for the device.

    Keys are digits of a mixed radix where every vertex fits 62 bits, else random: the device decides. Random keys can
    collide, with a chance of about M² / 2^65; then all weights become NaN, so that a collision is never silent.

    Raises:
        ValueError: too many points for 32-bit entry numbers.
    """
    (P, D), B, device = features.shape, len(counts), features.device
    R = P * (D + 1)
    if D > MAX_FEATURES:
        raise ValueError(f"at most {MAX_FEATURES} features fit the GPU lattice, got {D}; use the exact engine")
    if R > MAX_ENTRIES:
        raise ValueError(f"at most {MAX_ENTRIES // (D + 1)} points with {D} features fit the GPU lattice, got {P}")

    def fresh(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    items = _items(counts, device)
    low, high = features.aminmax(dim=0)
    digits, hashed = fresh(2, D + 2, dtype=torch.int64), fresh(1)
    weights, ranks = fresh(D + 1, P, dtype=torch.float32), fresh(D + 1, P, dtype=torch.int8)
    keys, checks = fresh(R, dtype=torch.int64), fresh(R, dtype=torch.int64)
    collided = torch.zeros(1, dtype=torch.int32, device=device)
    heads, vertices, points, splat_weights = fresh(R), fresh(D + 1, P), fresh(R), fresh(R, dtype=torch.float32)
    starts, neighbours = fresh(R + 1), fresh(2, D + 1, room(R))
    vertex_keys, vertex_checks = fresh(R, dtype=torch.int64), fresh(R, dtype=torch.int64)
    vertex_last = fresh(R, dtype=torch.int8)
    vertex_items = None if items is None else fresh(R)
    count, sides = fresh(1), fresh(B, dtype=torch.float32)
    tally = torch.zeros(B, 2, dtype=torch.int64, device=device)
    with on_device_of(features):
        _digits_kernel[(1,)](low, high, _random(D + 2, device), digits, hashed, B, simplex.KEY_LIMIT, D=D, num_warps=1)
        sizes = _simplex_sizes(D)
        _simplex_kernel[(triton.cdiv(P, sizes["POINTS"]),)](
            features, items, digits, hashed, keys, checks, weights, ranks, P, **sizes
        )
        ordered, order = torch.sort(keys, stable=True)
        blocks = (triton.cdiv(R, BLOCK),)
        _heads_kernel[blocks](ordered, order, hashed, checks, heads, collided, R, BLOCK=BLOCK)
        numbers = torch.cumsum(heads, 0, dtype=torch.int32)
        _number_kernel[blocks](
            numbers, ordered, order, hashed, checks, collided, items, weights,
            vertices, points, splat_weights, starts, vertex_keys, vertex_checks, vertex_last, vertex_items, neighbours,
            count, P, R, room(R), _amplitude(D), D=D, BLOCK=BLOCK,
        )  # fmt: skip
        _neighbours_kernel[(programs_over(R, BLOCK, features), D + 1)](
            vertex_keys, vertex_checks, vertex_last, vertex_items, digits, hashed, count,
            neighbours[0], neighbours[1], tally, R.bit_length(), room(R), D=D, BLOCK=BLOCK,
        )  # fmt: skip
        _side_kernel[(triton.cdiv(B, BLOCK),)](tally, sides, B, D=D, BLOCK=BLOCK)
    parts = (count, weights, ranks, vertices, numbers, points, splat_weights, starts, neighbours)
    return Built(*parts, items, vertex_items, sides)


def room(R: int) -> int:
    """For up to R neighbours along an axis: rows start at multiples of 64 bytes."""
    return triton.cdiv(R, 16) * 16


def programs_over(capacity: int, block: int, tensor: Tensor) -> int:
    """How many programs walk over at most ``capacity`` vertices, ``block`` of them at a time."""
    processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    return max(1, min(triton.cdiv(capacity, block), PROGRAMS_PER_PROCESSOR * processors))


def _simplex_sizes(D: int) -> dict[str, int]:
    lanes = triton.next_power_of_2(D + 1)
    return {"D": D, "POINTS": max(1, 1024 // lanes), "LANES": lanes}  # eight numbers of each kind to a thread


def _items(counts: list[int], device: torch.device) -> Tensor | None:
    """Of each point, its item; made of fills, which a CUDA graph can capture, unlike a list copied to the device."""
    if len(counts) == 1:
        return None
    if min(counts) == max(counts):
        return torch.arange(len(counts), dtype=torch.int32, device=device).repeat_interleave(counts[0])
    return torch.cat([torch.full((n,), i, dtype=torch.int32, device=device) for i, n in enumerate(counts)])


def _random(n: int, device: torch.device) -> Tensor:
    """``(2, n)`` random 64-bit digits of keys and of check keys, made on the device: a hash of their place."""
    x = torch.arange(1, 2 * n + 1, device=device)
    for shift, factor in ((31, 0x1B873593D1B54A35), (29, 0x2545F4914F6CDD1D), (30, 0x369DEA0F31A53F85)):
        x = x * factor  # modulo 2^64
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # a shift that brings no signs in
    return x.view(2, n)


@triton.jit(do_not_specialize=["B", "limit"])
def _digits_kernel(low, high, random, digits, hashed, B, limit, D: tl.constexpr):
    """The worth of each digit of a key: item, remainder, and the coordinates but one, divided by D + 1.

    Mixed radix, by interval arithmetic on the box of the features, (D,) each; or random ones, (2, D + 2), where that
    needs more than ``limit``. Coordinates may be negative: only differences between keys matter.
    """
    worth = tl.full((), 1, tl.int64)
    total = tl.full((), 1.0, tl.float64)
    for i in tl.static_range(D):
        j = D - 1 - i
        least, greatest = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        for k in tl.static_range(D):  # y_j as in _simplex_kernel
            if k >= j - 1:
                scale: tl.constexpr = (_SCALE if k >= j else -j * _SCALE) / ((k + 1) * (k + 2)) ** 0.5
                a = tl.load(low + k).to(tl.float64) * scale
                b = tl.load(high + k).to(tl.float64) * scale
                least += tl.minimum(a, b)
                greatest += tl.maximum(a, b)
        # rounding and wrapping go 1 beyond and a simplex 1 more, as do neighbours; the last is for the roundings above
        size = tl.ceil(greatest) - tl.floor(least) + 9
        tl.store(digits + 2 + j, worth)
        worth *= tl.where(size < 1e9, size, 1.0).to(tl.int64)  # otherwise nothing fits, NaN least of all
        total *= size
    tl.store(digits + 1, worth)
    tl.store(digits, worth * (D + 1))
    fits = total * (D + 1) * B < limit  # false for NaN
    tl.store(hashed, 1 - fits.to(tl.int32))
    for i in tl.static_range(D + 2):
        tl.store(digits + D + 2 + i, tl.load(random + D + 2 + i))
        if not fits:
            tl.store(digits + i, tl.load(random + i))


@triton.jit
def _store_keys(out, digits, item, corner, rank, p, inside, P, D: tl.constexpr, LANES: tl.constexpr):
    """Keys of the vertices of each point: from one to the next is a step along the axis with the next rank."""
    j = tl.arange(0, LANES)[None, :]
    remainder = tl.load(digits + 1)
    one = tl.load(digits + 2 + j, mask=j < D, other=0)  # the last coordinate is implied
    key = item * tl.load(digits) + tl.sum(corner * one, 1)
    tl.store(out + p, key, mask=inside)
    for v in range(1, D + 1):
        key += remainder - tl.sum(tl.where(rank == D + 1 - v, one, 0), 1)
        out += P
        tl.store(out + p, key, mask=inside)


@triton.jit(do_not_specialize=["P"])
def _simplex_kernel(
    features, items, digits, hashed,  # (P, D), (P,) or None, (2, D + 2) int64, (1,)
    keys, checks, weights, ranks,  # (D + 1, P) int64, int64, float32, int8
    P, D: tl.constexpr, POINTS: tl.constexpr, LANES: tl.constexpr,  # LANES > D
):  # fmt: skip
    """The simplex of each point as in ``simplex.locate``, and the keys of its vertices.

    In float64: features reach 10^6, where float32 would leave the weights only four bits. A sum over lanes of which all
    but one are 0 picks that one exactly.
    """
    p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = p < P
    j = tl.arange(0, LANES)[None, :]  # coordinate
    y = tl.zeros((POINTS, LANES), tl.float64)
    for k in tl.static_range(D):  # y_j = sum_{k >= j} g_k - j g_{j-1} with g_k = f_k scale / ((k + 1) (k + 2))^½
        f = tl.load(features + p * D + k, mask=inside, other=0.0).to(tl.float64)[:, None]
        g = f * (_SCALE / ((k + 1) * (k + 2)) ** 0.5)
        y += tl.where(j <= k, g, tl.where(j == k + 1, -(k + 1) * g, 0.0))
    good = tl.sum((tl.abs(y) < 1073741824.0).to(tl.int32), 1) == LANES  # false for NaN
    y = tl.where(good[:, None], y, 0.0)
    nearest = (y + 6755399441055744.0) - 6755399441055744.0  # 1.5 2^52: rounds halves to even
    residual = y - nearest
    rank = tl.sum(nearest.to(tl.int32), 1)[:, None] + tl.zeros_like(j)  # off the hyperplane by that much
    for i in range(D + 1):
        other = tl.sum(tl.where(j == i, residual, 0.0), 1)[:, None]
        rank += ((other > residual) | ((other == residual) & (i < j))).to(tl.int32)  # ties by position
    wrap = (rank < 0).to(tl.int32) - (rank > D).to(tl.int32)
    rank = tl.where(j <= D, rank + wrap * (D + 1), -1)
    corner = nearest.to(tl.int64) + wrap
    residual -= wrap.to(tl.float64)
    tl.store(ranks + j * P.to(tl.int64) + p[:, None], rank.to(tl.int8), mask=inside[:, None] & (j <= D))

    smaller = tl.sum(tl.where(rank == D, residual, 0.0), 1)
    weight = smaller - tl.sum(tl.where(rank == 0, residual, 0.0), 1) + 1.0
    tl.store(weights + p, tl.where(good, weight, float("nan")).to(tl.float32), mask=inside)
    for v in range(1, D + 1):
        larger = tl.sum(tl.where(rank == D - v, residual, 0.0), 1)
        weights += P
        tl.store(weights + p, tl.where(good, larger - smaller, float("nan")).to(tl.float32), mask=inside)
        smaller = larger

    item = tl.zeros((POINTS,), tl.int64)
    if items is not None:
        item += tl.load(items + p, mask=inside, other=0)
    _store_keys(keys, digits, item, corner, rank, p, inside, P, D, LANES)
    if tl.load(hashed) > 0:
        _store_keys(checks, digits + (D + 2), item, corner, rank, p, inside, P, D, LANES)


@triton.jit(do_not_specialize=["R"])
def _heads_kernel(
    keys, order, hashed, checks, heads, collided,  # (R,) int64 sorted, (R,) int64, (1,), (R,) int64, (R,) int32, (1,)
    R, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 where a new vertex begins; notes where two vertices share a key."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < R
    previous = tl.maximum(e - 1, 0)
    same = tl.load(keys + e, mask=inside, other=0) == tl.load(keys + previous, mask=inside, other=0)
    same = same & (e > 0)
    tl.store(heads + e, 1 - same.to(tl.int32), mask=inside)
    if tl.load(hashed) > 0:
        own = tl.load(checks + tl.load(order + e, mask=inside, other=0), mask=inside, other=0)
        other = tl.load(checks + tl.load(order + previous, mask=inside, other=0), mask=inside, other=0)
        # whoever writes, writes 1
        tl.store(collided + tl.zeros((BLOCK,), tl.int32), 1, mask=inside & same & (own != other))


@triton.jit(do_not_specialize=["P", "R"])
def _number_kernel(
    numbers, keys, order, hashed, checks, collided, items, weights,  # all as in Built and _heads_kernel
    vertices, points, splat_weights, starts,  # Built
    vertex_keys, vertex_checks, vertex_last, vertex_items,  # (R,): of each vertex; last: its remainder is D
    before, count,  # neighbours a step back, only emptied here; Built
    P, R, room, amplitude, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything that follows from the numbers of the vertices, entry by entry in sorted order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < R
    number = tl.load(numbers + e, mask=inside, other=1)
    n = (number - 1).to(tl.int64)
    head = inside & ((e == 0) | (tl.load(numbers + tl.maximum(e - 1, 0), mask=inside, other=0) != number))
    entry = tl.load(order + e, mask=inside, other=0)
    v = entry.to(tl.int32) // P
    p = entry.to(tl.int32) - v * P
    weight = tl.load(weights + entry, mask=inside, other=0.0)
    if tl.load(hashed) > 0:
        if tl.load(collided) > 0:
            weight = tl.full((BLOCK,), float("nan"), tl.float32)
            tl.store(weights + entry, weight, mask=inside)
        tl.store(vertex_checks + n, tl.load(checks + entry, mask=head, other=0), mask=head)
    tl.store(vertices + entry, number - 1, mask=inside)
    tl.store(points + e, p, mask=inside)
    tl.store(splat_weights + e, weight * amplitude, mask=inside)
    tl.store(starts + n, e.to(tl.int32), mask=head)
    tl.store(vertex_keys + n, tl.load(keys + e, mask=head, other=0), mask=head)
    tl.store(vertex_last + n, (v == D).to(tl.int8), mask=head)
    if items is not None:
        tl.store(vertex_items + n, tl.load(items + p, mask=head, other=0), mask=head)
    for axis in tl.static_range(D + 1):
        tl.store(before + axis * room.to(tl.int64) + n, -1, mask=head)
    final = e == R - 1
    tl.store(count + tl.zeros((BLOCK,), tl.int32), number, mask=final)
    tl.store(starts + n + 1, number * 0 + R, mask=final)


@triton.jit(do_not_specialize=["steps"])
def _neighbours_kernel(
    vertex_keys, vertex_checks, vertex_last, vertex_items,  # as in _number_kernel
    digits, hashed, count, before, after,  # as in _simplex_kernel; Built: count, neighbours
    tally,  # (items, 2) int64: steps that lead to a vertex, vertices
    steps, room, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Along one axis, the vertex a step on from each vertex, by binary search; a step back is that turned round."""
    axis = tl.program_id(1)
    M = tl.load(count)
    remainder = tl.load(digits + 1)
    one = tl.load(digits + 2 + axis, mask=axis < D, other=0)
    ones = tl.load(digits + 2)
    for j in tl.static_range(1, D):
        ones += tl.load(digits + 2 + j)
    for start in range(tl.program_id(0) * BLOCK, M, tl.num_programs(0) * BLOCK):
        m = start + tl.arange(0, BLOCK)
        inside = m < M
        last = tl.load(vertex_last + m, mask=inside, other=0) > 0
        # from remainder D a step leads back to 0 and adds 1 to every coordinate
        key = tl.load(vertex_keys + m, mask=inside, other=0)
        wanted = key + tl.where(last, ones - D * remainder, remainder) - one
        low = tl.zeros((BLOCK,), tl.int32)
        high = low + M
        for _ in range(steps):  # until low is the first vertex whose key is not below
            middle = (low + high) // 2
            more = low < high
            below = tl.load(vertex_keys + middle, mask=more, other=0) < wanted
            low = tl.where(more & below, middle + 1, low)
            high = tl.where(more & (below == 0), middle, high)
        found = inside & (low < M)
        found = found & (tl.load(vertex_keys + low, mask=found, other=0) == wanted)
        if tl.load(hashed) > 0:
            check_one = tl.load(digits + (D + 2) + 2 + axis, mask=axis < D, other=0)
            check_remainder = tl.load(digits + (D + 2) + 1)
            check_ones = tl.load(digits + (D + 2) + 2)
            for j in tl.static_range(1, D):
                check_ones += tl.load(digits + (D + 2) + 2 + j)
            check = tl.load(vertex_checks + m, mask=inside, other=0)
            check += tl.where(last, check_ones - D * check_remainder, check_remainder) - check_one
            found = found & (tl.load(vertex_checks + low, mask=found, other=0) == check)
        row = axis.to(tl.int64) * room
        tl.store(after + row + m, tl.where(found, low, -1), mask=inside)
        tl.store(before + row + low, m, mask=found)
        ways = found.to(tl.int64)
        vertices = (inside & (axis == 0)).to(tl.int64)  # counted once
        item = tl.zeros((BLOCK,), tl.int32)
        if vertex_items is not None:
            item = tl.load(vertex_items + m, mask=inside, other=0)
        first = tl.min(tl.where(inside, item, 2147483647), 0)
        # integers: the sums do not depend on who comes first. Keys begin with the item, so blocks rarely mix them.
        if first == tl.max(tl.where(inside, item, 0), 0):
            tl.atomic_add(tally + 2 * first, tl.sum(ways, 0))
            tl.atomic_add(tally + 2 * first + 1, tl.sum(vertices, 0))
        else:
            tl.atomic_add(tally + 2 * item, ways, mask=inside)
            tl.atomic_add(tally + 2 * item + 1, vertices, mask=inside)


@triton.jit(do_not_specialize=["B"])
def _side_kernel(tally, sides, B, D: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of the blur for each item, heavier where many neighbours are missing: ``lattice._side_weight``."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ways = tl.load(tally + 2 * b, mask=b < B, other=0).to(tl.float32)
    vertices = tl.load(tally + 2 * b + 1, mask=b < B, other=0).to(tl.float32)
    present = ways / ((D + 1) * tl.maximum(vertices, 1.0))
    side = tl.minimum(tl.maximum(-(present - _FULL), 0.0), _MOST) * _SLOPE + _DENSE  # tensor first, for the interpreter
    tl.store(sides + b, side, mask=b < B)


def builds(target: Target) -> Iterator[Build]:
    """Every kernel of the build as it ships, for a few dimensions."""
    options = {"num_warps": 4, "num_stages": 3}  # Triton's defaults
    key = {"digits": "*i64", "hashed": "*i32"}
    for D in (1, 2, 3, 5, 6, 16):
        sizes = {"D": D, "BLOCK": BLOCK}
        types = {"low": "*fp32", "high": "*fp32", "random": "*i64", **key, "B": "i32", "limit": "fp32"}
        yield Build(_digits_kernel, types, {"D": D}, {"num_warps": 1})
        for items in ({}, {"items": "*i32"}):
            of_vertices = {f"vertex_{name}": kind for name, kind in items.items()}
            types = {"features": "*fp32", **items, **key, "keys": "*i64", "checks": "*i64", "weights": "*fp32"}
            types |= {"ranks": "*i8", "P": "i32"}
            yield Build(_simplex_kernel, types, _simplex_sizes(D) | _absent(types, "items"), options)
            types = {"numbers": "*i32", "keys": "*i64", "order": "*i64", "hashed": "*i32", "checks": "*i64"}
            types |= {"collided": "*i32", **items, "weights": "*fp32", "vertices": "*i32", "points": "*i32"}
            types |= {"splat_weights": "*fp32", "starts": "*i32", "vertex_keys": "*i64", "vertex_checks": "*i64"}
            types |= {"vertex_last": "*i8", **of_vertices, "before": "*i32", "count": "*i32"}
            types |= {"P": "i32", "R": "i32", "room": "i32", "amplitude": "fp32"}
            yield Build(_number_kernel, types, sizes | _absent(types, "items", "vertex_items"), options)
            types = {"vertex_keys": "*i64", "vertex_checks": "*i64", "vertex_last": "*i8", **of_vertices, **key}
            types |= {
                "count": "*i32",
                "before": "*i32",
                "after": "*i32",
                "tally": "*i64",
                "steps": "i32",
                "room": "i32",
            }
            yield Build(_neighbours_kernel, types, sizes | _absent(types, "vertex_items"), options)
        yield Build(_side_kernel, {"tally": "*i64", "sides": "*fp32", "B": "i32"}, sizes, options)
    types = {"keys": "*i64", "order": "*i64", "hashed": "*i32", "checks": "*i64", "heads": "*i32", "collided": "*i32"}
    yield Build(_heads_kernel, types | {"R": "i32"}, {"BLOCK": BLOCK}, options)


def _absent(types: dict[str, str], *names: str) -> dict[str, None]:
    return {name: None for name in names if name not in types}
