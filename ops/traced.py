"""Message passing as registered operations, for graphs: torch.compile, torch.export, CUDA graphs of compiled code.

A graph can carry only tensors. `crfnet::build` therefore turns features into the tensors that an engine consists of,
its plan, and the others apply the plan: `crfnet::apply` K v or K^T v, `crfnet::feature_gradient` the gradient of
sum(g K v).
Every shape follows from those of the arguments alone, so nothing breaks a graph: where an engine does not know before
how many vertices or pairs it will find, the plan has room for as many as there can be, and its last tensor, on the CPU,
says how many there are. Engines on a GPU need no such count unless there is a mask.

Code that runs eagerly keeps its engine as an object and needs none of this; see `filter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .exact import ExactEngine
from .gpu import serves
from .lattice import LatticeEngine
from .operator import AUTO_EXACT_POINTS, Method, Operator, PlannedEngine, Precision


class TracedOperator:
    """What `Operator` is to eager code, for code that is being compiled; arguments as there.

    "auto" counts all points of an item here, masked or not, since a graph does not see how many a mask leaves.
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
        if method == "auto":
            method = "exact" if features.shape[1] <= AUTO_EXACT_POINTS else "lattice"
        self.method, self._mask, self._remove_self = method, mask, remove_self
        self._precision = "float32" if remove_self else precision
        self._plan = build(features.detach(), mask, method, tolerance, precision, remove_self)

    def apply(self, features: Tensor, values: Tensor) -> Tensor:
        """K v ``(B, N, C)``, with gradients to features and values."""
        out: Tensor = apply(self._plan, features, values, self._mask, self.method, self._precision, False)
        return out


@torch.library.custom_op("crfnet::build", mutates_args=())
def build(
    features: Tensor, mask: Tensor | None, method: str, tolerance: float, precision: str, remove_self: bool
) -> list[Tensor]:
    """The plan: the engine's tensors, K_ii where self-messages go (else empty), and how long the others are."""
    operator = Operator(
        features,
        mask,
        method=cast(Method, method),
        tolerance=tolerance,
        precision=cast(Precision, precision),
        remove_self=remove_self,
    )
    plan = operator.engine.plan()
    diagonal = operator._diagonal
    plan.append(features.new_empty(0, 1) if diagonal is None else diagonal)
    sizes = _sizes(features, method, remove_self)
    lengths = torch.tensor([len(tensor) for tensor in plan], device="cpu")
    if serves(features) and mask is None:
        lengths = features.new_empty(0, dtype=torch.int64)  # nobody asks, and graphs on a GPU want no CPU tensors
    return [_padded(tensor, shape) for tensor, (shape, _) in zip(plan, sizes, strict=True)] + [lengths]


@build.register_fake
def _(
    features: Tensor, mask: Tensor | None, method: str, tolerance: float, precision: str, remove_self: bool
) -> list[Tensor]:
    sizes = _sizes(features, method, remove_self)
    plan = [features.new_empty(shape, dtype=dtype or features.dtype) for shape, dtype in sizes]
    if serves(features) and mask is None:
        return plan + [features.new_empty(0, dtype=torch.int64)]
    return plan + [torch.empty(len(plan), dtype=torch.int64, device="cpu")]


def _apply(
    plan: Sequence[Tensor],
    features: Tensor,
    values: Tensor,
    mask: Tensor | None,
    method: str,
    precision: str,
    transpose: bool,
) -> Tensor:
    """K v or K^T v, ``(B, N, C)`` contiguous."""
    return _restore(plan, features, mask, method, precision).apply(values, transpose).contiguous()


apply = torch.library.custom_op("crfnet::apply", _apply, mutates_args=())
# for backward, without an autograd of its own: differentiated once more it would miss the way to the features
apply_once = torch.library.custom_op("crfnet::apply_once", _apply, mutates_args=())


@apply_once.register_fake
@apply.register_fake
def _like_values(plan: Sequence[Tensor], features: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.custom_op("crfnet::feature_gradient", mutates_args=())
def feature_gradient(
    plan: Sequence[Tensor],
    features: Tensor,
    values: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    method: str,
    precision: str,
) -> Tensor:
    """``(B, N, D)``: gradient of sum(grad * K values) with respect to the features."""
    return _restore(plan, features, mask, method, precision).feature_gradient(values, grad).contiguous()


@feature_gradient.register_fake
def _(plan: Sequence[Tensor], features: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plan, features, values, mask, ctx.method, ctx.precision, ctx.transpose = inputs
    ctx.tensors = len(plan)
    ctx.save_for_backward(*plan, features, values if features.requires_grad else None, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *plan, features, values, mask = ctx.saved_tensors
    by_features = by_values = None
    if ctx.needs_input_grad[2]:
        by_values = apply_once(plan, features.detach(), grad, mask, ctx.method, ctx.precision, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        v, g = (grad, values) if ctx.transpose else (values, grad)
        by_features = feature_gradient(plan, features.detach(), v, g, mask, ctx.method, ctx.precision)
    return [None] * ctx.tensors, by_features, by_values, None, None, None, None


apply.register_autograd(_backward, setup_context=_save)


def _engine_class(features: Tensor, method: str) -> type[PlannedEngine]:
    if not serves(features):
        return ExactEngine if method == "exact" else LatticeEngine
    if method == "exact":
        from .gpu.exact import TritonExactEngine

        return TritonExactEngine
    from .gpu.lattice import TritonLatticeEngine

    return TritonLatticeEngine


def _sizes(features: Tensor, method: str, remove_self: bool) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
    B, N, D = features.shape
    sizes = _engine_class(features, method).plan_sizes(B * N, D, B)
    return [*sizes, ((B * N if remove_self else 0, 1), None)]


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.contiguous()
    room = tensor.new_zeros(shape)
    room[: len(tensor)] = tensor
    return room


def _restore(plan: Sequence[Tensor], features: Tensor, mask: Tensor | None, method: str, precision: str) -> Operator:
    """The operator again. With a mask, or on a CPU, the plan's tensors are cut to the lengths that it had."""
    B, N, D = features.shape
    *tensors, lengths = plan
    operator = Operator.__new__(Operator)
    operator.method, operator.inside = cast(Method, method), None
    points, counts = features.reshape(B * N, D), [N] * B
    if mask is not None and not bool(mask.all()):
        operator.inside = mask.reshape(-1).nonzero().view(-1)
        points, counts = points[operator.inside], mask.sum(1).tolist()
    if mask is not None or not serves(features):
        tensors = [tensor[:length] for tensor, length in zip(tensors, lengths.tolist(), strict=True)]
    *tensors, diagonal = tensors
    operator.engine = _engine_class(features, method).from_plan(
        tensors, points.contiguous(), counts, cast(Precision, precision)
    )
    operator._diagonal = diagonal if len(diagonal) else None
    return operator
