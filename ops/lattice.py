"""The permutohedral lattice: Gaussian filtering in time linear in the number of points.

    K = alpha W B_D ... B_1 B_0 W^T

``W (P, M)`` holds, for each point, the barycentric weights of the ``D + 1`` lattice vertices around it (``W^T`` is the
splat, ``W`` the slice); ``B_j (M, M)`` blurs along lattice axis ``j`` with weights (a, 1, a). Only vertices that some
point touches exist, M of them. The three sparse products run as ``embedding_bag``: one pass over sorted index lists, no
temporaries, every output summed by one thread in a fixed order, hence deterministic.

Two choices differ from the usual lattice (spacing 1, a = 1/2) and make it both more accurate and smaller: a coarser
lattice with a lighter blur, and a blur that grows heavier where many vertices are missing. README.md derives them.

Source: Adams, Baek, Davis, "Fast high-dimensional filtering using the permutohedral lattice" (Eurographics 2010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .simplex import SPACING, VertexTable, locate

# Splat and slice have variance 1/6 in a lattice whose total of 2/3 SPACING^-2 means sigma = 1; the blur (a, 1, a) adds
# 2a / (1 + 2a), and a follows; on photographs a little more is best.
_BLUR_VARIANCE = 2.0 / 3.0 / SPACING**2 - 1.0 / 6.0
_DENSE_SIDE = 0.5 * _BLUR_VARIANCE / (1.0 - _BLUR_VARIANCE) + 0.01

# Where fewer than FULL of the neighbours are there, a grows by SIDE_SLOPE for each that is missing; README.md.
FULL, SIDE_SLOPE, MOST_MISSING = 0.65, 0.6, 0.2

NEGLIGIBLE_ENERGY = 1e-2  # of the size of the products, left out there; the lattice's own error is 15 to 40 times that
CHANNELS_AT_ONCE = 256  # filtered together in the gradient of the features
POINTS_AT_ONCE = 2048  # received together there, to stay in the cache


class LatticeEngine:
    """The lattice of a set of points, built once and applied to any number of values.

    ``apply`` is linear in the values and its transpose is exact: the same products in reverse order. The engine trusts
    its input; :class:`crfnet.ops.GaussianFilter` is the checked door.

    Args:
        features: ``(P, D)`` float32 or float64, contiguous and finite, each column divided by its bandwidth.
        counts: the number of points of each item; items follow one another in ``features`` and never mix.
    """

    def __init__(self, features: Tensor, counts: list[int]) -> None:
        P, D = features.shape
        device = features.device
        index = _index_dtype(P, D)
        self.dimension, self._features = D, features
        weights, self._rank, corner = locate(features)
        table = VertexTable(corner, self._rank, counts, index)
        M = len(table.starts)
        # slice: each point's D + 1 vertices
        self._vertices = torch.empty(P * (D + 1), dtype=index, device=device).scatter_(0, table.order, table.number)
        self._slice_weights = weights.view(-1)
        # splat: each vertex's points; one more bag, empty, makes the row of zeros that missing neighbours point to
        self._points = torch.div(table.order.to(index), D + 1, rounding_mode="floor")
        self._splat_weights = self._slice_weights.index_select(0, table.order).mul_(_amplitude(D))
        self._splat_offsets = torch.cat([table.starts, table.starts.new_full((2,), P * (D + 1))]).to(index)
        # blur: each vertex between its two neighbours, along each axis
        self._axes = [table.neighbours(axis) for axis in range(D + 1)]
        self._set_offsets(counts)
        vertex_item = self._item[self._points[self._splat_offsets[:M].long()].long()]  # (M,)
        neighbours = torch.stack([axis.view(M, 3)[:, 2] < M for axis in self._axes]).sum(0).to(features.dtype)
        present = torch.zeros(len(counts), dtype=features.dtype, device=device).index_add_(0, vertex_item, neighbours)
        present /= (D + 1) * torch.bincount(vertex_item, minlength=len(counts)).clamp(min=1)
        self._side = _side_weight(present)  # (items,)
        sides = self._side[vertex_item]  # (M,)
        self._blur_weights = torch.stack([sides, torch.ones_like(sides), sides], 1).view(-1)

    def plan(self) -> list[Tensor]:
        """The tensors that `from_plan` makes the same engine from."""
        points = [self._rank.mT.contiguous(), self._vertices, self._slice_weights]
        splat = [self._points, self._splat_weights, self._splat_offsets]
        return [*points, *splat, self._blur_weights, self._side, *self._axes]

    @classmethod
    def from_plan(
        cls, plan: Sequence[Tensor], features: Tensor, counts: list[int], precision: object = None
    ) -> LatticeEngine:
        """The engine that was built from these features and counts."""
        engine = cls.__new__(cls)
        engine.dimension, engine._features = features.shape[1], features
        rank, engine._vertices, engine._slice_weights = plan[:3]
        engine._points, engine._splat_weights, engine._splat_offsets = plan[3:6]
        engine._rank, engine._axes = rank.mT, list(plan[8:])
        engine._blur_weights, engine._side = plan[6:8]
        engine._set_offsets(counts)
        return engine

    @staticmethod
    def plan_sizes(P: int, D: int, items: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor of the plan the largest shape, and its dtype; None for that of the features."""
        index, R = _index_dtype(P, D), P * (D + 1)  # R: as many vertices as there can be
        points = [((P, D + 1), torch.int64), ((R,), index), ((R,), None)]
        splat = [((R,), index), ((R,), None), ((R + 2,), index)]
        return [*points, *splat, ((3 * R,), None), ((items,), None), *[((3 * R,), index)] * (D + 1)]

    def _set_offsets(self, counts: list[int]) -> None:
        """What follows from the numbers of points and vertices."""
        D1, (R,), M = self.dimension + 1, self._vertices.shape, len(self._splat_offsets) - 2
        device, index = self._vertices.device, self._vertices.dtype
        self.num_vertices = M
        self._slice_offsets = torch.arange(0, R + 1, D1, dtype=index, device=device)
        offsets = torch.arange(0, 3 * M + 1, 3, dtype=index, device=device)
        self._blur_offsets = torch.cat([offsets, offsets[-1:]])
        self._item = torch.repeat_interleave(torch.tensor(counts, device=device))  # (P,)

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """``(P, C)`` to ``(P, C)``: K values, or K^T values."""
        return self.receive(self.send(values, transpose), 0, len(values))

    def send(self, values: Tensor, transpose: bool = False) -> Tensor:
        """Splat and blur, ``(P, C)`` to ``(M + 1, C)``: what all points will hear, at the vertices; alpha included."""
        lattice = _bags(self._points, values, self._splat_offsets, self._splat_weights)  # the last row is 0
        for axis in reversed(self._axes) if transpose else self._axes:
            lattice = _bags(axis, lattice, self._blur_offsets, self._blur_weights)
        return lattice

    def receive(self, lattice: Tensor, start: int, stop: int) -> Tensor:
        """Slice, ``(M + 1, C)`` to ``(stop - start, C)``: what those points hear."""
        D1 = self.dimension + 1
        part = slice(start * D1, stop * D1)
        offsets = self._slice_offsets[: stop - start + 1]
        return _bags(self._vertices[part], lattice, offsets, self._slice_weights[part])

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * K values)`` with respect to the features, for the exact kernel.

        ``dF_i = sum_j K_ij g_i·v_j (f_j - f_i) + sum_j K_ji v_i·g_j (f_j - f_i)``, the exact kernel's gradient with the
        lattice for K: each sum is a filter of values times features. It agrees better with the exact gradient than
        the slope of the piecewise linear function that the lattice computes (benchmarks/feature_gradient.py).
        """
        f = self._features - self._features.mean(0)
        total = torch.zeros_like(f)
        # g·v needs only the directions among the channels that both go along: in a segmentation, few of many classes
        values, grad = _common_directions(values, grad)
        group = max(1, CHANNELS_AT_ONCE // (self.dimension + 1))
        for v, g in zip(values.split(group, 1), grad.split(group, 1), strict=True):
            total += self._pull(f, v, g, False) + self._pull(f, g, v, True)
        return total

    def _pull(self, f: Tensor, sent: Tensor, heard: Tensor, transpose: bool) -> Tensor:
        """``(P, D)``: sum_j K_ij heard_i·sent_j (f_j - f_i), or K_ji."""
        (P, D), C = f.shape, sent.shape[1]
        carried = torch.empty(P, D + 1, C, dtype=f.dtype, device=f.device)
        carried[:, 0] = sent
        torch.mul(sent[:, None], f[:, :, None], out=carried[:, 1:])
        lattice = self.send(carried.view(P, -1), transpose)
        out, ones = torch.empty_like(f), f.new_ones(C, 1)
        for start in range(0, P, POINTS_AT_ONCE):
            stop = min(start + POINTS_AT_ONCE, P)
            arrived = self.receive(lattice, start, stop).view(-1, D + 1, C).mul_(heard[start:stop, None])
            weight = (arrived.view(-1, C) @ ones).view(-1, D + 1)
            torch.addcmul(weight[:, 1:], weight[:, :1], f[start:stop], value=-1, out=out[start:stop])
        return out

    def diagonal(self) -> Tensor:
        """``(P,)``: K_ii of what ``apply`` computes, the weight with which each point hears itself.

        A value that starts at vertex k of its simplex reaches vertex l either by one step on along every axis that
        separates them, or by one step back along every other axis; all the axes together lead back to the start.
        """
        D1, M = self.dimension + 1, self.num_vertices
        weights = self._slice_weights.view(-1, D1)
        vertices = self._vertices.view(-1, D1).long()
        moves = []  # per axis, (M + 1,) the vertex a step back and a step on; the missing one stays missing
        for axis in self._axes:
            back, _, on = axis.view(M, 3).long().unbind(1)
            moves.append((torch.cat([back, back.new_tensor([M])]), torch.cat([on, on.new_tensor([M])])))
        side = self._side[self._item]
        total = torch.zeros_like(side)
        for k in range(D1):
            for other in range(D1):
                low, high = min(k, other), max(k, other)
                between = (self._rank > D1 - 1 - high) & (self._rank <= D1 - 1 - low)  # (D + 1, P) separating axes
                ways = [(between, int(other > k), high - low), (~between, int(other < k), D1 - (high - low))]
                if k == other:
                    ways.append((~between, 1, D1))
                for along, direction, length in ways:
                    at = vertices[:, k]
                    for j in range(D1):
                        at = torch.where(along[j], moves[j][direction][at], at)
                    returned = (at == vertices[:, other]) * side**length
                    total += weights[:, k] * weights[:, other] * returned
        return total * _amplitude(self.dimension)


def _common_directions(values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:  # (P, C) twice → (P, r) twice
    """Fewer channels with the same products v_i·g_j, but for ``NEGLIGIBLE_ENERGY``.

    Each channel is scaled so that values and gradients have the same size in it, which leaves the products as they are;
    then both are turned to the directions that hold most of the sum of squares of the two together.
    """
    v, g = (x / x.abs().amax(0).clamp(min=torch.finfo(x.dtype).tiny) for x in (values, grad))  # safe to square
    size_v, size_g = (x.abs().amax(0).double() * y.norm(dim=0).double() for x, y in ((values, v), (grad, g)))
    unit = (size_v * size_g).sqrt()  # what both sizes become, channel by channel
    unit_v, unit_g = (unit / y.norm(dim=0).double().clamp(min=1e-30) for y in (v, g))
    largest = unit.amax().clamp(min=torch.finfo(torch.float64).tiny)
    v, g = v * (unit_v / largest).to(v), g * (unit_g / largest).to(g)
    energy, directions = torch.linalg.eigh((v.T @ v + g.T @ g).double())  # rising
    lost = energy.clamp(min=0).cumsum(0)
    first = min(int((lost <= NEGLIGIBLE_ENERGY * lost[-1]).sum()), len(lost) - 1)
    basis = directions[:, first:]
    return v @ (basis * largest).to(v), g @ (basis * largest).to(g)


def _bags(rows: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over the entries e of bag b of weights[e] * table[rows[e]]."""
    return embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _index_dtype(P: int, D: int) -> torch.dtype:
    """The narrowest that reaches every entry of every list."""
    return torch.int32 if 3 * P * (D + 1) < 2**31 else torch.int64


def _side_weight(present: Tensor) -> Tensor:
    """Weight a of the blur (a, 1, a) for each item, given the fraction of its vertices that have a neighbour."""
    return _DENSE_SIDE + SIDE_SLOPE * (FULL - present).clamp(0.0, MOST_MISSING)


def _amplitude(D: int) -> float:
    """alpha: makes the mass that one point spreads in a complete lattice that of exp(-|f|² / 2), (2 pi)^(D/2)."""
    density = math.sqrt(D + 1) * (2.0 / 3.0 / SPACING**2) ** (0.5 * D)  # vertices per unit of feature space
    return (2.0 * math.pi) ** (0.5 * D) * density / (1.0 + 2.0 * _DENSE_SIDE) ** (D + 1)
