"""Mean-field inference: the parallel update of all marginals.

    q = softmax(e),    e_i(a) <- logits_i(a) - sum_k sum_b mu(a, b) [W_k m_k,i](b),    m_k = K_k q

One iteration, in this order: normalisation, message passing, weighting, compatibility transform, adding the unary.
Weighting and compatibility are one matrix, the coupling ``A_k = mu W_k``. What a coupling adds to every label of a
pixel alike changes no marginal, so Potts and per-class models need no matrix: their coupling is a vector of strengths,
``e_i(a) <- logits_i(a) + sum_k s_k(a) m_k,i(a)``.

Sources: Krähenbühl and Koltun, arXiv:1210.5644, Algorithm 1; Zheng et al., arXiv:1502.03240, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .ops import GaussianFilter, GridFilter


@dataclass(frozen=True)
class Term:
    """One kernel's part of an update."""

    filter: GaussianFilter | GridFilter
    coupling: Tensor  # (C,) strengths: what hearing one's own label is worth; or (C, C): what hearing label b costs a


def update(logits: Tensor, q: Tensor, terms: Sequence[Term]) -> Tensor:
    """The new logits of the marginals, ``(B, N, C)``, from the marginals ``q``."""
    energy = logits
    for term in terms:
        message = term.filter(q)
        if term.coupling.ndim == 1:
            energy = torch.addcmul(energy, message, term.coupling)
        else:
            energy = energy - message @ term.coupling.mT
    return energy


def mean_field(
    logits: Tensor, terms: Sequence[Term], num_iterations: int, *, damping: float = 0.0, recompute: bool = False
) -> Tensor:
    """Run the updates, differentiably; ``recompute`` stores one ``(B, N, C)`` an iteration and computes the rest anew.

    Damping ``d`` moves the logits of the marginals only ``1 - d`` of the way; the fixed points stay the same.
    """

    def step(energy: Tensor) -> Tensor:
        new = update(logits, energy.softmax(2), terms)
        return new if damping == 0.0 else torch.lerp(new, energy, damping)

    logits = logits.contiguous()
    energy = logits if num_iterations else logits.clone()  # the result is the caller's own
    for _ in range(num_iterations):
        energy = checkpoint(step, energy, use_reentrant=False) if recompute else step(energy)
    return energy
