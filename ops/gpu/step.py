"""The fused mean-field step in Triton: one pass over memory forward, one backward. Definition: ops/step.py.

    e = unary + sum_k s_k h_k  or  - sum_k A_k h_k,    h_k = f_k m_k,    q = softmax(e)

    dL/de = q (g - <q, g>)  or  g,    dL/dh_k = s_k dL/de  or  - A_k^T dL/de,
    dL/dm_k = f_k dL/dh_k,    dL/df_k = <m_k, dL/dh_k>,    dL/ds_k = sum_i h_k dL/de,    dL/dA_k = - sum_i dL/de h_k^T

with <,> over the labels of a pixel. A tile holds whole pixels, all labels of each, unless they are more than
`LONGEST_ROW`: then the labels pass by in parts, twice. Sums over pixels are made tile by tile and added up afterwards,
in the same order every time. Kernels: step_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import on_device_of
from .step_kernels import RUN_TIME, step_backward_kernel, step_kernel
from .target import TARGETS, Build, Target, target_of
from .tune import pick

# TILE numbers in a tile of vector couplings, whose height follows from the width that the labels need
CONFIGS: dict[str, list[dict[str, int]]] = {
    name: [
        {"TILE": 2048, "num_warps": 4, "num_stages": 1},
        {"TILE": 1024, "num_warps": 4, "num_stages": 1},
        {"TILE": 4096, "num_warps": 8, "num_stages": 1},
    ]
    for name in TARGETS
}
# BLOCK pixels in a tile where a coupling is a matrix: a matrix unit takes 64 rows at once
MATRIX_CONFIGS: dict[str, list[dict[str, int]]] = {
    name: [
        {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
    ]
    for name in TARGETS
}
LONGEST_ROW = 1024  # labels that a tile holds at once

NAMES = ("message0", "factor0", "coupling0", "message1", "factor1", "coupling1")
Terms = Sequence[Tensor | None]  # those, None where they are not there


def _blocks(C: int, matrix: bool, config: dict[str, int]) -> dict[str, int | bool]:
    """Compile-time constants of a launch."""
    if matrix:  # tl.dot wants at least 16
        return {"BLOCK": config["BLOCK"], "BLOCK_C": max(16, triton.next_power_of_2(C)), "WHOLE": True}
    block_c = min(LONGEST_ROW, max(2, triton.next_power_of_2(C)))
    return {"BLOCK": max(1, config["TILE"] // block_c), "BLOCK_C": block_c, "WHOLE": C <= block_c}


def _matrices(terms: Terms) -> tuple[bool, bool]:
    first, second = (coupling is not None and coupling.ndim == 2 for coupling in terms[2::3])
    return first, second


def _steps(terms: Terms, N: int) -> dict[str, int]:
    """From item to item in each factor."""
    return {f"factor{k}_step": N if f is not None and len(f) > 1 else 0 for k, f in enumerate(terms[1::3])}


def _configs(matrix: tuple[bool, bool], target: Target) -> list[dict[str, int]]:
    return (MATRIX_CONFIGS if any(matrix) else CONFIGS)[target.name]


def _forward(marginals: bool, unary: Tensor, terms: Terms) -> Tensor:
    """The marginals or e, from contiguous tensors."""
    B, N, C = unary.shape
    out = torch.empty_like(unary)
    matrix, target = _matrices(terms), target_of(unary)

    def run(config: dict[str, int]) -> None:
        blocks = _blocks(C, any(matrix), config)
        step_kernel[(B * triton.cdiv(N, blocks["BLOCK"]),)](
            unary, out=out, N=N, C=C, **dict(zip(NAMES, terms, strict=True)), **_steps(terms, N),
            MATRIX0=matrix[0], MATRIX1=matrix[1], MARGINALS=marginals, PRECISION=target.float32_dot,
            num_warps=config["num_warps"], num_stages=config["num_stages"], **blocks,
        )  # fmt: skip

    if out.numel():
        key = (C, B * N, matrix, terms[0] is not None, terms[3] is not None, marginals)
        with on_device_of(unary):
            run(pick("step", key, _configs(matrix, target), run, unary))
    return out


def _gradients(grad: Tensor, q: Tensor | None, terms: Terms, wants: Sequence[bool]) -> list[Tensor | None]:
    """Gradients to the unary and to each of the terms' tensors, where wanted; messages that none needs may be None."""
    B, N, C = grad.shape
    grad = grad.contiguous()
    matrix, target = _matrices(terms), target_of(grad)
    by_matrix = [matrix[k] and wants[3 + 3 * k] for k in (0, 1)]
    outputs: dict[str, Tensor | None] = {
        "grad_energy": torch.empty_like(grad) if wants[0] or any(by_matrix) else None,
        **{f"grad_message{k}": torch.empty_like(grad) if wants[1 + 3 * k] else None for k in (0, 1)},
        **{f"grad_factor{k}": grad.new_empty(B, N, 1) if wants[2 + 3 * k] else None for k in (0, 1)},
        "grad_coupling0": None,
        "grad_coupling1": None,
    }

    def run(config: dict[str, int]) -> None:
        blocks = _blocks(C, any(matrix), config)
        programs = B * triton.cdiv(N, blocks["BLOCK"])
        for k in (0, 1):  # sums over pixels come in parts, one from each program
            if wants[3 + 3 * k] and not matrix[k]:
                outputs[f"grad_coupling{k}"] = grad.new_empty(programs, C)
        step_backward_kernel[(programs,)](
            grad, q, N=N, C=C, **dict(zip(NAMES, terms, strict=True)), **outputs, **_steps(terms, N),
            TERM0=any(wants[1:4]), TERM1=any(wants[4:]), MATRIX0=matrix[0], MATRIX1=matrix[1],
            PRECISION=target.float32_dot, num_warps=config["num_warps"], num_stages=config["num_stages"], **blocks,
        )  # fmt: skip

    if grad.numel():
        key = (C, B * N, matrix, tuple(wants), q is not None)
        with on_device_of(grad):
            run(pick("step_backward", key, _configs(matrix, target), run, grad))
    results = [outputs["grad_energy"] if wants[0] else None]
    for k in (0, 1):
        message, factor, coupling = terms[3 * k : 3 * k + 3]
        to_factor, to_coupling = outputs[f"grad_factor{k}"], outputs[f"grad_coupling{k}"]
        if to_factor is not None and factor is not None and len(factor) < B:
            to_factor = to_factor.sum(0, keepdim=True)
        if to_coupling is not None:
            to_coupling = to_coupling.sum(0)
        elif by_matrix[k]:
            energy = outputs["grad_energy"]
            assert message is not None and energy is not None
            heard = (message if factor is None else message * factor).view(-1, C)
            with torch.autocast(grad.device.type, enabled=False):
                to_coupling = -(energy.view(-1, C).mT @ heard)
        elif wants[3 + 3 * k] and coupling is not None:  # there are no pixels
            to_coupling = torch.zeros_like(coupling)
        results += [outputs[f"grad_message{k}"], to_factor, to_coupling]
    return results


def _needed(terms: Terms, wants: Sequence[bool]) -> list[Tensor | None]:
    """What the gradients are made of: a message only for those of its factor and coupling."""
    idle = [name.startswith("message") and not (wants[k + 2] or wants[k + 3]) for k, name in enumerate(NAMES)]
    return [None if leave else tensor for tensor, leave in zip(terms, idle, strict=True)]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, marginals: bool, unary: Tensor, *terms: Tensor | None) -> Tensor:
        out = _forward(marginals, unary, terms)
        ctx.save_for_backward(out if marginals else None, *_needed(terms, ctx.needs_input_grad[1:]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, *terms = ctx.saved_tensors
        return None, *_gradients(grad, q, terms, ctx.needs_input_grad[1:])


# The same for graphs, which cannot look into a launch: operations with tensors in and out, and shapes known before.


@torch.library.custom_op("crfnet::step", mutates_args=())
def _graph_step(
    marginals: bool,
    unary: Tensor,
    message0: Tensor | None,
    factor0: Tensor | None,
    coupling0: Tensor | None,
    message1: Tensor | None,
    factor1: Tensor | None,
    coupling1: Tensor | None,
) -> Tensor:
    return _forward(marginals, unary, (message0, factor0, coupling0, message1, factor1, coupling1))


@_graph_step.register_fake
def _(marginals: bool, unary: Tensor, *terms: Tensor | None) -> Tensor:
    return torch.empty_like(unary)


@torch.library.custom_op("crfnet::step_backward", mutates_args=())
def _graph_gradients(
    grad: Tensor,
    q: Tensor | None,
    message0: Tensor | None,
    factor0: Tensor | None,
    coupling0: Tensor | None,
    message1: Tensor | None,
    factor1: Tensor | None,
    coupling1: Tensor | None,
    wants: Sequence[bool],
) -> list[Tensor]:
    """Only what is wanted, in order."""
    terms = (message0, factor0, coupling0, message1, factor1, coupling1)
    return [gradient for gradient in _gradients(grad, q, terms, wants) if gradient is not None]


@_graph_gradients.register_fake
def _(grad: Tensor, q: Tensor | None, *rest: Any) -> list[Tensor]:
    *terms, wants = rest
    shapes = [grad if name.startswith("message") else tensor for name, tensor in zip(NAMES, terms, strict=True)]
    return [grad.new_empty(like.shape) for like, want in zip([grad, *shapes], wants, strict=True) if want]


def _graph_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    marginals, unary, *terms = inputs
    ctx.wants = [tensor is not None and tensor.requires_grad for tensor in (unary, *terms)]
    ctx.save_for_backward(output if marginals else None, *_needed(terms, ctx.wants))


def _graph_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(_graph_gradients(grad, *ctx.saved_tensors, ctx.wants))
    return None, *(next(gradients) if want else None for want in ctx.wants)


_graph_step.register_autograd(_graph_backward, setup_context=_graph_save)


def fused_step(
    unary: Tensor,  # (B, N, C) float32
    messages: Sequence[Tensor],  # at most two, (B, N, C)
    factors: Sequence[Tensor | None],  # (B or 1, N, 1)
    couplings: Sequence[Tensor],  # (C,), or (C, C) for C <= 64
    *,
    marginals: bool,
) -> Tensor:  # (B, N, C)
    """As `ops.step.step`."""
    terms: list[Tensor | None] = []
    for term in zip(messages, factors, couplings, strict=True):
        terms += [None if tensor is None else tensor.contiguous() for tensor in term]
    terms += [None] * (len(NAMES) - len(terms))
    apply = _graph_step if torch.compiler.is_compiling() else _Step.apply
    out: Tensor = apply(marginals, unary.contiguous(), *terms)
    return out


def builds(target: Target) -> Iterator[Build]:
    """Each tile's fullest forms, forward and backward; other launches leave out terms, factors or gradients of these.

    Tiles of every width in the default configuration; other heights for the labels of VOC and for the widest.
    """
    default, *others = CONFIGS[target.name]
    for exponent in range(1, LONGEST_ROW.bit_length()):
        for config in [default, *(others if 2**exponent in (32, LONGEST_ROW) else [])]:
            for terms in (0, 2):
                yield _forward_build(target, 2**exponent, config, terms)
            yield _backward_build(target, 2**exponent, config)
    yield _forward_build(target, LONGEST_ROW + 1, default, 2)
    yield _backward_build(target, LONGEST_ROW + 1, default)
    for C in (16, 32, 64):
        for config in MATRIX_CONFIGS[target.name]:
            yield _forward_build(target, C, config, 2, matrices=True)
            yield _backward_build(target, C, config, matrices=True)


def _forward_build(target: Target, C: int, config: dict[str, int], terms: int, matrices: bool = False) -> Build:
    pointers = ["unary", *(f"{what}{k}" for k in range(terms) for what in ("message", "factor", "coupling")), "out"]
    constants = {"MATRIX0": matrices, "MATRIX1": matrices, "MARGINALS": True}
    return _build(target, step_kernel, pointers, constants, C, config, matrices)


def _backward_build(target: Target, C: int, config: dict[str, int], matrices: bool = False) -> Build:
    """Every gradient wanted."""
    kinds = ["message", "factor"] if matrices else ["message", "factor", "coupling"]
    pointers = ["grad", "q", *(f"{what}{k}" for k in (0, 1) for what in ("message", "factor", "coupling"))]
    pointers += ["grad_energy", *(f"grad_{what}{k}" for k in (0, 1) for what in kinds)]
    constants = {"TERM0": True, "TERM1": True, "MATRIX0": matrices, "MATRIX1": matrices}
    return _build(target, step_backward_kernel, pointers, constants, C, config, matrices)


def _build(
    target: Target,
    kernel: Any,
    pointers: list[str],
    constants: dict[str, Any],
    C: int,
    config: dict[str, int],
    matrices: bool,
) -> Build:
    constants = {**constants, "PRECISION": target.float32_dot, **_blocks(C, matrices, config)}
    types = {name: "*fp32" for name in kernel.arg_names if name in pointers} | dict.fromkeys(RUN_TIME, "i32")
    absent = {name: None for name in kernel.arg_names if name not in types and name not in constants}
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    return Build(kernel, types, {**absent, **constants}, options, matrix=matrices)
