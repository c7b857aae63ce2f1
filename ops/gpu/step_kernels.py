"""The kernels of the fused mean-field step; formulas, launches and sizes of tiles are in step.py.

A tile is [BLOCK pixels, BLOCK_C labels]. Terms that are not there, and gradients that nobody wants, are None.
"""

import triton
import triton.language as tl

RUN_TIME = ["N", "C", "factor0_step", "factor1_step"]  # one build serves all of their values, 1 included
MATRIX_PART = tl.constexpr(16)  # columns of a matrix of couplings that a program multiplies by at once

# Offsets are a scalar of 64 bits to the program's first pixel, then 32 bits an element, which saves registers.


@triton.jit
def _pixels(N, C, factor0_step, factor1_step, BLOCK: tl.constexpr):
    """Pixels of this program that exist, and offsets to the first in (B N, C), in (B N) and in each factor."""
    blocks = tl.cdiv(N, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    row = item * N + first
    return N - first, row * C, row, item * factor0_step + first, item * factor1_step + first


@triton.jit
def _heard(message, factor, first, factor_first, at, inside, pixel, pixels):
    """What is heard, h = f m; 0 outside."""
    heard = tl.load(message + first + at, mask=inside, other=0.0)
    if factor is not None:
        heard *= tl.load(factor + factor_first + pixel, mask=pixel < pixels, other=0.0)[:, None]
    return heard


@triton.jit
def _add_term(
    energy, message, factor, coupling, first, factor_first, at, inside, pixel, pixels, label, C,
    MATRIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``energy`` and what one term adds to it, [BLOCK, BLOCK_C]."""
    if MATRIX:  # a part of the labels at a time: whole rows would not fit in the registers
        BLOCK_B: tl.constexpr = min(MATRIX_PART, energy.shape[1])
        for start in range(0, C, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            at_b = pixel[:, None] * C + b[None, :]
            inside_b = (pixel[:, None] < pixels) & (b[None, :] < C)
            heard = _heard(message, factor, first, factor_first, at_b, inside_b, pixel, pixels)
            both = (b[:, None] < C) & (label[None, :] < C)
            cost = tl.load(coupling + label[None, :] * C + b[:, None], mask=both, other=0.0)  # A^T, [BLOCK_B, BLOCK_C]
            energy = tl.dot(-heard, cost, energy, input_precision=PRECISION)
        return energy
    heard = _heard(message, factor, first, factor_first, at, inside, pixel, pixels)
    return energy + heard * tl.load(coupling + label, mask=label < C, other=0.0)[None, :]


@triton.jit
def _energy(
    unary, message0, factor0, coupling0, message1, factor1, coupling1,
    first, factor0_first, factor1_first, pixel, pixels, label, C,
    MATRIX0: tl.constexpr, MATRIX1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits e, [BLOCK, BLOCK_C]."""
    at = pixel[:, None] * C + label[None, :]
    inside = (pixel[:, None] < pixels) & (label[None, :] < C)
    energy = tl.load(unary + first + at, mask=inside, other=0.0)
    if message0 is not None:
        energy = _add_term(
            energy, message0, factor0, coupling0, first, factor0_first, at, inside, pixel, pixels, label, C,
            MATRIX0, PRECISION,
        )  # fmt: skip
    if message1 is not None:
        energy = _add_term(
            energy, message1, factor1, coupling1, first, factor1_first, at, inside, pixel, pixels, label, C,
            MATRIX1, PRECISION,
        )  # fmt: skip
    return energy


@triton.jit(do_not_specialize=RUN_TIME)
def step_kernel(
    unary, message0, factor0, coupling0, message1, factor1, coupling1, out,  # what is None is not there
    N, C, factor0_step, factor1_step,  # N pixels, C labels; steps of factors from item to item, 0 where all share one
    MATRIX0: tl.constexpr, MATRIX1: tl.constexpr, MARGINALS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK pixels."""
    pixels, first, _, factor0_first, factor1_first = _pixels(N, C, factor0_step, factor1_step, BLOCK)
    pixel, label = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    if WHOLE:
        result = _energy(
            unary, message0, factor0, coupling0, message1, factor1, coupling1,
            first, factor0_first, factor1_first, pixel, pixels, label, C, MATRIX0, MATRIX1, PRECISION,
        )  # fmt: skip
        if MARGINALS:
            result = tl.where(label[None, :] < C, result, float("-inf"))
            power = tl.exp(result - tl.max(result, 1)[:, None])
            result = power * (1.0 / tl.sum(power, 1))[:, None]
        inside = (pixel[:, None] < pixels) & (label[None, :] < C)
        tl.store(out + first + (pixel[:, None] * C + label[None, :]), result, mask=inside)
    else:
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        if MARGINALS:
            for start in range(0, C, BLOCK_C):
                energy = _energy(
                    unary, message0, factor0, coupling0, message1, factor1, coupling1,
                    first, factor0_first, factor1_first, pixel, pixels, start + label, C, MATRIX0, MATRIX1, PRECISION,
                )  # fmt: skip
                energy = tl.where(start + label[None, :] < C, energy, float("-inf"))
                higher = tl.maximum(top, tl.max(energy, 1))
                total = total * tl.exp(top - higher) + tl.sum(tl.exp(energy - higher[:, None]), 1)
                top = higher
        for start in range(0, C, BLOCK_C):
            result = _energy(
                unary, message0, factor0, coupling0, message1, factor1, coupling1,
                first, factor0_first, factor1_first, pixel, pixels, start + label, C, MATRIX0, MATRIX1, PRECISION,
            )  # fmt: skip
            if MARGINALS:
                result = tl.exp(result - top[:, None]) * (1.0 / total)[:, None]
            inside = (pixel[:, None] < pixels) & (start + label[None, :] < C)
            tl.store(out + first + (pixel[:, None] * C + start + label[None, :]), result, mask=inside)


@triton.jit
def _send_back(
    to_heard, message, factor, grad_message, first, factor_first, at, inside, pixel, pixels, WANTS_FACTOR: tl.constexpr
):
    """From dL/dh write dL/dm; return dL/df, [BLOCK]."""
    to_factor = tl.zeros((to_heard.shape[0],), tl.float32)
    if WANTS_FACTOR:
        to_factor = tl.sum(tl.load(message + first + at, mask=inside, other=0.0) * to_heard, 1)
    if grad_message is not None:
        if factor is not None:
            to_heard *= tl.load(factor + factor_first + pixel, mask=pixel < pixels, other=0.0)[:, None]
        tl.store(grad_message + first + at, to_heard, mask=inside)
    return to_factor


@triton.jit
def _term_backward(
    grad, message, factor, coupling, grad_message, grad_coupling,
    first, factor_first, at, inside, pixel, pixels, label, C,
    WANTS_FACTOR: tl.constexpr, MATRIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one term's gradients, from dL/de; return this part's share of dL/df, [BLOCK]."""
    to_factor = tl.zeros((grad.shape[0],), tl.float32)
    if (grad_message is not None) or WANTS_FACTOR:
        if MATRIX:
            BLOCK_B: tl.constexpr = min(MATRIX_PART, grad.shape[1])
            for start in range(0, C, BLOCK_B):
                b = start + tl.arange(0, BLOCK_B)
                both = (label[:, None] < C) & (b[None, :] < C)
                cost = tl.load(coupling + label[:, None] * C + b[None, :], mask=both, other=0.0)  # [BLOCK_C, BLOCK_B]
                to_factor += _send_back(
                    tl.dot(-grad, cost, input_precision=PRECISION), message, factor, grad_message, first, factor_first,
                    pixel[:, None] * C + b[None, :], (pixel[:, None] < pixels) & (b[None, :] < C), pixel, pixels,
                    WANTS_FACTOR,
                )  # fmt: skip
        else:
            to_factor = _send_back(
                grad * tl.load(coupling + label, mask=label < C, other=0.0)[None, :], message, factor, grad_message,
                first, factor_first, at, inside, pixel, pixels, WANTS_FACTOR,
            )  # fmt: skip
    if grad_coupling is not None:
        heard = _heard(message, factor, first, factor_first, at, inside, pixel, pixels)
        part = grad_coupling + tl.program_id(0).to(tl.int64) * C
        tl.store(part + label, tl.sum(grad * heard, 0), mask=label < C)
    return to_factor


@triton.jit
def _backward(
    grad, message0, factor0, coupling0, message1, factor1, coupling1,
    grad_energy, grad_message0, grad_factor0, grad_coupling0, grad_message1, grad_factor1, grad_coupling1,
    first, factor0_first, factor1_first, pixel, pixels, label, C,
    TERM0: tl.constexpr, TERM1: tl.constexpr, MATRIX0: tl.constexpr, MATRIX1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what depends on a part of the labels, from dL/de; return its shares of dL/df_0 and dL/df_1, [BLOCK]."""
    at = pixel[:, None] * C + label[None, :]
    inside = (pixel[:, None] < pixels) & (label[None, :] < C)
    if grad_energy is not None:
        tl.store(grad_energy + first + at, grad, mask=inside)
    to_factor0 = tl.zeros((grad.shape[0],), tl.float32)
    to_factor1 = tl.zeros((grad.shape[0],), tl.float32)
    if TERM0:
        to_factor0 = _term_backward(
            grad, message0, factor0, coupling0, grad_message0, grad_coupling0,
            first, factor0_first, at, inside, pixel, pixels, label, C, grad_factor0 is not None, MATRIX0, PRECISION,
        )  # fmt: skip
    if TERM1:
        to_factor1 = _term_backward(
            grad, message1, factor1, coupling1, grad_message1, grad_coupling1,
            first, factor1_first, at, inside, pixel, pixels, label, C, grad_factor1 is not None, MATRIX1, PRECISION,
        )  # fmt: skip
    return to_factor0, to_factor1


@triton.jit(do_not_specialize=RUN_TIME)
def step_backward_kernel(
    grad, q, message0, factor0, coupling0, message1, factor1, coupling1,  # without q, grad is that of e
    grad_energy, grad_message0, grad_factor0, grad_coupling0, grad_message1, grad_factor1, grad_coupling1,
    N, C, factor0_step, factor1_step,  # grad_factors are (B, N), grad_couplings (programs, C); None is not wanted
    TERM0: tl.constexpr, TERM1: tl.constexpr, MATRIX0: tl.constexpr, MATRIX1: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program writes all gradients of BLOCK pixels."""
    pixels, first, row, factor0_first, factor1_first = _pixels(N, C, factor0_step, factor1_step, BLOCK)
    pixel, label = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    to_factor0 = tl.zeros((BLOCK,), tl.float32)
    to_factor1 = tl.zeros((BLOCK,), tl.float32)
    if WHOLE:
        at = pixel[:, None] * C + label[None, :]
        inside = (pixel[:, None] < pixels) & (label[None, :] < C)
        g = tl.load(grad + first + at, mask=inside, other=0.0)
        if q is not None:
            marginal = tl.load(q + first + at, mask=inside, other=0.0)
            # <q, g> is taken off twice: where q is nearly 1 little is left, and the second time frees it of rounding
            g -= tl.sum(marginal * g, 1)[:, None]
            g = marginal * (g - tl.sum(marginal * g, 1)[:, None])
        to_factor0, to_factor1 = _backward(
            g, message0, factor0, coupling0, message1, factor1, coupling1,
            grad_energy, grad_message0, grad_factor0, grad_coupling0, grad_message1, grad_factor1, grad_coupling1,
            first, factor0_first, factor1_first, pixel, pixels, label, C, TERM0, TERM1, MATRIX0, MATRIX1, PRECISION,
        )  # fmt: skip
    else:
        slope = tl.zeros((BLOCK,), tl.float32)  # <q, g>
        if q is not None:
            for _ in range(2):  # twice, as above
                rest = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, C, BLOCK_C):
                    at = pixel[:, None] * C + start + label[None, :]
                    inside = (pixel[:, None] < pixels) & (start + label[None, :] < C)
                    g = tl.load(grad + first + at, mask=inside, other=0.0) - slope[:, None]
                    rest += tl.sum(tl.load(q + first + at, mask=inside, other=0.0) * g, 1)
                slope += rest
        for start in range(0, C, BLOCK_C):
            at = pixel[:, None] * C + start + label[None, :]
            inside = (pixel[:, None] < pixels) & (start + label[None, :] < C)
            g = tl.load(grad + first + at, mask=inside, other=0.0)
            if q is not None:
                g = tl.load(q + first + at, mask=inside, other=0.0) * (g - slope[:, None])
            share0, share1 = _backward(
                g, message0, factor0, coupling0, message1, factor1, coupling1,
                grad_energy, grad_message0, grad_factor0, grad_coupling0, grad_message1, grad_factor1, grad_coupling1,
                first, factor0_first, factor1_first, pixel, pixels, start + label, C,
                TERM0, TERM1, MATRIX0, MATRIX1, PRECISION,
            )  # fmt: skip
            to_factor0 += share0
            to_factor1 += share1
    if grad_factor0 is not None:
        tl.store(grad_factor0 + row + pixel, to_factor0, mask=pixel < pixels)
    if grad_factor1 is not None:
        tl.store(grad_factor1 + row + pixel, to_factor1, mask=pixel < pixels)
