"""Geometry of the permutohedral lattice: where points lie in it, and which of its vertices they touch.

The lattice lives on the hyperplane of zero sum in D + 1 dimensions; its vertices are the integer points there whose
coordinates are all equal modulo D + 1. A point's simplex has vertices 0 to D: vertex 0 is the nearest point of
remainder 0, and each next vertex is one step on along the axis with the next smallest residual, where a step along
axis j adds 1 to every coordinate and takes D + 1 off coordinate j.

Source: Adams, Baek, Davis, "Fast high-dimensional filtering using the permutohedral lattice" (Eurographics 2010).
"""

import math

import torch
from torch import Tensor

SPACING = 1 / 0.89  # of the lattice, in units of the usual one; README.md says why not 1

KEY_LIMIT = 2**62  # vertex keys with a digit for each coordinate stay below this


def elevation(D: int) -> Tensor:
    """(D + 1, D) float64: from feature space onto the lattice's hyperplane, a similarity."""
    j = torch.arange(1, D + 1, dtype=torch.float64, device="cpu")
    basis = torch.triu(torch.ones(D + 1, D, dtype=torch.float64, device="cpu"))  # y_j = sum_{k > j} g_k - j g_j
    basis[1:].diagonal().copy_(-j)
    return basis * (math.sqrt(2.0 / 3.0) * (D + 1) / SPACING / torch.sqrt(j * (j + 1)))


def locate(
    features: Tensor,  # (P, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex of each point.

    Returns:
        weights ``(P, D + 1)``: barycentric, of vertices 0 to D;
        rank ``(D + 1, P)`` int64: of each coordinate by falling residual, a permutation of 0 to D;
        corner ``(D + 1, P)`` int64: vertex 0 divided by D + 1.
    """
    P, D = features.shape
    y = (elevation(D) / (D + 1)).to(features) @ features.T  # (D + 1, P)
    nearest = torch.round(y)
    corner = nearest.long()
    residual = y.sub_(nearest)
    small = torch.int8 if D < 64 else torch.int16
    rank = torch.arange(D + 1, dtype=small, device=features.device)[:, None].repeat(1, P)  # ties by position
    for i in range(D + 1):
        for j in range(i + 1, D + 1):
            less = (residual[i] < residual[j]).view(torch.int8)
            rank[i] += less
            rank[j] -= less
    rank += corner.sum(0).to(small)  # how far the rounded point is off the hyperplane, at most D / 2
    wrap = (rank < 0).view(torch.int8) - (rank > D).view(torch.int8)
    rank += wrap * (D + 1)
    corner += wrap
    residual -= wrap
    rank = rank.long()
    t = torch.empty_like(residual).scatter_(0, rank, residual)  # by falling residual
    weights = torch.empty((P, D + 1), dtype=features.dtype, device=features.device)
    weights[:, 0] = t[D] - t[0] + 1.0
    for v in range(1, D + 1):
        torch.sub(t[D - v], t[D + 1 - v], out=weights[:, v])
    return weights, rank, corner


class VertexTable:
    """The distinct vertices that the points touch, numbered 0 to M - 1; points of different items share none.

    A vertex is known by an integer key, linear in its item, its remainder and its coordinates divided by D + 1. Where
    these are too wide to get digits of their own in 62 bits, the digits are random, modulo 2^64, and a second key of
    that kind tells apart what shares the first.

    Attributes:
        order: ``(P (D + 1),)`` the points' vertices, flattened, by rising key.
        starts: ``(M,)`` where in this order each vertex begins.
        number: ``(P (D + 1),)`` along this order, the vertex's number.
    """

    def __init__(self, corner: Tensor, rank: Tensor, counts: list[int], index: torch.dtype) -> None:
        D1, P = rank.shape
        low, high = corner[:-1].amin(1), corner[:-1].amax(1)
        sizes = [len(counts), D1, *(int(span) + 5 for span in high - low)]  # neighbours reach at most 2 beyond
        item = torch.repeat_interleave(torch.tensor(counts, device=rank.device)) if len(counts) > 1 else None
        coordinates = corner[:-1] - (low - 2)[:, None]
        exact = math.prod(sizes) < KEY_LIMIT
        self._checks: Tensor | None = None
        generator = torch.Generator().manual_seed(0)
        while True:
            digits = _mixed_radix(sizes) if exact else _random(len(sizes), generator)
            keys, self._steps = _keys(item, coordinates, rank, digits)
            ordered, self.order = _sort(keys.view(-1), math.prod(sizes) if exact else None)
            first = torch.ones_like(ordered, dtype=torch.bool)
            torch.ne(ordered[1:], ordered[:-1], out=first[1:])
            self.starts = first.nonzero().view(-1)
            self._vertex_keys = ordered[self.starts]
            self.number = torch.cumsum(first, 0, dtype=index).sub_(1)
            if exact:
                break
            checks, self._check_steps = _keys(item, coordinates, rank, _random(len(sizes), generator))
            checks = checks.view(-1)[self.order]
            self._checks = checks[self.starts]
            if bool((checks == self._checks[self.number.long()]).all()):
                break
        self._last = (self.order[self.starts] % D1 == D1 - 1).long()  # 1 for vertices of remainder D

    def neighbours(self, axis: int) -> Tensor:
        """(3 M,) for each vertex the number of the one a step back, its own, the one a step on; M where none is."""
        M, keys, index = len(self.starts), self._vertex_keys, self.number.dtype
        wanted = keys + self._steps[:, axis][self._last]
        at = torch.searchsorted(keys, wanted).clamp_(max=M - 1)
        found = keys[at] == wanted
        if self._checks is not None:
            found &= self._checks[at] == self._checks + self._check_steps[:, axis][self._last]
        after = torch.where(found, at, M)
        own = torch.arange(M, dtype=index, device=keys.device)
        before = own.new_full((M + 1,), M).scatter_(0, after, own)
        return torch.stack([before[:M], own, after.to(index)], 1).view(-1)


def _mixed_radix(sizes: list[int]) -> Tensor:
    return torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))], device="cpu")


def _random(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)


def _keys(item: Tensor | None, coordinates: Tensor, rank: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of every point's vertices, ``(P, D + 1)``, and of a step on along each axis, ``(2, D + 1)``.

    Vertex v has remainder v, and vertex v + 1 is a step from it along the axis of rank D - v, which takes 1 off that
    axis's coordinate. A step from remainder D leads back to 0 and adds 1 to every coordinate: the second row of steps.
    int64 arithmetic wraps around, which random digits rely on and the others never reach.
    """
    D1, P = rank.shape
    one = torch.cat([digits[2:], digits.new_zeros(1)]).to(rank.device)  # the last coordinate is implied
    remainder = digits[1].to(rank.device)
    steps = torch.stack([remainder - one, one.sum() - (D1 - 1) * remainder - one])
    step_of_rank = torch.empty(rank.shape, dtype=torch.int64, device=rank.device)
    step_of_rank.scatter_(0, rank, steps[0, :, None].expand(-1, P))
    key = torch.zeros(P, dtype=torch.int64, device=rank.device) if item is None else item * digits[0].to(rank.device)
    for coordinate, unit in zip(coordinates, one, strict=False):
        key = torch.add(key, coordinate * unit)
    keys = torch.empty((P, D1), dtype=torch.int64, device=rank.device)
    keys[:, 0] = key
    for v in range(1, D1):
        key = key + step_of_rank[D1 - v]
        keys[:, v] = key
    return keys, steps


def _sort(keys: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """Keys in rising order, and the order; equal keys by position. ``limit``, where known, is above all of them.

    Overwrites the keys.
    """
    places = (len(keys) - 1).bit_length()
    if keys.device.type != "cpu" or limit is None or limit.bit_length() + places > 63:
        ordered, order = torch.sort(keys, stable=True)
        return ordered, order
    # key and position in one integer: NumPy's vectorised sort of plain integers is several times faster than a sort
    # that carries positions along
    packed = keys.mul_(1 << places).add_(torch.arange(len(keys)))
    packed.numpy().sort()
    return packed >> places, packed.bitwise_and_((1 << places) - 1)
