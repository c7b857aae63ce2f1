"""Filtering on the permutohedral lattice in Triton.

    K = alpha W B_D ... B_1 B_0 W^T

as in ../lattice.py: splat W^T, a blur (a, 1, a) along each of the D + 1 axes, slice W; the same operator, to float32
rounding. Each is one kernel that writes every number once, summed in a fixed order, so that the same input gives the
same bits. Channels go through in groups narrow enough that two copies of the lattice stay small.

The splat sums over entries sorted by vertex, in chunks of equal length however many points a vertex has. A running sum
that begins anew with every vertex goes down those of a chunk, within one warp; what a vertex has beyond the chunk in
which it begins is carried to it by a second kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lattice import _amplitude
from . import lattice_build, on_device_of
from .lattice_build import BLOCK, Built, _absent, build, programs_over, room
from .target import TARGETS, Build, Target, target_of
from .tune import pick

MAX_WIDTH = 32  # columns of the lattice that are filtered together
WIDTHS = (4, 8, 16, 24, 32)  # that the kernels are compiled for up to there; rows of whole 16 bytes
CARRIES = 32  # chunks added at a time to a vertex that spans many

# entries of a chunk; vertices and points of a program, and its warps
CONFIGS: dict[str, list[dict[str, int]]] = {
    name: [
        {"ENTRIES": 64, "VERTICES": 16, "POINTS": 16, "num_warps": 1},
        {"ENTRIES": 64, "VERTICES": 64, "POINTS": 32, "num_warps": 4},
        {"ENTRIES": 32, "VERTICES": 32, "POINTS": 16, "num_warps": 2},
    ]
    for name in TARGETS
}


class TritonLatticeEngine:
    """The lattice of a set of points, built once and applied to any number of values.

    Args:
        features: ``(P, D)`` float32, contiguous and finite, each column divided by its bandwidth.
        counts: the number of points of each item; items follow one another in ``features`` and never mix.

    A point whose features are not finite ends as NaN, and so do points near it; a value that is not finite reaches its
    neighbours alone.
    """

    def __init__(self, features: Tensor, counts: list[int]) -> None:
        self._features, self.dimension = features, features.shape[1]
        self._built = build(features, counts)
        self._target = target_of(features)

    def plan(self) -> list[Tensor]:
        """The tensors that `from_plan` makes the same engine from; what a single item does without is empty."""
        b = self._built
        items = [tensor if tensor is not None else b.count.new_empty(0) for tensor in (b.items, b.vertex_items)]
        points = [b.count, b.weights.view(-1), b.ranks.view(-1), b.vertices.view(-1)]
        entries = [b.numbers, b.points, b.splat_weights, b.starts, b.neighbours.view(-1)]
        return [*points, *entries, *items, b.sides]

    @classmethod
    def from_plan(
        cls, plan: Sequence[Tensor], features: Tensor, counts: list[int], precision: object = None
    ) -> TritonLatticeEngine:
        """The engine that was built from these features and counts."""
        (P, D), engine = features.shape, cls.__new__(cls)
        count, weights, ranks, vertices = plan[:4]
        numbers, points, splat_weights, starts, neighbours = plan[4:9]
        items, vertex_items, sides = plan[9:]
        engine._features, engine.dimension, engine._target = features, D, target_of(features)
        engine._built = Built(
            count,
            weights.view(D + 1, P),
            ranks.view(D + 1, P),
            vertices.view(D + 1, P),
            numbers,
            points,
            splat_weights,
            starts,
            neighbours.view(2, D + 1, -1),
            items if len(counts) > 1 else None,
            vertex_items if len(counts) > 1 else None,
            sides,
        )
        return engine

    @staticmethod
    def plan_sizes(P: int, D: int, items: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor of the plan the largest shape, and its dtype; None for that of the features."""
        R, several = P * (D + 1), items > 1
        points = [((1,), torch.int32), ((R,), None), ((R,), torch.int8), ((R,), torch.int32)]
        entries = [((R,), torch.int32), ((R,), torch.int32), ((R,), None), ((R + 1,), torch.int32)]
        vertices = [((2 * (D + 1) * room(R),), torch.int32)]
        of_items = [((P if several else 0,), torch.int32), ((R if several else 0,), torch.int32), ((items,), None)]
        return [*points, *entries, *vertices, *of_items]

    @property
    def num_vertices(self) -> int:
        """M. Waits for the device."""
        return int(self._built.count)

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """``(P, C)`` to ``(P, C)``: K values, or K^T values."""
        values, out = values.contiguous(), torch.empty_like(values, memory_format=torch.contiguous_format)
        C = values.shape[1]
        for start, stop in _groups(C, MAX_WIDTH):
            width = _width(stop - start)

            def run(config: dict[str, int], start: int = start, stop: int = stop, width: int = width) -> None:
                lattice = self._send(values, None, start, stop, width, transpose, config)
                self._receive(lattice, out, start, stop, width, config)

            with on_device_of(values):
                run(self._pick("lattice", width, run))
        return out

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * K values)`` with respect to the features, for the exact kernel.

        ``dF_i = sum_j K_ij g_i·v_j (f_j - f_i) + sum_j K_ji v_i·g_j (f_j - f_i)`` with the lattice for K, as in
        ../lattice.py, but of all channels: to leave out directions without energy means to wait for the device.
        """
        values, grad = values.contiguous(), grad.contiguous()
        f = self._features - self._features.mean(0)
        factors = torch.cat([torch.ones_like(f[:, :1]), f], 1)  # (P, D + 1): what each value is carried with
        total = torch.zeros_like(f)
        D1 = self.dimension + 1
        for start, stop in _groups(values.shape[1], max(1, MAX_WIDTH // D1)):
            width = _width((stop - start) * D1)
            with on_device_of(values):
                config = CONFIGS[self._target.name][0]  # untuned: the last kernel adds to what is there
                for sent, heard, transpose in ((values, grad, False), (grad, values, True)):
                    lattice = self._send(sent, factors, start, stop, width, transpose, config)
                    self._pull(lattice, heard, factors, total, start, stop, width, config)
        return total

    def diagonal(self) -> Tensor:
        """``(P,)``: K_ii of what ``apply`` computes, the weight with which each point hears itself."""
        b, P = self._built, len(self._features)
        out = self._features.new_empty(P)
        with on_device_of(out):
            _diagonal_kernel[(triton.cdiv(P, BLOCK),)](
                b.vertices, b.weights, b.ranks, b.neighbours, b.items, b.sides, out,
                P, b.neighbours.shape[2], _amplitude(self.dimension), self.dimension, BLOCK=BLOCK, num_warps=1,
            )  # fmt: skip
        return out

    def _pick(self, name: str, width: int, run: Callable[[dict[str, int]], None]) -> dict[str, int]:
        key = (self.dimension, width, self._built.numbers.numel().bit_length(), self._built.items is not None)
        return pick(name, key, CONFIGS[self._target.name], run, self._features)

    def _send(
        self,
        values: Tensor,  # (P, C)
        factors: Tensor | None,  # (P, D + 1)
        start: int,
        stop: int,
        width: int,
        transpose: bool,
        config: dict[str, int],
    ) -> Tensor:  # (R, width)
        """Splat and blur channels start to stop, each times each factor: in M rows, what all points will hear."""
        b, D1 = self._built, self.dimension + 1
        R, C = b.numbers.numel(), values.shape[1]
        block, entries, vertices = triton.next_power_of_2(width), config["ENTRIES"], config["VERTICES"]
        chunks = triton.cdiv(R, entries)
        lattice, other = values.new_empty(R, width), values.new_empty(R, width)
        carry = values.new_empty(chunks, width)
        _splat_kernel[(chunks,)](
            values, factors, b.points, b.splat_weights, b.numbers, lattice, carry, R, C, start, stop,
            FACTORS=1 if factors is None else D1, ENTRIES=entries, WIDTH=width, LANES=block,
            num_warps=_splat_warps(block, self._target),
        )  # fmt: skip
        _carry_kernel[(chunks,)](
            b.numbers, b.starts, carry, lattice, R, ENTRIES=entries, CARRIES=CARRIES, WIDTH=width, LANES=block,
            num_warps=1,
        )  # fmt: skip
        programs = (programs_over(R, vertices, values),)
        for axis in reversed(range(D1)) if transpose else range(D1):
            _blur_kernel[programs](
                lattice, other, b.neighbours[0, axis], b.neighbours[1, axis], b.vertex_items, b.sides, b.count,
                VERTICES=vertices, WIDTH=width, LANES=block, num_warps=config["num_warps"],
            )  # fmt: skip
            lattice, other = other, lattice
        return lattice

    def _receive(self, lattice: Tensor, out: Tensor, start: int, stop: int, width: int, config: dict[str, int]) -> None:
        """Slice into channels start to stop of ``out (P, C)``."""
        b, (P, C) = self._built, out.shape
        _slice_kernel[(triton.cdiv(P, config["POINTS"]),)](
            lattice, b.vertices, b.weights, out, P, C, start, stop,
            D=self.dimension, POINTS=config["POINTS"], WIDTH=width, LANES=triton.next_power_of_2(width),
            num_warps=config["num_warps"],
        )  # fmt: skip

    def _pull(
        self,
        lattice: Tensor,  # (R, width), the sent channels times each factor
        heard: Tensor,  # (P, C)
        factors: Tensor,  # (P, D + 1)
        total: Tensor,  # (P, D), added to
        start: int,
        stop: int,
        width: int,
        config: dict[str, int],
    ) -> None:
        """Add sum_j K_ij heard_i·sent_j (f_j - f_i), over channels start to stop."""
        b, (P, C) = self._built, heard.shape
        _pull_kernel[(triton.cdiv(P, config["POINTS"]),)](
            lattice, b.vertices, b.weights, heard, factors, total, P, C, start, stop,
            D=self.dimension, POINTS=config["POINTS"], WIDTH=width, LANES=triton.next_power_of_2(width),
            num_warps=config["num_warps"],
        )  # fmt: skip


def _groups(C: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of channels, as few and as equal as can be, none of more than ``most``."""
    groups = triton.cdiv(C, most)
    return ((C * i // groups, C * (i + 1) // groups) for i in range(groups))


def _width(columns: int) -> int:
    """Of the lattice's rows, room for that many columns; only features of more than 31 dimensions pass MAX_WIDTH."""
    return next((width for width in WIDTHS if width >= columns), triton.cdiv(columns, 8) * 8)


def _factored_width(D: int) -> int:
    """Of the rows when the gradient of D features fills them as well as it can."""
    return _width(max(1, MAX_WIDTH // (D + 1)) * (D + 1))


def _splat_warps(lanes: int, target: Target) -> int:
    """One, but for the wide rows of more features than a lattice is good for, whose registers are too many for it."""
    return 1 if lanes <= 32 else 2 * lanes // target.warp_size


@triton.jit
def _same_vertex(number, total, next_number, next_total):
    """Joins two neighbouring runs of sorted entries: the number of the last vertex, and what it has in both."""
    return next_number, next_total + tl.where(number == next_number, total, 0.0)


@triton.jit(do_not_specialize=["R", "start", "stop"])
def _splat_kernel(
    values, factors,  # (P, C), (P, FACTORS) or None
    points, weights, numbers,  # Built: points, splat_weights, numbers
    lattice, carry,  # (R, WIDTH), (chunks, WIDTH)
    R, C, start, stop, FACTORS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program sums one chunk of the sorted entries; column q is channel start + q // FACTORS times a factor."""
    chunk = tl.program_id(0)
    e = chunk * ENTRIES + tl.arange(0, ENTRIES)
    inside = e < R
    number = tl.load(numbers + e, mask=inside, other=0)
    ends = inside & (tl.load(numbers + e + 1, mask=e + 1 < R, other=0) != number)
    ends = ends | (e == tl.minimum((chunk + 1) * ENTRIES, R) - 1)
    # the vertex of the chunk before, with which this one may go on
    earlier = tl.load(numbers + chunk * ENTRIES - 1, mask=chunk > 0, other=0)
    point = tl.load(points + e, mask=inside, other=0).to(tl.int64)
    weight = tl.load(weights + e, mask=inside, other=0.0)
    q = tl.arange(0, LANES)
    channel = start + q // FACTORS
    used = inside[:, None] & (channel < stop)[None, :]
    v = tl.load(values + point[:, None] * C + channel[None, :], mask=used, other=0.0)  # [ENTRIES, LANES]
    if factors is not None:
        v *= tl.load(factors + point[:, None] * FACTORS + (q % FACTORS)[None, :], mask=used, other=0.0)
    everywhere = number[:, None] + tl.zeros((ENTRIES, LANES), tl.int32)
    _, total = tl.associative_scan((everywhere, weight[:, None] * v), 0, _same_vertex)
    row = lattice + (number - 1).to(tl.int64) * WIDTH
    row = tl.where(number == earlier, carry + chunk.to(tl.int64) * WIDTH, row)
    tl.store(row[:, None] + q[None, :], total, mask=ends[:, None] & (q < WIDTH)[None, :])


@triton.jit(do_not_specialize=["R"])
def _carry_kernel(
    numbers, starts, carry, lattice, R,
    ENTRIES: tl.constexpr, CARRIES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program completes the vertex that begins in its chunk and goes on beyond it, if there is one."""
    chunk = tl.program_id(0)
    end = (chunk + 1) * ENTRIES
    n = tl.load(numbers + tl.minimum(end, R) - 1).to(tl.int64) - 1
    stop = tl.load(starts + n + 1)
    if (tl.load(starts + n) >= chunk * ENTRIES) & (stop > end):
        q = tl.arange(0, LANES)[None, :]
        total = tl.zeros((CARRIES, LANES), tl.float32)
        for first in range(chunk + 1, tl.cdiv(stop, ENTRIES), CARRIES):
            row = first + tl.arange(0, CARRIES)[:, None]
            there = (row * ENTRIES < stop) & (q < WIDTH)
            total += tl.load(carry + row.to(tl.int64) * WIDTH + q, mask=there, other=0.0)
        q = tl.arange(0, LANES)
        at = lattice + n * WIDTH + q
        tl.store(at, tl.load(at, mask=q < WIDTH, other=0.0) + tl.sum(total, 0), mask=q < WIDTH)


@triton.jit
def _blur_kernel(
    source, out, before, after, vertex_items, sides, count,  # (R, WIDTH) twice; Built, the axis's rows
    VERTICES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One axis: out = source + a (source a step back + source a step on), missing vertices counting as 0."""
    M = tl.load(count)
    q = tl.arange(0, LANES)[None, :]
    column = q < WIDTH
    for start in range(tl.program_id(0) * VERTICES, M, tl.num_programs(0) * VERTICES):
        m = start + tl.arange(0, VERTICES)
        inside = m < M
        back = tl.load(before + m, mask=inside, other=-1).to(tl.int64)[:, None]
        on = tl.load(after + m, mask=inside, other=-1).to(tl.int64)[:, None]
        if vertex_items is None:
            side = tl.load(sides)
        else:
            side = tl.load(sides + tl.load(vertex_items + m, mask=inside, other=0))[:, None]
        row = m.to(tl.int64)[:, None] * WIDTH + q
        own = tl.load(source + row, mask=inside[:, None] & column, other=0.0)
        x = tl.load(source + back * WIDTH + q, mask=(back >= 0) & column, other=0.0)
        x += tl.load(source + on * WIDTH + q, mask=(on >= 0) & column, other=0.0)
        tl.store(out + row, own + side * x, mask=inside[:, None] & column)


@triton.jit
def _heard(
    lattice, vertices, weights, p, P, D: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    """What points p hear: the barycentric mean over their vertices, [POINTS, LANES]."""
    inside = p < P
    q = tl.arange(0, LANES)[None, :]
    total = tl.zeros((POINTS, LANES), tl.float32)
    for _ in tl.static_range(D + 1):  # unrolled, so that all rows are on their way at once
        m = tl.load(vertices + p, mask=inside, other=0).to(tl.int64)[:, None]
        weight = tl.load(weights + p, mask=inside, other=0.0)[:, None]
        total += weight * tl.load(lattice + m * WIDTH + q, mask=inside[:, None] & (q < WIDTH), other=0.0)
        vertices += P
        weights += P
    return total


@triton.jit(do_not_specialize=["P", "start", "stop"])
def _slice_kernel(
    lattice, vertices, weights, out,  # (R, WIDTH), Built, (P, C)
    P, C, start, stop, D: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What each point hears, into channels start to stop."""
    p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    total = _heard(lattice, vertices, weights, p, P, D, POINTS, WIDTH, LANES)
    channel = start + tl.arange(0, LANES)[None, :]
    tl.store(out + p[:, None] * C + channel, total, mask=(p < P)[:, None] & (channel < stop))


@triton.jit(do_not_specialize=["P", "start", "stop"])
def _pull_kernel(
    lattice, vertices, weights,  # (R, WIDTH), Built
    heard, factors, total,  # (P, C), (P, D + 1): 1 and f, (P, D) added to
    P, C, start, stop, D: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """total_i += sum_j K_ij heard_i·sent_j (f_j - f_i): column q holds channel start + q // (D + 1) of the sent."""
    p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = p < P
    q = tl.arange(0, LANES)[None, :]
    channel = start + q // (D + 1)
    own = tl.load(heard + p[:, None] * C + channel, mask=inside[:, None] & (channel < stop), other=0.0)
    x = own * _heard(lattice, vertices, weights, p, P, D, POINTS, WIDTH, LANES)
    weight = tl.sum(tl.where(q % (D + 1) == 0, x, 0.0), 1)  # sum_j K_ij heard_i·sent_j
    for k in range(D):
        moment = tl.sum(tl.where(q % (D + 1) == k + 1, x, 0.0), 1)
        f = tl.load(factors + p * (D + 1) + k + 1, mask=inside, other=0.0)
        at = total + p * D + k
        tl.store(at, tl.load(at, mask=inside, other=0.0) + (moment - weight * f), mask=inside)


@triton.jit(do_not_specialize=["P"])
def _diagonal_kernel(
    vertices, weights, ranks, neighbours, items, sides, out,  # Built, (P,)
    P, room, amplitude, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """K_ii, by tracing the paths between the vertices of a point's own simplex.

    A value that starts at vertex k of its simplex reaches vertex l either by one step on along every axis that
    separates them, or by one step back along every other axis; all the axes together lead back to the start.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < P
    stride = P.to(tl.int64)
    item = tl.zeros((BLOCK,), tl.int32)
    if items is not None:
        item = tl.load(items + p, mask=inside, other=0)
    side = tl.load(sides + item)
    total = tl.zeros((BLOCK,), tl.float32)
    for pair in range((D + 1) * (D + 1)):
        k, other = pair // (D + 1), pair % (D + 1)
        low, high = tl.minimum(k, other), tl.maximum(k, other)
        own = tl.load(vertices + k * stride + p, mask=inside, other=0)
        wanted = tl.load(vertices + other * stride + p, mask=inside, other=0)
        weight = tl.load(weights + k * stride + p, mask=inside, other=0.0)
        weight *= tl.load(weights + other * stride + p, mask=inside, other=0.0)
        # way 0: the axes between them; way 1: the others, the other way; way 2, if k = l: all, the other way again
        for way in range(2 + (k == other)):
            on = tl.where((other > k) != (way == 1), D + 1, 0)
            at, factor = own, weight
            row, rank_row = neighbours + on * room.to(tl.int64), ranks + p
            for _ in range(D + 1):
                rank = tl.load(rank_row, mask=inside, other=0)
                along = ((rank > D - high) & (rank <= D - low)) == (way == 0)
                step = tl.load(row + at, mask=inside & along & (at >= 0), other=-1)
                at = tl.where(along, step, at)
                factor = tl.where(along, factor * side, factor)
                row += room
                rank_row += P
            total += tl.where(at == wanted, factor, 0.0)
    tl.store(out + p, total * amplitude, mask=inside)


def builds(target: Target) -> Iterator[Build]:
    """Every configuration that ships, for a few dimensions."""
    yield from lattice_build.builds(target)
    point_types = {"vertices": "*i32", "weights": "*fp32"}
    ranges = {"P": "i32", "C": "i32", "start": "i32", "stop": "i32"}
    for config in CONFIGS[target.name]:
        options = {"num_warps": config["num_warps"]}
        for width in WIDTHS:
            lanes = triton.next_power_of_2(width)
            for D in (1, 2, 3, 5, 6, 16):
                if _factored_width(D) == width:
                    types = {"lattice": "*fp32", **point_types, "heard": "*fp32", "factors": "*fp32", "total": "*fp32"}
                    constants: dict[str, Any] = {"D": D, "POINTS": config["POINTS"], "WIDTH": width, "LANES": lanes}
                    yield Build(_pull_kernel, types | ranges, constants, options)
            for D in (1, 2, 3, 5, 6, 16):
                types = {"lattice": "*fp32", **point_types, "out": "*fp32", **ranges}
                constants = {"D": D, "POINTS": config["POINTS"], "WIDTH": width, "LANES": lanes}
                yield Build(_slice_kernel, types, constants, options)
            for items in ({}, {"vertex_items": "*i32"}):
                types = {"source": "*fp32", "out": "*fp32", "before": "*i32", "after": "*i32", **items}
                types |= {"sides": "*fp32", "count": "*i32"}
                constants = {"VERTICES": config["VERTICES"], "WIDTH": width, "LANES": lanes}
                yield Build(_blur_kernel, types, constants | _absent(types, "vertex_items"), options)
    for width in WIDTHS:
        lanes = triton.next_power_of_2(width)
        for entries in sorted({config["ENTRIES"] for config in CONFIGS[target.name]}):
            sizes = {"ENTRIES": entries, "WIDTH": width, "LANES": lanes}
            for factors in (1, *(D + 1 for D in (1, 2, 3, 5, 6, 16) if _factored_width(D) == width)):
                types = {"values": "*fp32"} | ({"factors": "*fp32"} if factors > 1 else {})
                types |= {"points": "*i32", "weights": "*fp32", "numbers": "*i32", "lattice": "*fp32", "carry": "*fp32"}
                types |= {"R": "i32", "C": "i32", "start": "i32", "stop": "i32"}
                constants = {"FACTORS": factors, **sizes, **_absent(types, "factors")}
                yield Build(_splat_kernel, types, constants, {"num_warps": _splat_warps(lanes, target)})
            types = {"numbers": "*i32", "starts": "*i32", "carry": "*fp32", "lattice": "*fp32", "R": "i32"}
            yield Build(_carry_kernel, types, sizes | {"CARRIES": CARRIES}, {"num_warps": 1})
    for D in (1, 2, 3, 5, 6, 16):
        for items in ({}, {"items": "*i32"}):
            types = {**point_types, "ranks": "*i8", "neighbours": "*i32", **items, "sides": "*fp32"}
            types |= {"out": "*fp32", "P": "i32", "room": "i32", "amplitude": "fp32"}
            yield Build(_diagonal_kernel, types, {"D": D, "BLOCK": BLOCK} | _absent(types, "items"), {"num_warps": 1})
