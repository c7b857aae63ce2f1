"""The one door to message passing: a Gaussian filter built once for a guide and applied many times.

    out_i = sum_j exp(-|f_i - f_j|² / 2) v_j

for features ``(B, N, D)`` already divided by their bandwidths and values ``(B, N, C)``; any B, N, D and C. Everything
that holds for every engine lives here: checks, masks, the removal of self-messages, normalisation and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gpu import capturing, host_may_read
from .lattice import LatticeEngine
from .operator import METHODS, PRECISIONS, Engine, Method, Operator, Precision
from .reference import EPS, NORMALIZATIONS, SELF_FLOOR, Normalization, normalized
from .traced import TracedOperator


class GaussianFilter:
    """Gaussian filtering over every pair of points, built once for a guide.

    Args:
        features: ``(B, N, D)``, each column divided by its bandwidth, so that 1 is one standard deviation. float16 and
            bfloat16 are filtered in float32.
        method: "exact" sums all pairs that matter, with an error bound; "lattice" approximates them in linear time on
            the permutohedral lattice, to a few percent if normalised, but unnormalised ("none") its sums are off by
            half on photographs; "auto" is exact up to 4096 points and the lattice beyond.
        normalization: "none", "before" K(v/n), "after" (Kv)/n or "symmetric" n^-1/2 K(n^-1/2 v), with n = K 1.
        mask: ``(B, N)`` bool, True where a point takes part; the others neither send nor receive and get 0, whatever
            their features and values, NaN included.
        tolerance: of the exact engine, the largest fraction of a row's kernel mass that it may leave out.
        remove_self: leave out j = i, as the equations of the dense CRF do and its implementations do not. What is left
            is more sensitive to every error; on the lattice prefer "after" or "symmetric" with it.
        precision: of products of kernel entries and values in the exact engine on a GPU: "float32", or with matrix
            units "tf32" or "fp16", whose operands have 10 bits after the point; `error_bound` includes it. Everything
            else is float32 anyway, a CPU knows nothing else, and with ``remove_self`` it is float32 whatever is asked.

    Gradients reach the values, exactly transposed, and the features; see ``ops/README.md`` for which gradient.

    Raises:
        TypeError: an argument is not a tensor of the wanted dtype.
        ValueError: an argument has the wrong shape, device or range, or an item has no point that takes part.

    Sources: Krähenbühl and Koltun, arXiv:1210.5644, section 3; Adams et al., Eurographics 2010.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        method: Method = "auto",
        normalization: Normalization = "none",
        mask: Tensor | None = None,
        tolerance: float = 3e-4,
        remove_self: bool = False,
        precision: Precision = "tf32",
    ) -> None:
        _check_features(features, mask)
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
        self.shape = tuple(features.shape[:2])
        self.normalization, self.remove_self = normalization, remove_self
        self._features = features.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(features.device.type, enabled=False):
            kind = TracedOperator if torch.compiler.is_compiling() else Operator
            self._operator: Operator | TracedOperator = kind(
                self._features,
                mask,
                method=method,
                tolerance=tolerance,
                precision=precision,
                remove_self=remove_self,
            )
        self._row_sums: Tensor | None = None  # (B, N, 1) n = K 1, kept where it carries no gradient

    @property
    def method(self) -> str:
        """The engine in use, "exact" or "lattice"."""
        return self._operator.method

    @property
    def engine(self) -> Engine:
        """What computes K v for the points that take part."""
        assert isinstance(self._operator, Operator)  # a compiled graph carries its tensors only
        return self._operator.engine

    @property
    def error_bound(self) -> float | None:
        """What the exact engine guarantees: |out_i - exact_i| <= error_bound (K 1)_i max|v|, rounding included.

        That is for "none"; None for the lattice, which guarantees nothing.
        """
        if self.method == "lattice":
            return None
        engine: Any = self.engine
        return float(engine.error_bound + engine.rounding_bound)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``(B, N, C)`` of any floating dtype; the result has their shape and dtype."""
        self._check_values(values)
        with torch.autocast(values.device.type, enabled=False):
            out = normalized(self._apply, values.to(self._features.dtype), self._sums(), self.normalization)
        return out.to(values.dtype)

    def factor(self, like: Tensor) -> Tensor | None:
        """What a `message` still has to be multiplied by, ``(B, N, 1)``, or None. Prepares the row sums in any case."""
        with torch.autocast(like.device.type, enabled=False):
            sums = self._sums()
        return sums.clamp(min=EPS).reciprocal() if sums is not None and self.normalization == "after" else None

    def message(self, values: Tensor) -> Tensor:
        """The same but for `factor`, for callers who multiply by something anyway."""
        if self.normalization != "after":
            return self(values)
        self._check_values(values)
        with torch.autocast(values.device.type, enabled=False):
            return self._apply(values.to(self._features.dtype))

    def send(self, values: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
        """Filter values ``(B, N, C)`` piece by piece, without gradients, for callers that keep pieces in the cache.

        Returns:
            a function of start and stop, points of ``(B N)``: what they receive, ``(stop - start, C)``, and their
            factors ``(stop - start, 1)`` or None.
        """
        operator = self._operator
        engine = operator.engine if isinstance(operator, Operator) and operator.inside is None else None
        simple = not self.remove_self and self.normalization in ("none", "after")
        if not (simple and isinstance(engine, LatticeEngine) and values.dtype == self._features.dtype):
            out = self(values).flatten(0, 1)
            return lambda start, stop: (out[start:stop], None)
        self._check_values(values)
        with torch.autocast(values.device.type, enabled=False):
            sums = self._sums()
            lattice = engine.send(values.flatten(0, 1))
        factors = None if sums is None else sums.clamp(min=EPS).reciprocal().flatten(0, 1)
        return lambda start, stop: (
            engine.receive(lattice, start, stop),
            None if factors is None else factors[start:stop],
        )

    def _check_values(self, values: Any) -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"values must be a floating-point tensor, got {_kind(values)}")
        if values.ndim != 3 or tuple(values.shape[:2]) != self.shape:
            raise ValueError(f"values must be ({self.shape[0]}, {self.shape[1]}, C), got {tuple(values.shape)}")
        if values.shape[2] == 0:
            raise ValueError(f"values must have at least one channel, got {tuple(values.shape)}")
        if values.device != self._features.device:
            raise ValueError(f"values must be on {self._features.device} like the features, got {values.device}")

    def _apply(self, values: Tensor) -> Tensor:  # (B, N, C) → (B, N, C)
        operator = self._operator
        if isinstance(operator, TracedOperator):
            return operator.apply(self._features, values)
        out: Tensor = _Apply.apply(self._features, values, operator)
        return out

    def _sums(self) -> Tensor | None:
        if self.normalization == "none":
            return None
        differentiable = self._features.requires_grad and torch.is_grad_enabled()
        if self._row_sums is not None and not differentiable:
            return self._row_sums
        n = self._apply(self._features.new_ones(*self.shape, 1))
        if self.remove_self:
            n = n.clamp(min=SELF_FLOOR)
        if not (n.requires_grad or capturing(n)):  # what is captured holds nothing before the graph runs
            self._row_sums = n
        return n


def gaussian_filter(
    features: Tensor,
    values: Tensor,
    *,
    method: Method = "auto",
    normalization: Normalization = "none",
    mask: Tensor | None = None,
    tolerance: float = 3e-4,
    remove_self: bool = False,
    precision: Precision = "tf32",
) -> Tensor:
    """Filter values ``(B, N, C)`` once with features ``(B, N, D)``; see :class:`GaussianFilter` for the arguments."""
    build = GaussianFilter(
        features,
        method=method,
        normalization=normalization,
        mask=mask,
        tolerance=tolerance,
        remove_self=remove_self,
        precision=precision,
    )
    return build(values)


class _Apply(torch.autograd.Function):
    """values ↦ K values, with gradients to the values (K^T g) and to the features that K was built from."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, values: Tensor, operator: Operator) -> Tensor:
        ctx.operator = operator
        # features only so that autograd notices when somebody has changed them since: the engine still reads them
        ctx.save_for_backward(values if ctx.needs_input_grad[0] else None, features)
        return operator.apply(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, _ = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            by_values = ctx.operator.apply(grad, transpose=True) if ctx.needs_input_grad[1] else None
            by_features = ctx.operator.feature_gradient(values, grad) if ctx.needs_input_grad[0] else None
        return by_features, by_values, None


def _check_features(features: Any, mask: Any) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"features must be a floating-point tensor, got {_kind(features)}")
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features must be (B, N, D), none of them 0, got {tuple(features.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a point takes part, got {_kind(mask)}")
    if mask.shape != features.shape[:2] or mask.device != features.device:
        raise ValueError(
            f"mask must be {tuple(features.shape[:2])} on {features.device} like the features, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    if host_may_read(mask) and not bool(mask.any(1).all()):
        empty = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"mask must leave at least one point in every item, got none in item {empty}")


def _kind(thing: Any) -> str:
    return f"{thing.dtype}" if isinstance(thing, Tensor) else type(thing).__name__
