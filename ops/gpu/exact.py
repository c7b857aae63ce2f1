"""All pairs that matter, on a GPU: the exact engine as kernels shaped like flash attention.

    out_i = sum_j K_ij v_j,                        K_ij = exp(-|f_i - f_j|² / 2)
    dF_i  = sum_j K_ij (g_i·v_j + v_i·g_j) (f_j - f_i)

One program owns a tile of 64 points and walks over the tiles that it pairs up with (`exact_pairs`). K is only ever in
registers, where it is made in the very layout that the matrix unit reads. That layout gives a thread few rows and many
columns, so preparing columns (centring, squaring) would cost as much as it saves: distances are sums of squared
differences, as accurate as float32 allows wherever the points lie. In "fp16", where K may be made in the layout that
products come out in, they are products themselves: `exact_split`.

The matrix unit adds in float32 but rounds towards zero. Over a million terms that would be a drift of 10^-3, so only
SPAN tiles are added up in it, and these partial sums in ordinary float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import exact_pairs, exact_split, on_device_of, tune
from .exact_pairs import HALF_LOG2E, TILE
from .target import Build, Precision, Target, target_of

# Channels of a program, at most. A wider block makes K fewer times but holds more sums in registers; away from Hopper
# wider ones would share a row among warps, each of which would make K for itself.
MAX_BLOCK = {"sm_80": 32, "sm_90": 128, "gfx942": 32}
MAX_BLOCK_FLOAT32 = {"sm_80": 16, "sm_90": 32, "gfx942": 32}  # split operands need registers
SPAN = {"float32": 8, "tf32": 64, "fp16": 64}  # tiles added up in the matrix unit

CONFIGS: dict[str, list[dict[str, int]]] = {
    "sm_80": [{"num_stages": s} for s in (3, 2, 4)],
    "sm_90": [{"num_stages": s} for s in (3, 2, 4)],
    "gfx942": [{"num_stages": s, "matrix_instr_nonkdim": 16} for s in (2, 1)],
}  # for the number of warps see `filter_configs`
GRADIENT_CONFIGS: dict[str, list[dict[str, int]]] = {
    "sm_80": [{"num_warps": 4, "num_stages": s} for s in (2, 3)],
    "sm_90": [{"num_warps": 4, "num_stages": s} for s in (2, 3)],
    "gfx942": [{"num_warps": 4, "num_stages": s, "matrix_instr_nonkdim": 16} for s in (2, 1)],
}

# Relative error of one product K v, both operands rounded. tf32 and fp16 keep 10 bits after the point: 2^-11 each.
# float32 is split in three products (2^-20 at most) or multiplied as it is. exp2 adds 2^-22.
PRODUCT_ERROR = {"float32": 2**-20, "tf32": 2**-10 + 2**-20, "fp16": 2**-10 + 2**-20}
SMALLEST_FP16 = 2**-39  # absolute error of a K below 2^-28, where float16 has fewer bits; K is stored times 2^14


class TritonExactEngine:
    """The exact kernel on a GPU; see `crfnet.ops.exact.ExactEngine`, whose bounds hold here as well.

        |out_i - exact_i| <= (error_bound + rounding_bound) (K 1)_i max_j |v_j|

    with the maximum over all items, since "fp16" scales a channel by it.

    Args:
        features: ``(P, D)`` float32 contiguous, the points of all items one after the other.
        counts: points of each item; points of different items never interact.
        tolerance: largest ``error_bound`` allowed, in [0, 1).
        precision: of the products K v; "float32", "tf32" or "fp16". Distances, exponentials and sums are float32. In
            the feature gradient, where products can be small, "fp16" is read as "tf32".
    """

    def __init__(
        self, features: Tensor, counts: list[int], tolerance: float = 3e-4, precision: Precision = "tf32"
    ) -> None:
        self._take(features, counts, precision)
        tiles = exact_pairs.split(features, counts)
        self._source, self._size = tiles.source, tiles.size
        self._points = features[tiles.source.long()].mT.contiguous()  # (T, D, 64)
        pairs = exact_pairs.choose(self._points, tiles, tolerance, counts)
        self._offsets, self._columns, self._near, self._partners, self._reached = pairs
        self._senders = exact_split.senders(self._points) if self._splits() else None

    def _take(self, features: Tensor, counts: list[int], precision: Precision) -> None:
        (self.P, self.D), self._counts, self.precision = features.shape, counts, precision
        self._target = target_of(features)

    def _splits(self) -> bool:
        """Whether distances come from the matrix unit."""
        return self.precision == "fp16" and self.D <= exact_split.MAX_D

    def plan(self) -> list[Tensor]:
        """The tensors that `from_plan` makes the same engine from."""
        return [self._source, self._size, self._points, self._offsets, self._near, self._columns]

    @classmethod
    def from_plan(
        cls, plan: Sequence[Tensor], features: Tensor, counts: list[int], precision: Precision = "tf32"
    ) -> TritonExactEngine:
        """The engine that was built from these features and counts, without its bounds."""
        engine = cls.__new__(cls)
        engine._take(features, counts, precision)
        engine._source, engine._size, engine._points, engine._offsets, engine._near, engine._columns = plan
        engine._senders = exact_split.senders(engine._points) if engine._splits() else None
        return engine

    @staticmethod
    def plan_sizes(P: int, D: int, items: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor of the plan the largest shape, and its dtype; None for that of the features.

        For items of at most ``P / items`` points each.
        """
        t = -(-P // max(1, items * TILE))  # tiles of an item
        T, pairs = items * t, items * t * t
        if pairs > exact_pairs.MAX_CAPTURED:
            raise RuntimeError(
                f"the exact engine cannot be compiled into a graph for {P} points: {pairs} pairs of tiles are too many "
                "to make room for; use the lattice, or leave the CRF out of the graph"
            )
        return [((T, TILE), torch.int32), ((T,), torch.int32), ((T, D, TILE), None)] + [
            ((T + 1,), torch.int64),
            ((T,), torch.int32),
            ((pairs,), torch.int32),
        ]

    @property
    def error_bound(self) -> float:
        """What is left out, from above, over the row sums, from below: the largest of all. Waits for the device."""
        return float(self._reached.max()) if len(self._reached) else 0.0

    @property
    def kept_fraction(self) -> float:
        """Pairs of points whose kernel entry is computed / all pairs. Waits for the device."""
        return float((self._size.double() * self._partners).sum()) / max(1, sum(n * n for n in self._counts))

    @property
    def rounding_bound(self) -> float:
        """Worst case of rounding, relative to (K 1)_i max|v|; u = 2^-24.

        Exponent: a difference squared and summed is off by at most D + 2 roundings, its scale by two, so K_ij by
        u (D + 5) d²; the mean of d² under K is below 4 log N + 2 (see the exact engine on a CPU). With split features
        SPLIT_ERROR |a| |b| more, where |b| <= NEAR and |a| <= |b| + d. Product: see PRODUCT_ERROR. Sum: 2 u per term in
        the matrix unit, which rounds towards zero, and u per partial sum.
        """
        u, N, block = 2**-24, max(self._counts, default=0), TILE * SPAN[self.precision]
        squared = 4 * math.log(max(N, 1)) + 2
        exponent = u * (self.D + 5) * squared
        if self._splits():
            exponent += exact_split.SPLIT_ERROR * exact_pairs.NEAR * (exact_pairs.NEAR + squared**0.5)
        sums = 2 * u * min(N, block) + u * (N / block + 2)
        smallest = N * SMALLEST_FP16 if self.precision == "fp16" else 0.0
        return exponent + PRODUCT_ERROR[self.precision] + sums + smallest

    def diagonal(self) -> Tensor:
        """K_ii ``(P,)``: ones."""
        return self._points.new_ones(self.P)

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """``K values``, ``(P, C) → (P, C)``. K is symmetric: ``transpose`` changes nothing."""
        T, C = len(self._size), values.shape[1]
        values, out = values.contiguous(), torch.empty_like(values, memory_format=torch.contiguous_format)
        if out.numel() == 0:
            return out
        block = block_of(C, self.D, self.precision, self._target)
        blocks = -(-C // block)
        scale = _scale(values) if self.precision == "fp16" else None
        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        packed = torch.empty(T, blocks * block, TILE, dtype=dtype, device=values.device)
        with on_device_of(values):
            self._pack(values, packed, block, (TILE, 1), scale, self.precision)

            if self._senders is not None:
                self._filter_split(self._senders, packed, scale, out, block)
                return out

            def run(config: dict[str, int]) -> None:
                _filter_kernel[(T, blocks)](
                    *(self._points, packed, self._offsets, self._columns, self._source, self._size),
                    *(values if scale is None else scale, out, C),
                    D=self.D,
                    BLOCK_C=block,
                    SPAN=SPAN[self.precision],
                    PRECISION=self.precision,
                    INPUT_PRECISION=self._target.dot(self.precision),
                    **config,
                )

            key = self.D, block, self.precision
            run(tune.pick("exact filter", key, filter_configs(block, self.D, self._target), run, values))
        return out

    def _filter_split(
        self, senders: tuple[Tensor, ...], packed: Tensor, scale: Tensor | None, out: Tensor, block: int
    ) -> None:
        """Distances by products of split features as well."""

        def run(config: dict[str, int]) -> None:
            exact_split._split_filter_kernel[(len(self._size), packed.shape[1] // block)](
                *(self._points, *senders, packed, self._offsets, self._near, self._columns),
                *(self._source, self._size, scale, out, out.shape[1]),
                D=self.D,
                Q=exact_split.width(self.D),
                BLOCK_C=block,
                SPAN=SPAN["fp16"],
                **config,
            )

        configs = exact_split.CONFIGS[self._target.name]
        run(tune.pick("exact split filter", (self.D, block), configs, run, out))

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * apply(values))`` to the features, each point as sender and receiver."""
        T, C = len(self._size), values.shape[1]
        out = values.new_empty(self.P, self.D)
        if out.numel() == 0:
            return out
        if C == 0:
            return out.zero_()
        precision: Precision = "float32" if self.precision == "float32" else "tf32"
        block = min(gradient_block(self.D, precision, self._target), max(16, triton.next_power_of_2(C)))
        room = -(-C // block) * block
        both = values.new_empty(T, TILE, 2 * room)
        with on_device_of(values):
            self._pack(values.contiguous(), both, block, (1, 2 * room), None, precision)
            self._pack(grad.contiguous(), both[:, :, room:], block, (1, 2 * room), None, precision)

            def run(config: dict[str, int]) -> None:
                _gradient_kernel[(T,)](
                    *(self._points, self._points, both),
                    *(self._offsets, self._columns, self._source, self._size, out, room),
                    D=self.D,
                    BLOCK_C=block,
                    ONE_BLOCK=room == block,
                    INPUT_PRECISION=self._target.dot(precision),
                    **config,
                )

            key = self.D, block, room == block, precision
            run(tune.pick("exact gradient", key, gradient_configs(self.D, precision, self._target), run, values))
        return out

    def _pack(
        self,
        values: Tensor,  # (P, C)
        packed: Tensor,  # (T, ...), for each tile C rounded up to blocks, times 64 slots, in the order of the strides
        block: int,
        strides: tuple[int, int],  # of a channel and of a slot
        scale: Tensor | None,
        precision: Precision,
    ) -> None:
        C = values.shape[1]
        _pack_kernel[(len(self._size), -(-C // block))](
            *(values, self._source, self._size, values if scale is None else scale, packed),
            *(C, packed.stride(0), *strides),
            BLOCK_C=block,
            PRECISION=precision,
            num_warps=4,
        )


def block_of(C: int, D: int, precision: Precision, target: Target) -> int:
    """Channels that one program of the filter sums up."""
    most = (MAX_BLOCK_FLOAT32 if precision == "float32" else MAX_BLOCK)[target.name]
    if precision == "fp16" and D <= exact_split.MAX_D:
        most = exact_split.most_channels(D, target)
    elif D > 8:  # the points take the registers
        most = min(most, 64 if target.name == "sm_90" else 16)
    return min(most, max(16, triton.next_power_of_2(C)))


def filter_configs(block: int, D: int, target: Target) -> list[dict[str, int]]:
    """CONFIGS with as many warps as can each have rows of K to themselves."""
    hopper = target.name == "sm_90"
    configs = [{"num_warps": 4 if hopper or block == 16 else 2, **config} for config in CONFIGS[target.name]]
    return configs if hopper or D <= 8 else [configs[0] | {"num_stages": 1}]  # no registers for what is on its way


def gradient_block(D: int, precision: Precision, target: Target) -> int:
    """Channels that the gradient multiplies at once, at most; more of them need more registers than there are."""
    return 16 if D > 8 or (precision == "float32" and target.name == "sm_80") else 32


def gradient_configs(D: int, precision: Precision, target: Target) -> list[dict[str, int]]:
    """GRADIENT_CONFIGS, or what keeps everything in registers where they are short."""
    configs = GRADIENT_CONFIGS[target.name]
    if target.name == "sm_80" and precision == "float32":
        return [configs[0] | {"num_stages": 1}]
    return [configs[0] | {"num_warps": 8}] if target.name == "sm_80" and D > 8 else configs


def _scale(values: Tensor) -> Tensor:
    """Powers of two ``(C,)`` that are above the channels' largest magnitudes, at most twice."""
    largest = values.abs().amax(0).contiguous().view(torch.int32) >> 23  # exponents, counted from 2^-127
    return ((largest + 1).clamp(2, 253) << 23).view(torch.float32)


@triton.jit
def _to_tf32(x):
    """To the nearest of 10 bits after the point, whatever the matrix unit does with the 13 bits below them."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["C", "stride_c", "stride_slot"])
def _pack_kernel(
    values, source, size, scale, packed,  # (P, C), (T, 64), (T,), (C,), as in `_pack`
    C, stride_tile, stride_c, stride_slot, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's values, rounded, in tile order; zero in copies and past C."""
    tile = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, 64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    point = tl.load(source + tile * 64 + slot).to(tl.int64)
    real = (c[:, None] < C) & (slot[None, :] < tl.load(size + tile))
    v = tl.load(values + point[None, :] * C + c[:, None], mask=real, other=0.0)  # (BLOCK_C, 64)
    if PRECISION == "fp16":
        v = v / tl.load(scale + c, mask=c < C, other=1.0)[:, None]
    elif PRECISION == "tf32":
        rounded = _to_tf32(v)
        v = tl.where(tl.abs(rounded) < float("inf"), rounded, v)  # not the largest numbers up to infinity, nor NaN down
    to = packed + tile * stride_tile + c[:, None] * stride_c + slot[None, :] * stride_slot
    tl.store(to, v.to(packed.dtype.element_ty))


@triton.jit
def _rows(points, tile, slot, D: tl.constexpr):
    """The points of a tile: a tuple of D vectors of 64."""
    a = ()  # type: Any
    for d in tl.static_range(D):
        a = a + (tl.load(points + (tile * D + d) * 64 + slot),)
    return a


@triton.jit
def _squared_distances(a, points, tile, slot, D: tl.constexpr):
    """Between the points ``a`` and those of a tile: (64, 64).

    Nothing but loads and arithmetic, which is what lets the compiler make K where the matrix unit wants it.
    """
    total = tl.zeros((64, 64), tl.float32)
    for d in tl.static_range(D):
        difference = a[d][:, None] - tl.load(points + (tile * D + d) * 64 + slot)[None, :]
        total += difference * difference
    return total


@triton.jit(do_not_specialize=["C"])
def _filter_kernel(
    points, values,  # (T, D, 64), (T, room for C, 64)
    offsets, columns, source, size,  # (T + 1,), (pairs,), (T, 64), (T,)
    scale, out,  # (C,) for fp16, (P, C)
    C, D: tl.constexpr, BLOCK_C: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums what a tile of points receives in BLOCK_C channels."""
    tile = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, 64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    room = tl.num_programs(1) * BLOCK_C
    begin = tl.load(offsets + tile)
    partners = (tl.load(offsets + tile + 1) - begin).to(tl.int32)
    a = _rows(points, tile, slot, D)
    total = tl.zeros((64, BLOCK_C), tl.float32)
    for start in range(0, partners, SPAN):
        part = tl.zeros((64, BLOCK_C), tl.float32)
        for k in range(start, tl.minimum(start + SPAN, partners)):
            other = tl.load(columns + begin + k).to(tl.int64)
            distance2 = _squared_distances(a, points, other, slot, D)
            v = tl.load(values + other * room * 64 + c[None, :] * 64 + slot[:, None])
            if PRECISION == "fp16":  # times 2^14: entries down to 2^-28 keep all their bits
                kernel = tl.exp2(distance2 * -HALF_LOG2E + 14.0).to(tl.float16)
            elif PRECISION == "tf32":
                kernel = _to_tf32(tl.exp2(distance2 * -HALF_LOG2E))
            else:
                kernel = tl.exp2(distance2 * -HALF_LOG2E)
            part += tl.dot(kernel, v, input_precision=INPUT_PRECISION)
        total += part
    if PRECISION == "fp16":
        total = total * 2**-14 * tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    point = tl.load(source + tile * 64 + slot).to(tl.int64)
    real = (slot[:, None] < tl.load(size + tile)) & (c[None, :] < C)
    tl.store(out + point[:, None] * C + c[None, :], total, mask=real)


@triton.jit
def _gradient_kernel(
    points, again, both,  # (T, D, 64) twice, (T, 64, 2 room): values beside gradients
    offsets, columns, source, size, out,  # (T + 1,), (pairs,), (T, 64), (T,), (P, D)
    room, D: tl.constexpr, BLOCK_C: tl.constexpr, ONE_BLOCK: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums the gradients to a tile of points.

    Loads from ``again`` are to the compiler not those from ``points``: it would keep them in registers, 16 for each D.
    """
    tile = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, 64)
    c = tl.arange(0, BLOCK_C)
    room = tl.multiple_of(room, 16)  # so that loads are wide
    begin = tl.load(offsets + tile)
    partners = (tl.load(offsets + tile + 1) - begin).to(tl.int32)
    a = _rows(points, tile, slot, D)
    rows = both + tile * 128 * room + slot[:, None] * 2 * room + c[None, :]  # (64, BLOCK_C)
    total = ()  # type: Any
    for _ in tl.static_range(D):
        total = total + (tl.zeros((64,), tl.float32),)
    for k in range(0, partners):
        other = tl.load(columns + begin + k).to(tl.int64)
        senders = both + other * 128 * room + slot[None, :] * 2 * room + c[:, None]  # (BLOCK_C, 64)
        products = tl.zeros((64, 64), tl.float32)  # g_i·v_j + v_i·g_j
        if ONE_BLOCK:
            products += tl.dot(tl.load(rows + room), tl.load(senders), input_precision=INPUT_PRECISION)
            products += tl.dot(tl.load(rows), tl.load(senders + room), input_precision=INPUT_PRECISION)
        else:
            for start in range(0, 2 * room, BLOCK_C):
                swapped = tl.where(start < room, start + room, start - room)
                products += tl.dot(tl.load(rows + swapped), tl.load(senders + start), input_precision=INPUT_PRECISION)
        weight = tl.exp2(_squared_distances(a, points, other, slot, D) * -HALF_LOG2E) * products
        more = ()  # type: Any
        for d in tl.static_range(D):
            difference = tl.load(again + (other * D + d) * 64 + slot)[None, :] - a[d][:, None]
            more = more + (total[d] + tl.sum(weight * difference, 1),)
        total = more
    point = tl.load(source + tile * 64 + slot).to(tl.int64)
    real = slot < tl.load(size + tile)
    for d in tl.static_range(D):
        tl.store(out + point * D + d, total[d], mask=real)


def builds(target: Target) -> Iterator[Build]:
    """Every kernel of the exact engine on a target: the defaults at several D, the candidates for tuning at one."""
    yield from exact_pairs.builds(target)
    yield from exact_split.builds(target, SPAN["fp16"])
    precisions: tuple[Precision, ...] = ("float32", "tf32", "fp16")
    lists = {"offsets": "*i64", "columns": "*i32", "source": "*i32", "size": "*i32"}
    for precision in precisions:
        kind = "*fp16" if precision == "fp16" else "*fp32"
        sizes = 1, 32, 64, 128
        for block in sorted({16, 32} | {block_of(C, 1, precision, target) for C in sizes}):
            types = {"values": "*fp32", "source": "*i32", "size": "*i32", "scale": "*fp32", "packed": kind}
            types |= dict.fromkeys(("C", "stride_tile", "stride_c", "stride_slot"), "i32")
            yield Build(_pack_kernel, types, {"BLOCK_C": block, "PRECISION": precision}, {"num_warps": 4})
        for D in (1, 2, 3, 5, 6, 16):
            splits = precision == "fp16" and D <= exact_split.MAX_D  # has no use for this kernel
            for block in sorted({block_of(C, D, precision, target) for C in sizes}) if not splits else ():
                types = {"points": "*fp32", "values": kind, **lists, "scale": "*fp32", "out": "*fp32", "C": "i32"}
                constants: dict[str, Any] = {"D": D, "BLOCK_C": block, "SPAN": SPAN[precision], "PRECISION": precision}
                constants["INPUT_PRECISION"] = target.dot(precision)
                for config in filter_configs(block, D, target)[: None if D == 5 else 1]:
                    yield Build(_filter_kernel, types, constants, config, matrix=True)
            widest = gradient_block(D, precision, target)
            for block, one in sorted({(16, True), (widest, True), (widest, False)}) if precision != "fp16" else ():
                types = {"points": "*fp32", "again": "*fp32", "both": "*fp32", **lists, "out": "*fp32", "room": "i32"}
                constants = {"D": D, "BLOCK_C": block, "ONE_BLOCK": one, "INPUT_PRECISION": target.dot(precision)}
                for config in gradient_configs(D, precision, target)[: None if D == 5 else 1]:
                    yield Build(_gradient_kernel, types, constants, config, matrix=True)
