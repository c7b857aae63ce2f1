"""All pairs, without ever storing the N x N matrix: the exact engine, with a guaranteed bound on what it skips.

    out_i = sum_j K_ij v_j,    K_ij = exp(-|f_i - f_j|² / 2).

Points are split, along the widest axis of their group again and again, into compact tiles. Between two tiles whose
bounding boxes are dmin apart no kernel entry exceeds exp(-dmin²/2): each tile skips its farthest partners while the sum
of those upper bounds stays under ``tolerance`` times a lower bound of its points' row sums (K 1)_i. A pair is skipped
in both directions or in none, so the operator applied is symmetric and is its own transpose.

Distances must survive float32: a colour divided by its bandwidth reaches 85, and |a|² + |b|² - 2 a·b would drown in the
rounding of 85². Both tiles are centred on the row tile first, after which the rounding of the exponent is proportional
to the square of that tile's radius; the few tiles too wide for this take the differences before the squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TILE = 64  # points to a tile
CHUNK = 8192  # columns of the kernel made at once: a strip of 2 MB in float32, to stay in a cache
BOUND_ENTRIES = 2**21  # pairs of tiles bounded at once while building
LEVELS, LEVELS_PER_UNIT = 1024, 8  # of squared distance, when looking for the cut; the last level begins at 128

# Radius, in bandwidths, up to which a row tile goes through the matrix product: rounding_bound grows with its square.
MAX_RADIUS = {torch.float32: 8.0, torch.float64: 512.0}

LOG2E = math.log2(math.e)  # exp(x) = exp2(x log2 e): exp2 is 4 times as fast as exp in PyTorch's float32 on a CPU


def split_into_tiles(features: Tensor, counts: list[int], tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """k-d splitting of all items at once.

    Every group of t tiles is cut along its widest axis into floor(t / 2) full tiles and the rest, all groups of a level
    in one sort, until each is one tile; so only the last tile of an item may be short.

    Args:
        features: ``(P, D)``, the items one after the other.
        counts: points of each item.
        tile: points to a tile.

    Returns:
        ``order (P,)``, the permutation of the points; ``sizes (T,)``, points in each tile; ``item (T,)``, its item.
    """
    sizes = torch.tensor([n for n in counts if n > 0], dtype=torch.int64, device=features.device)
    item = torch.tensor([i for i, n in enumerate(counts) if n > 0], dtype=torch.int64, device=features.device)
    order = torch.arange(len(features), device=features.device)
    while len(sizes) and int(sizes.max()) > tile:
        points, group = features[order], torch.repeat_interleave(sizes)  # (P, D), (P,)
        low = torch.segment_reduce(points, "min", lengths=sizes, axis=0).double()
        width, axis = (torch.segment_reduce(points, "max", lengths=sizes, axis=0).double() - low).max(1)
        position = points.gather(1, axis[group, None])[:, 0].double() - low.gather(1, axis[:, None])[group, 0]
        position /= width[group].clamp(min=torch.finfo(torch.float64).tiny)
        order = order[torch.argsort(group + position.clamp(max=1 - 2**-20), stable=True)]
        first = torch.where(sizes > tile, (sizes + tile - 1) // tile // 2 * tile, sizes)
        halves = torch.stack([first, sizes - first], 1).flatten()
        item = torch.repeat_interleave(item, 2)[halves > 0]
        sizes = halves[halves > 0]
    return order, sizes, item


class ExactEngine:
    """Applies the exact kernel, except for pairs of tiles that provably do not matter.

    For values v and row sums (K 1)_i of the true kernel,

        |out_i - exact_i| <= (error_bound + rounding_bound) * (K 1)_i * max_j |v_j|.

    Args:
        features: ``(P, D)`` contiguous, float32 or float64, finite; the points of all items one after the other.
        counts: points of each item; points of different items never interact.
        tolerance: largest ``error_bound`` allowed, in [0, 1); 0 skips only what is 0 in float64.
        tile: points to a tile.

    Attributes:
        error_bound: the bound reached, at most ``tolerance``: max over rows of (skipped mass, from above) / (row sum,
            from below).
        rounding_bound: the same kind of bound on floating-point rounding, a worst case; sums of many terms of
            independent rounding come out some hundred times better.
        kept_fraction: pairs of points whose kernel entry is computed / all pairs.
    """

    def __init__(self, features: Tensor, counts: list[int], tolerance: float = 3e-4, tile: int = TILE) -> None:
        self.P, self.D = features.shape
        self.tolerance, self.tile = tolerance, tile
        order, sizes, item = split_into_tiles(features, counts, tile)
        # Short tiles are padded with copies of their last point, which receive but whose values stay zero.
        slots = torch.arange(tile, device=features.device)
        self._strip_tiles = max(1, min(CHUNK // tile, len(sizes)))
        self._source = order[(sizes.cumsum(0) - sizes)[:, None] + slots.minimum(sizes[:, None] - 1)]  # (T, tile)
        self._real = slots < sizes[:, None]  # (T, tile)
        self._features = features[self._source]  # (T, tile, D)
        low, high = self._features.double().aminmax(dim=1)  # (T, D)
        self._centre = ((low + high) / 2).to(features)  # (T, D)
        radius = (self._features.double() - self._centre[:, None].double()).square().sum(2).amax(1).sqrt()
        a = self._features - self._centre[:, None]
        half = -0.5 * a.square().sum(2, keepdim=True)
        self._receivers = LOG2E * torch.cat([a, half, torch.ones_like(half)], 2)  # (T, tile, D + 2)
        self._wide: list[bool] = (radius > MAX_RADIUS[features.dtype]).tolist()
        self.rounding_bound = self._bound_rounding(radius, max(counts, default=0))
        self._columns, self.error_bound = self._choose_pairs(low, high, sizes, item)
        computed = sum(n * int(sizes[columns].sum()) for n, columns in zip(sizes.tolist(), self._columns, strict=True))
        self.kept_fraction = computed / max(1, sum(n * n for n in counts))

    def plan(self) -> list[Tensor]:
        """The tensors that `from_plan` makes the same engine from."""
        columns = torch.cat(self._columns) if self._columns else self._source.new_empty(0)
        counts = torch.tensor([len(part) for part in self._columns], device=columns.device)
        wide = torch.tensor(self._wide, device=columns.device)
        return [self._source, self._real, self._features, self._centre, self._receivers, wide, columns, counts]

    @classmethod
    def from_plan(
        cls, plan: Sequence[Tensor], features: Tensor, counts: list[int], precision: object = None
    ) -> ExactEngine:
        """The engine that was built from these features and counts, without its bounds."""
        engine = cls.__new__(cls)
        (engine.P, engine.D), engine.tile = features.shape, plan[0].shape[1]
        engine._source, engine._real, engine._features, engine._centre, engine._receivers, wide, columns, rows = plan
        engine._wide, engine._columns = wide.tolist(), list(columns.split(rows.tolist()))
        engine._strip_tiles = max(1, min(CHUNK // engine.tile, len(wide)))
        return engine

    @staticmethod
    def plan_sizes(P: int, D: int, items: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor of the plan the largest shape, and its dtype; None for that of the features."""
        T = (P + TILE - 1) // TILE + items  # every item may end in a short tile
        tiles = [((T, TILE), torch.int64), ((T, TILE), torch.bool), ((T, TILE, D), None)]
        pairs = [((T * T,), torch.int64), ((T,), torch.int64)]
        return [*tiles, ((T, D), None), ((T, TILE, D + 2), None), ((T,), torch.bool), *pairs]

    def _choose_pairs(
        self,
        low: Tensor,  # (T, D) float64, boxes of the tiles
        high: Tensor,
        sizes: Tensor,  # (T,), points in each tile
        item: Tensor,  # (T,), batch item of each tile
    ) -> tuple[list[Tensor], float]:
        """Column tiles kept by each row tile, and the error bound reached."""
        columns: list[Tensor] = []
        bound = 0.0
        tiles_of_item = torch.unique_consecutive(item, return_counts=True)[1].tolist()  # empty items have none
        for tiles in torch.arange(len(sizes), device=low.device).split(tiles_of_item):
            T, n = len(tiles), sizes[tiles].double()
            row_sums = self._row_sums(tiles, n)  # (T,), from below
            skip = torch.empty(T, T, dtype=torch.bool, device=low.device)
            for rows in torch.arange(T, device=low.device).split(max(1, BOUND_ENTRIES // T)):
                nearest = squared_gaps(low[tiles], high[tiles], rows)
                # The mass beyond each of LEVELS distances, from above, tells the nearest that a row may skip from.
                level = (nearest * LEVELS_PER_UNIT).clamp_(max=LEVELS - 1).long()
                mass = nearest.mul_(-0.5).exp_().mul_(n)
                beyond = _sums_from(mass.new_zeros(len(rows), LEVELS).scatter_add_(1, level, mass))
                beyond /= row_sums[rows, None]
                allowed = beyond <= self.tolerance  # false, then true from the cut on
                skip[rows] = allowed.gather(1, level)
                bound = max(bound, float((beyond * allowed).max()))
            keep = ~(skip & skip.T)
            columns.extend(tiles[row.nonzero()[:, 0]] for row in keep)
        return columns, bound

    def _row_sums(self, tiles: Tensor, n: Tensor) -> Tensor:
        """A lower bound of (K 1)_i over the points of each of one item's tiles, ``(T,)`` float64; ``n``: their sizes.

        By convexity, sum_(j in J) exp(-d_ij² / 2) >= n_J exp(-mean_j d_ij² / 2), and the mean of d_ij² over a tile is
        |f_i - mean_J|² + variance_J: a tile costs one kernel entry. The point itself contributes at least 1.
        """
        points, real = self._features[tiles].double(), self._real[tiles][..., None]
        mean = (points * real).sum(1) / n[:, None]  # (T, D)
        variance = ((points - mean[:, None]).square() * real).sum((1, 2)) / n  # (T,)
        weight = (n * torch.exp(-0.5 * variance)).to(self._features)
        sums = self._features.new_zeros(len(tiles), self.tile)
        b, kernel = self._buffers()
        for i, row in enumerate(tiles.tolist()):
            for part, w in zip(mean.split(len(b)), weight.split(len(b)), strict=True):
                sums[i] += w @ self._kernel(row, part, b, kernel)[1]
        return (sums.amin(1).double() * (1 - self.rounding_bound)).clamp(min=1)

    def _bound_rounding(self, radius: Tensor, N: int) -> float:
        """Worst case of rounding, relative to (K 1)_i max|v|. u: unit of rounding; R: radius of the row tile.

        Exponent: D + 6 roundings of terms that add up to (|a| + |b|)²/2 <= (2R + d)²/2 <= 4R² + d² at distance d, so
        K_ij is off by u (D + 6) (4R² + d²) K_ij; the mean of d² under K is below 4 log N + 2, since entries beyond
        d² = 2 log N sum to less than the point's own. Wide tiles take differences first: R = 0. Sum: one rounding per
        term of a chunk and one per chunk, in whatever order a matrix product adds.
        """
        u = torch.finfo(self._features.dtype).eps / 2
        R = float(radius[radius <= MAX_RADIUS[self._features.dtype]].max()) if not all(self._wide) else 0.0
        terms = min(N, CHUNK) + self.tile + N / CHUNK
        return u * ((self.D + 6) * (4 * R * R + 4 * math.log(max(N, 1)) + 2) + terms + 4)

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        """(row tile, kept column tiles), a long row in several strips."""
        for row, columns in enumerate(self._columns):
            for part in columns.tensor_split(math.ceil(len(columns) / self._strip_tiles)):
                yield row, part

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Room for one strip: ``[b, 1, -|b|²/2]`` and K."""
        n = self._strip_tiles * self.tile
        return self._features.new_ones(n, self.D + 2), self._features.new_empty(n, self.tile)

    def _kernel(
        self,
        row: int,
        points: Tensor,  # (n, D)
        b: Tensor,  # buffers
        kernel: Tensor,
    ) -> tuple[Tensor, Tensor]:  # (n, D + 2), (n, tile)
        """The kernel between a row tile and some points, and those points about the tile's centre: [b, 1, -|b|²/2]."""
        D, n = self.D, len(points)
        b, kernel = b[:n], kernel[:n]
        centred = torch.sub(points, self._centre[row], out=b[:, :D])
        if self._wide[row]:
            rows = self._features[row]  # (tile, D)
            kernel.zero_()
            for d in range(D):
                difference = (points[:, d, None] - rows[:, d]).to(kernel)
                kernel.addcmul_(difference, difference, value=-0.5 * LOG2E)
        else:
            b[:, D + 1] = centred.square() @ centred.new_full((D,), -0.5)
            torch.mm(b, self._receivers[row].T, out=kernel)
        return b, kernel.exp2_()

    def _points(self, columns: Tensor) -> Tensor:  # (n, D)
        return self._features.index_select(0, columns).view(-1, self.D)

    def _to_tiles(self, values: Tensor) -> Tensor:  # (P, C) → (T, tile, C), zero in the padding
        return values[self._source].masked_fill_(~self._real[..., None], 0)

    def _to_points(self, out: Tensor) -> Tensor:  # (T, C, tile) → (P, C)
        result = out.new_empty(self.P, out.shape[1])
        result[self._source[self._real]] = out.mT[self._real]
        return result

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """``K values``, ``(P, C) → (P, C)``. K is symmetric: ``transpose`` changes nothing."""
        C = values.shape[1]
        values = self._to_tiles(values)
        out = values.new_zeros(len(values), C, self.tile)
        buffers = self._buffers()
        for row, columns in self._strips():
            _, kernel = self._kernel(row, self._points(columns), *buffers)
            v = values.index_select(0, columns).view(-1, C)
            out[row].addmm_(v.T, kernel)  # small times large: (C, n) @ (n, tile)
        return self._to_points(out)

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * apply(values))`` to the features, each point as sender and receiver.

        dF_i = sum_j K_ij (g_i·v_j + v_i·g_j) (f_j - f_i), over the pairs kept.
        """
        C, D = values.shape[1], self.D
        receivers = self._to_tiles(torch.cat([values, grad], 1)).mT.contiguous()  # (T, 2C, tile)
        senders = self._to_tiles(torch.cat([grad, values], 1))  # (T, tile, 2C)
        out = values.new_zeros(len(senders), D, self.tile)
        buffers = self._buffers()
        weights = torch.empty_like(buffers[1])
        for row, columns in self._strips():
            points = self._points(columns)
            b, kernel = self._kernel(row, points, *buffers)
            w = torch.mm(senders.index_select(0, columns).view(-1, 2 * C), receivers[row], out=weights[: len(b)])
            w *= kernel
            rows = self._features[row]  # (tile, D)
            if self._wide[row]:
                for d in range(D):
                    out[row, d] += (points[:, d, None] - rows[:, d]).mul_(w).sum(0)
            else:
                sums = b[:, : D + 1].T @ w  # (D + 1, tile): sum_j w_ij b_j, and sum_j w_ij
                out[row] += sums[:D] - sums[D] * (rows - self._centre[row]).T
        return self._to_points(out)

    def diagonal(self) -> Tensor:
        """K_ii ``(P,)``: ones."""
        return self._features.new_ones(self.P)


def _sums_from(x: Tensor) -> Tensor:  # (R, n) → (R, n)
    """Of each entry and all after it. CUDA has no deterministic cumulated sum of real numbers, but it has products."""
    return x @ torch.ones_like(x[:1]).expand(x.shape[1], -1).tril() if x.is_cuda else x.flip(1).cumsum(1).flip(1)


def squared_gaps(low: Tensor, high: Tensor, rows: Tensor) -> Tensor:
    """Squared least distance between points of box i in ``rows`` and of any box j, ``(rows, T)``."""
    nearest = low.new_zeros(len(rows), len(low))
    for d in range(low.shape[1]):
        gap = torch.maximum(low[:, d] - high[rows, d, None], low[rows, d, None] - high[:, d])
        nearest += gap.clamp_(min=0).square_()
    return nearest
