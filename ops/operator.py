"""K for one guide as an operator on values ``(B, N, C)``: an engine on the points that take part, zero elsewhere.

    out_i = sum_j K_ij v_j,    K_ij = exp(-|f_i - f_j|² / 2)

Which engine computes it follows from the method and from where the features are: the Triton kernels on a GPU, plain
PyTorch elsewhere. All of this is detached; gradients are attached in `filter` and, for compiled graphs, in `traced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .exact import ExactEngine
from .gpu import host_may_read, serves
from .lattice import LatticeEngine

Method = Literal["auto", "exact", "lattice"]
METHODS: tuple[str, ...] = get_args(Method)
Precision = Literal["float32", "tf32", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

AUTO_EXACT_POINTS = 4096  # up to here "auto" computes all pairs: tens of milliseconds on a CPU, and no error to discuss
MAX_FEATURE = 1e6  # bandwidths from the origin; beyond, float32 positions are no longer fractions of a bandwidth


class Engine(Protocol):
    """What computes K v for points that are known to be good: packed, finite, without masked ones, detached."""

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """K v or K^T v, ``(P, C)`` to ``(P, C)``."""

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(P, D)``: gradient of ``sum(grad * apply(values))`` with respect to the features."""

    def diagonal(self) -> Tensor:
        """``(P,)``: K_ii."""

    def plan(self) -> list[Tensor]:
        """The tensors that `from_plan` makes the same engine from, as `plan_sizes` announces them or shorter."""


class PlannedEngine(Engine, Protocol):
    """An engine that a compiled graph can carry from one operation to the next, as a list of tensors."""

    @classmethod
    def from_plan(
        cls, plan: Sequence[Tensor], features: Tensor, counts: list[int], precision: Precision = "tf32"
    ) -> Engine:
        """The engine that was built from these features and counts."""

    @staticmethod
    def plan_sizes(P: int, D: int, items: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Of each tensor of the plan the largest shape for ``P`` points, and its dtype; None for that of the features.

        Only the first axis may turn out shorter.
        """


class Operator:
    """K for the points of a guide.

    Args:
        features: ``(B, N, D)`` float32 or float64; no gradients are recorded.
        mask: ``(B, N)`` bool, True where a point takes part, at least one in each item; None for everywhere.
        method: "exact" or "lattice", or "auto" for exact up to `AUTO_EXACT_POINTS` points an item.
        tolerance: of the exact engine.
        precision: of the exact engine on a GPU; float32 whatever is asked for where self-messages go.
        remove_self: leave out j = i.

    Attributes:
        method: "exact" or "lattice".
        engine: on the points that take part, packed.
        inside: ``(P,)`` rows of ``(B N)`` that take part; None for all.

    Raises:
        ValueError: a feature of a point that takes part is not finite or too large. Not checked while a CUDA graph is
            captured, when the host must not read the device; features that are not finite give NaN then.
    """

    def __init__(
        self,
        features: Tensor,
        mask: Tensor | None,
        *,
        method: Method,
        tolerance: float,
        precision: Precision,
        remove_self: bool,
    ) -> None:
        B, N, D = features.shape
        capturing = not host_may_read(features)
        points = features.detach().reshape(B * N, D)
        self.inside: Tensor | None = None
        counts = [N] * B
        if mask is not None:
            if capturing:
                raise RuntimeError(
                    "a mask cannot be used while a CUDA graph is captured: the host must count its points"
                )
            if not bool(mask.all()):
                self.inside = mask.reshape(-1).nonzero().view(-1)
                points, counts = points[self.inside], mask.sum(1).tolist()
        points = points.contiguous()
        if not capturing:
            _check_span(points)
        if remove_self:  # what is taken away must be what was sent, to the last bits
            precision = "float32"
        self.method: Method = "exact" if max(counts) <= AUTO_EXACT_POINTS else "lattice"
        if method != "auto":
            self.method = method
        self.engine: Engine
        if not serves(points):
            exact = self.method == "exact"
            self.engine = ExactEngine(points, counts, tolerance) if exact else LatticeEngine(points, counts)
        elif self.method == "exact":
            from .gpu.exact import TritonExactEngine

            self.engine = TritonExactEngine(points, counts, tolerance, precision)
        else:
            from .gpu.lattice import TritonLatticeEngine

            self.engine = TritonLatticeEngine(points, counts)
        self._diagonal = self.engine.diagonal()[:, None] if remove_self else None

    def apply(self, values: Tensor, transpose: bool = False) -> Tensor:
        """K v or K^T v, ``(B, N, C)`` of the features' dtype to a new tensor of the same shape."""
        packed = self._pack(values)
        out = self.engine.apply(packed, transpose)
        if self._diagonal is not None:
            out = torch.addcmul(out, self._diagonal, packed, value=-1)
        return self._unpack(out, values)

    def feature_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """``(B, N, D)``: gradient of ``sum(grad * apply(values))`` with respect to the features.

        A point's message to itself has none: its distance to itself stays 0.
        """
        return self._unpack(self.engine.feature_gradient(self._pack(values), self._pack(grad)), values)

    def _pack(self, values: Tensor) -> Tensor:  # (B, N, C) → (P, C) contiguous
        rows = values.reshape(-1, values.shape[2])
        return rows.contiguous() if self.inside is None else rows[self.inside]

    def _unpack(self, rows: Tensor, like: Tensor) -> Tensor:  # (P, C) → (B, N, C)
        if self.inside is not None:
            rows = rows.new_zeros(like.shape[:2].numel(), rows.shape[1]).index_copy(0, self.inside, rows)
        return rows.view(*like.shape[:2], -1)


def _check_span(points: Tensor) -> None:
    """Waits for a GPU, once."""
    largest = float(points.abs().max())
    if not largest <= MAX_FEATURE:  # NaN too
        raise ValueError(
            f"features must be finite and at most {MAX_FEATURE:g} bandwidths from 0, got {largest:g}; "
            "is a bandwidth too small, or a pixel NaN that a mask should leave out?"
        )
