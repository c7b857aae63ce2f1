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

SPACING = 1 / 0.92  # of the lattice, in units of the usual one; README.md says why not 1

_KEY_LIMIT = 2**62  # vertex keys with a digit for each coordinate stay below this


def elevation(D: int) -> Tensor:
    """(D + 1, D) float64: from feature space onto the lattice's hyperplane, a similarity."""
    j = torch.arange(1, D + 1, dtype=torch.float64)
    basis = torch.triu(torch.ones(D + 1, D, dtype=torch.float64))  # y_j = sum_{k > j} g_k - j g_j
    basis[1:].diagonal().copy_(-j)
    return basis * (math.sqrt(2.0 / 3.0) * (D + 1) / SPACING / torch.sqrt(j * (j + 1)))


def locate(
    features: Tensor,  # (P, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex of each point.

    Returns:
        weights ``(P, D + 1)``: barycentric, of vertices 0 to D;
        rank ``(D + 1, P)`` int8: of each coordinate by falling residual, a permutation of 0 to D;
        corner ``(D + 1, P)`` int64: vertex 0 divided by D + 1.
    """
    P, D = features.shape
    # in float64, so that a guide far from the origin loses no more than it had already lost
    y = elevation(D).to(features.device).div_(D + 1) @ features.T.double()  # (D + 1, P)
    nearest = torch.round(y)
    residual = y.sub_(nearest).to(features.dtype)
    corner = nearest.long()
    rank = torch.zeros((D + 1, P), dtype=torch.int8, device=features.device)
    for i in range(D + 1):
        for j in range(i + 1, D + 1):
            less = residual[i] < residual[j]
            rank[i] += less
            rank[j] += less.logical_not_()  # ties by position
    rank += corner.sum(0)  # how far the rounded point is off the hyperplane, at most D / 2
    wrap = (rank < 0).to(torch.int8) - (rank > D).to(torch.int8)
    rank += wrap * (D + 1)
    corner += wrap
    residual -= wrap
    t = torch.empty_like(residual).scatter_(0, rank.long(), residual)  # by falling residual
    weights = torch.empty((P, D + 1), dtype=features.dtype, device=features.device)
    weights[:, 0] = t[D] - t[0] + 1.0
    for v in range(1, D + 1):
        torch.sub(t[D - v], t[D + 1 - v], out=weights[:, v])
    return weights, rank, corner


def features_gradient(
    grad: Tensor,  # (P, D + 1), of the barycentric weights
    rank: Tensor,  # (D + 1, P)
) -> Tensor:  # (P, D)
    """`locate` backwards: inside a simplex the weights are linear in the features."""
    D = grad.shape[1] - 1
    by_rank = torch.stack([grad[:, D - k] - grad[:, (D + 1 - k) % (D + 1)] for k in range(D + 1)])
    return (by_rank.gather(0, rank.long()) / (D + 1)).T @ elevation(D).to(grad)


class VertexTable:
    """The distinct vertices that the points touch, numbered 0 to M - 1; points of different items share none.

    A vertex is known by a key, an integer linear in its coordinates, so that a step along an axis adds a constant.
    Where the coordinates are too wide to get digits of their own in 62 bits, the digits are random, modulo 2^64, and a
    second key of that kind tells apart what shares the first.

    Attributes:
        order: ``(P (D + 1),)`` the points' vertices, flattened, by rising key.
        starts: ``(M,)`` where in this order each vertex begins.
        number: ``(P (D + 1),)`` along this order, the vertex's number.
    """

    def __init__(self, corner: Tensor, rank: Tensor, counts: list[int], index: torch.dtype) -> None:
        D1, _ = rank.shape
        low, high = corner[:-1].amin(1), corner[:-1].amax(1)
        # vertices and their neighbours reach at most 2 (D + 1) beyond the corners; the last coordinate is implied
        sizes = [D1 * (int(span) + 5) for span in high - low]
        exact = len(counts) * math.prod(sizes) < _KEY_LIMIT
        item = torch.repeat_interleave(torch.tensor(counts, device=rank.device))
        coordinates = [item, *(corner[:-1] - (low - 2)[:, None])]
        self._checks: Tensor | None = None
        generator = torch.Generator().manual_seed(0)
        while True:
            digits = torch.tensor([math.prod(sizes[j:]) for j in range(D1)]) if exact else _random(D1, generator)
            keys, self._steps = _keys(coordinates, rank, digits)
            ordered, self.order = torch.sort(keys.view(-1), stable=True)
            first = torch.ones_like(ordered, dtype=torch.bool)
            torch.ne(ordered[1:], ordered[:-1], out=first[1:])
            self.starts = first.nonzero().view(-1)
            self._vertex_keys = ordered[self.starts]
            self.number = torch.cumsum(first, 0, dtype=index).sub_(1)
            if exact:
                return
            checks, self._check_steps = _keys(coordinates, rank, _random(D1, generator))
            checks = checks.view(-1)[self.order]
            self._checks = checks[self.starts]
            if bool((checks == self._checks[self.number.long()]).all()):
                return

    def neighbours(self, axis: int) -> Tensor:
        """(3 M,) for each vertex the number of the one a step back, its own, the one a step on; M where none is."""
        M, keys = len(self.starts), self._vertex_keys
        wanted = keys + self._steps[axis]
        at = torch.searchsorted(keys, wanted).clamp_(max=M - 1)
        found = keys[at] == wanted
        if self._checks is not None:
            found &= self._checks[at] == self._checks + self._check_steps[axis]
        own = torch.arange(M, device=keys.device)
        table = keys.new_full((M + 1, 3), M)
        table[:M, 1] = own
        table[:M, 2] = torch.where(found, at, M)
        table[:, 0].scatter_(0, table[:M, 2].clone(), own)
        return table[:M].reshape(-1)


def _random(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)


def _keys(coordinates: list[Tensor], rank: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of every point's vertices, ``(P, D + 1)``, and of a step on along each axis, ``(D + 1,)``.

    ``coordinates`` are the item and the first D coordinates of vertex 0 divided by D + 1; ``digits`` what one unit of
    each is worth. int64 arithmetic wraps around, which random digits rely on and the others never reach.
    """
    D1, P = rank.shape
    unit = digits[1:].to(rank.device)  # of the first D coordinates
    back = torch.cat([unit * D1, unit.new_zeros(1)])
    steps = unit.sum() - back
    step_of_rank = torch.empty(rank.shape, dtype=torch.int64, device=rank.device)
    step_of_rank.scatter_(0, rank.long(), steps[:, None].expand(-1, P))
    key = coordinates[0] * digits[0].to(rank.device)
    for j, coordinate in enumerate(coordinates[1:]):
        key = key + coordinate * back[j]
    keys = torch.empty((P, D1), dtype=torch.int64, device=rank.device)
    keys[:, 0] = key
    for v in range(1, D1):
        key = key + step_of_rank[D1 - v]
        keys[:, v] = key
    return keys, steps
