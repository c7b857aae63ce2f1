"""What a mean-field update does at each pixel by itself, once its messages are there.

    e_i = unary_i + sum_k s_k (f_k,i m_k,i)    or, for a matrix,    - sum_k A_k (f_k,i m_k,i);    q_i = softmax(e_i)

``s_k`` is a vector of strengths, ``A_k`` a matrix whose entry (a, b) is what hearing label b costs label a, and ``f_k``
the receiver's normalisation, which rides along since everything else is read here anyway. On a GPU it is one pass over
memory, and one more for all gradients: `gpu.step`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gpu

MATRIX_LABELS = 64  # beyond, a product with a matrix of couplings is large enough to be worth a kernel of its own


def step(
    unary: Tensor,
    messages: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    couplings: Sequence[Tensor],
    *,
    marginals: bool,
) -> Tensor:
    """The marginals ``(B, N, C)``, or the logits ``e`` they are the softmax of.

    Args:
        unary: ``(B, N, C)`` logits.
        messages: of each term, ``(B, N, C)``.
        factors: of each term, ``(B, N, 1)``, or ``(1, N, 1)`` for all items alike, or None for 1.
        couplings: of each term, strengths ``(C,)`` or costs ``(C, C)``.
        marginals: whether to return q rather than e; without terms, e is the unary itself.

    Gradients reach everything; on a GPU once only.
    """
    if gpu.serves(unary):
        return _step_on_gpu(unary, list(messages), list(factors), list(couplings), marginals)
    energy = unary
    for m, f, coupling in zip(messages, factors, couplings, strict=True):
        m = m if f is None else m * f
        energy = torch.addcmul(energy, m, coupling) if coupling.ndim == 1 else energy - m @ coupling.mT
    return energy.softmax(2) if marginals else energy


def _step_on_gpu(
    energy: Tensor, messages: list[Tensor], factors: list[Tensor | None], couplings: list[Tensor], marginals: bool
) -> Tensor:
    from .gpu.step import fused_step

    with torch.autocast(energy.device.type, enabled=False):
        for k, coupling in enumerate(couplings):
            if coupling.ndim == 2 and len(coupling) > MATRIX_LABELS:
                # a factor is one number a pixel, so that it can as well come after the matrix
                messages[k], couplings[k] = messages[k] @ coupling.mT, coupling.new_full((len(coupling),), -1.0)
        while len(messages) > 2:
            energy = fused_step(energy, messages[:2], factors[:2], couplings[:2], marginals=False)
            del messages[:2], factors[:2], couplings[:2]
        if not messages and not marginals:
            return energy
        return fused_step(energy, messages, factors, couplings, marginals=marginals)
