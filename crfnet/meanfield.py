"""Mean-field inference: the parallel update of all marginals.

    q = softmax(e),    e_i(a) <- logits_i(a) - sum_k sum_b mu(a, b) [W_k m_k,i](b),    m_k = K_k q

One iteration, in this order: normalisation, message passing, weighting, compatibility transform, adding the unary.
Weighting and compatibility are one matrix, the coupling ``A_k = mu W_k``. What a coupling adds to every label of a
pixel alike changes no marginal, so Potts and per-class models need no matrix: their coupling is a vector of strengths,
``e_i(a) <- logits_i(a) + sum_k s_k(a) m_k,i(a)``.

Sources: Krähenbühl and Koltun, arXiv:1210.5644, Algorithm 1; Zheng et al., arXiv:1502.03240, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .ops import GaussianFilter, GridFilter
from .ops.step import step


@dataclass(frozen=True)
class Term:
    """One kernel's part of an update."""

    filter: GaussianFilter | GridFilter
    coupling: Tensor  # (C,) strengths: what hearing one's own label is worth; or (C, C): what hearing label b costs a


def factors(logits: Tensor, terms: Sequence[Term]) -> list[Tensor | None]:
    """What the messages of each term are normalised by where the receiver does it; the same in every update."""
    return [term.filter.factor(logits) for term in terms]


def update(
    logits: Tensor, q: Tensor, terms: Sequence[Term], factors: Sequence[Tensor | None], *, marginals: bool = False
) -> Tensor:
    """The new logits of the marginals, ``(B, N, C)``, from the marginals ``q``; or the new marginals themselves."""
    messages = [term.filter.message(q) for term in terms]
    return step(logits, messages, factors, [term.coupling for term in terms], marginals=marginals)


def mean_field(
    logits: Tensor, terms: Sequence[Term], num_iterations: int, *, damping: float = 0.0, recompute: bool = False
) -> Tensor:
    """Run the updates, differentiably; ``recompute`` stores one ``(B, N, C)`` an iteration and computes the rest anew.

    Damping ``d`` moves the logits of the marginals only ``1 - d`` of the way; the fixed points stay the same.
    """

    def run(function: Callable[..., Tensor], *inputs: Tensor | bool) -> Tensor:
        if not recompute:
            return function(*inputs)
        # nothing here is random, and a CUDA graph cannot ask for the state of a generator
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def damped(energy: Tensor) -> Tensor:
        return torch.lerp(update(logits, softmax(energy), terms, normalizers), energy, damping)

    def undamped(q: Tensor, last: bool) -> Tensor:
        return update(logits, q, terms, normalizers, marginals=not last)

    logits = logits.contiguous()
    if num_iterations == 0 or not terms:
        return logits.clone()  # the result is the caller's own
    normalizers = factors(logits, terms)
    if damping > 0.0:
        energy = logits
        for _ in range(num_iterations):
            energy = run(damped, energy)
        return energy
    q = softmax(logits)
    for iteration in range(num_iterations):
        q = run(undamped, q, iteration + 1 == num_iterations)
    return q  # of the last iteration the logits


def softmax(energy: Tensor) -> Tensor:
    """The marginals, ``(B, N, C)``."""
    return step(energy, [], [], [], marginals=True)
