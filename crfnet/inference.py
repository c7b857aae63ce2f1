"""Mean field without gradients: the updates of `meanfield`, faster.

    q = 2^e / sum 2^e,    e_i(a) <- u_i(a) + sum_k s_k(a) m_k,i(a),    e, u and s in bits

Powers of two take a fraction of the time of exponentials. Filters that are normalised by the receiver pass on no more
than they are sent, so a message never exceeds 1 and what the terms add to a logit is bounded by their couplings: once
each pixel's largest unary is 0, no power can overflow nor all of them vanish, and nobody searches for the largest
logit. The image is worked through in pieces that stay in a core's cache from the message to the new marginals. Labels
that no longer matter are taken as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .meanfield import Term, mean_field

BITS = 1.0 / math.log(2.0)
LARGEST_EXPONENT = 60.0  # 2^±60 and any sum of such are far inside float32
PIECE = 2**18  # numbers in a piece of the image, a megabyte
GROUP_AFTER = (1, 2, 4)  # iterations, counted from 0, after which quiet labels are looked for


@dataclass(frozen=True)
class _Columns:
    """What competes at each pixel: labels, and at last perhaps the rest of them as one."""

    unary: Tensor  # (B N, L), in bits
    couplings: list[Tensor]  # of each term, in bits: strengths (L,) or a matrix (L, L)
    labels: Tensor  # those with a column of their own


def infer(
    logits: Tensor, terms: Sequence[Term], num_iterations: int, *, row: int, label_tolerance: float = 0.0
) -> Tensor:
    """Logits of the marginals, ``(B, N, C)``, for terms with filters normalised "after".

    Where couplings are strengths, labels whose messages together change no marginal by ``label_tolerance`` in an
    iteration become one label, the rest. Its marginal times the messages it hears bounds what one iteration errs in any
    marginal; should that ever pass the tolerance, all is done anew with every label for itself.

    Args:
        logits: ``(B, N, C)``, finite.
        terms: the kernels.
        num_iterations: mean-field updates.
        row: pixels in a row of the image; a piece is a number of whole rows.
        label_tolerance: 0 keeps every label for itself.
    """
    B, N, C = logits.shape
    bound = sum(float(term.coupling.abs().reshape(C, -1).sum(1).amax()) for term in terms)
    if bound * BITS > LARGEST_EXPONENT or num_iterations == 0 or not terms:
        return mean_field(logits, terms, num_iterations)
    unary = torch.empty((B, N, C), dtype=logits.dtype, device=logits.device)
    torch.sub(logits, logits.amax(2, keepdim=True), out=unary).mul_(BITS)
    couplings = [term.coupling * BITS for term in terms]
    columns = every = _Columns(unary.view(B * N, C), couplings, torch.arange(C, device=logits.device))
    may_group = label_tolerance > 0.0 and all(coupling.ndim == 1 for coupling in couplings)
    q, new = torch.empty_like(every.unary), torch.empty_like(every.unary)
    _marginals(every.unary, out=q)
    for iteration in range(num_iterations):
        last, grouped = iteration + 1 == num_iterations, len(columns.labels) < C
        look = grouped or (may_group and iteration in GROUP_AFTER)
        effect = q.new_zeros(row * q.shape[1])  # largest marginal times messages heard, of each column, place by place
        for start, stop, energy in _sweep(columns, terms, q.view(B, N, -1), row):
            marginals = _marginals(energy, out=new[start:stop])
            if look:
                change = torch.sub(energy, columns.unary[start:stop]).mul_(marginals)
                effect = torch.maximum(effect, change.view(-1, len(effect)).amax(0))
            if last:
                new[start:stop] = energy
        q, new = new, q
        if grouped and float(effect[q.shape[1] - 1 :: q.shape[1]].amax()) > label_tolerance:
            return infer(logits, terms, num_iterations, row=row)
        if look and not (grouped or last):
            columns, q = _group(every, q, effect.view(row, C).amax(0), label_tolerance)
            new = torch.empty_like(q)
    return _ungroup(every, columns, q).mul_(1.0 / BITS).view(B, N, C)


def _sweep(columns: _Columns, terms: Sequence[Term], q: Tensor, row: int) -> Iterator[tuple[int, int, Tensor]]:
    """One update, piece by piece: start and stop, in pixels of ``(B N)``, and the new energies there."""
    B, N, L = q.shape
    size = max(1, PIECE // (L * row)) * row
    uniform = [coupling.ndim == 1 and bool((coupling == coupling[0]).all()) for coupling in columns.couplings]
    hear = [term.filter.send(q) for term in terms]
    for start in (item * N + pixel for item in range(B) for pixel in range(0, N, size)):
        stop = min(start + size, (start // N + 1) * N)
        energy = columns.unary[start:stop]
        for receive, coupling, same in zip(hear, columns.couplings, uniform, strict=True):
            message, factor = receive(start, stop)
            if same:  # strength and normalisation in one pass
                energy = torch.addcmul(energy, message, coupling[:1] if factor is None else factor * coupling[0])
                continue
            message = message if factor is None else message * factor
            energy = energy + message * coupling if coupling.ndim == 1 else energy - message @ coupling.mT
        yield start, stop, energy


def _marginals(energy: Tensor, out: Tensor) -> Tensor:
    """softmax(energy log 2), for energies that need no shift."""
    torch.exp2(energy, out=out)
    out /= out @ out.new_ones(out.shape[1], 1)
    return out


def _group(every: _Columns, q: Tensor, effect: Tensor, tolerance: float) -> tuple[_Columns, Tensor]:
    """Labels of least effect become the rest, as long as their effects add up to little of the tolerance."""
    quiet = effect.sort()
    rest = quiet.indices[quiet.values.cumsum(0) < 0.2 * tolerance]
    if 4 * len(rest) < len(effect):  # moving columns costs about as much as filtering a few
        return every, q
    absent = torch.zeros(len(effect), dtype=torch.bool, device=q.device).index_fill_(0, rest, True)
    labels = (~absent).nonzero().view(-1)
    # columns are picked and added up by a product with zeros and ones, much faster than by their numbers
    pick = torch.cat([torch.eye(len(effect)).to(q)[:, labels], absent.to(q)[:, None]], 1)
    unary = every.unary @ pick
    unary[:, -1:] = (every.unary.exp2() @ pick[:, -1:]).clamp_(min=2.0**-100).log2_()
    couplings = [torch.cat([c[labels], c[absent].amax()[None]]) for c in every.couplings]
    return _Columns(unary, couplings, labels), q @ pick


def _ungroup(every: _Columns, columns: _Columns, energy: Tensor) -> Tensor:
    """``(B N, C)`` again: each label of the rest has heard what the rest has."""
    if len(columns.labels) == every.unary.shape[1]:
        return energy
    heard = energy[:, -1:] - columns.unary[:, -1:]
    return (every.unary + heard).index_copy_(1, columns.labels, energy[:, :-1])
