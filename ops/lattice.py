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

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .simplex import SPACING, VertexTable, features_gradient, locate


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
        index = torch.int32 if 3 * P * (D + 1) < 2**31 else torch.int64  # the narrowest that reaches every list
        self.dimension = D
        weights, self._rank, corner = locate(features)
        table = VertexTable(corner, self._rank, counts, index)
        self.num_vertices = M = len(table.starts)
        # slice: each point's D + 1 vertices
        self._vertices = torch.empty(P * (D + 1), dtype=index, device=device)
        self._vertices[table.order] = table.number
        self._slice_weights = weights.view(-1)
        self._slice_offsets = torch.arange(0, P * (D + 1) + 1, D + 1, dtype=index, device=device)
        # splat: each vertex's points; one more bag, empty, makes the row of zeros that missing neighbours point to
        self._points = torch.div(table.order, D + 1, rounding_mode="floor").to(index)
        self._splat_weights = self._slice_weights[table.order].mul_(_amplitude(D))
        self._splat_offsets = torch.cat([table.starts, table.starts.new_full((2,), P * (D + 1))]).to(index)
        # blur: each vertex between its two neighbours, along each axis
        self._axes = [table.neighbours(axis).to(index) for axis in range(D + 1)]
        offsets = torch.arange(0, 3 * M + 1, 3, dtype=index, device=device)
        self._blur_offsets = torch.cat([offsets, offsets[-1:]])
        present = sum(int((axis.view(M, 3)[:, 2] < M).sum()) for axis in self._axes) / (M * (D + 1))
        self._side = _side_weight(present)
        self._blur_weights = features.new_tensor([self._side, 1.0, self._side]).repeat(M)

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """``(P, C)`` to ``(P, C)``: K values, or K^T values."""
        return self._slice(self._blur(self._splat(values), transpose))

    def _splat(self, values: Tensor) -> Tensor:  # (P, C) → (M + 1, C), the last row 0; alpha included
        return _bags(self._points, values, self._splat_offsets, self._splat_weights)

    def _blur(self, lattice: Tensor, transpose: bool) -> Tensor:  # (M + 1, C) → (M + 1, C)
        for axis in reversed(self._axes) if transpose else self._axes:
            lattice = _bags(axis, lattice, self._blur_offsets, self._blur_weights)
        return lattice

    def _slice(self, lattice: Tensor) -> Tensor:  # (M + 1, C) → (P, C)
        return _bags(self._vertices, lattice, self._slice_offsets, self._slice_weights)

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * apply(values))`` with respect to the features, of the lattice itself.

        Only the barycentric weights depend on the features, linearly inside a simplex: this is the slope of the
        filtered signal across the simplex. README.md compares it with the exact kernel's gradient.
        """
        sent = self._blur(self._splat(values), False)
        received = self._blur(self._splat(grad), True)
        by_weight = self._weight_gradient(sent, grad) + self._weight_gradient(received, values)  # (P, D + 1)
        return features_gradient(by_weight, self._rank)

    def _weight_gradient(self, lattice: Tensor, grad: Tensor) -> Tensor:  # (M + 1, C), (P, C) → (P, D + 1)
        """Gradient of ``sum(grad * slice(lattice))`` with respect to the barycentric weights."""
        with torch.enable_grad():
            weights = self._slice_weights.detach().requires_grad_()
            out = _bags(self._vertices, lattice, self._slice_offsets, weights)
            return torch.autograd.grad(out, weights, grad)[0].view(-1, self.dimension + 1)

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
        total = torch.zeros_like(weights[:, 0])
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
                    returned = (at == vertices[:, other]).to(total) * self._side**length
                    total += weights[:, k] * weights[:, other] * returned
        return total * _amplitude(self.dimension)


def _bags(rows: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over the entries e of bag b of weights[e] * table[rows[e]]."""
    return embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _side_weight(present: float) -> float:
    """Weight a of the blur (a, 1, a), given the fraction of vertices that have a neighbour."""
    # variance of splat and slice 1/6 and of the blur 2a / (1 + 2a), in a lattice whose total of 2/3 means sigma = 1
    blur = 2.0 / 3.0 / SPACING**2 - 1.0 / 6.0
    dense = 0.5 * blur / (1.0 - blur)
    return dense + 0.6 * min(max(0.65 - present, 0.0), 0.2)


def _amplitude(D: int) -> float:
    """alpha: makes the mass that one point spreads in a complete lattice that of exp(-|f|² / 2), (2 pi)^(D/2)."""
    side = _side_weight(1.0)
    density = math.sqrt(D + 1) * (2.0 / 3.0 / SPACING**2) ** (0.5 * D)  # vertices per unit of feature space
    return (2.0 * math.pi) ** (0.5 * D) * density / (1.0 + 2.0 * side) ** (D + 1)
