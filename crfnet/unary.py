"""Unaries for mean field: logits from what people have, probabilities or a label map.

unary_i(l) = -log p_i(l),    logits = -unary
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import kind


def logits_from_probabilities(probabilities: Tensor, eps: float = 1e-5) -> Tensor:
    """Log p, with p clipped from below so that a probability of 0 is unlikely instead of impossible.

    Args:
        probabilities: ``(B, C, *S)`` in 0..1, floating point; they need not sum to 1 exactly.
        eps: smallest probability, in (0, 1); pydensecrf's ``unary_from_softmax`` clips at 1e-5 too.

    Returns:
        logits ``(B, C, *S)``, at least float32.

    Raises:
        TypeError: ``probabilities`` is not a floating-point tensor.
        ValueError: a probability is NaN, negative or above 1, or ``eps`` is out of range.
    """
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be a floating-point tensor, got {kind(probabilities)}")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")
    if probabilities.numel():
        low, high = float(probabilities.detach().min()), float(probabilities.detach().max())
        if not (low >= -1e-3 and high <= 1.0 + 1e-3):  # a softmax or a resampling may be a rounding outside
            raise ValueError(
                f"probabilities must lie in 0..1, got {low:g} to {high:g}; logits go to the CRF as they are"
            )
    return probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)).clamp(min=eps).log()


def logits_from_labels(
    labels: Tensor, num_classes: int, confidence: float = 0.7, ignore_index: int | None = 255
) -> Tensor:
    """Logits of a label map: ``confidence`` for the given label, the rest shared equally by the others.

    Args:
        labels: ``(B, *S)`` integers in 0..num_classes - 1, or ``ignore_index`` where the label is unknown: such a pixel
            gets the same logit for every class.
        num_classes: number of labels ``C``.
        confidence: probability of the given label, from 1 / C (no information) to below 1.
        ignore_index: the value of unknown pixels; None where there is none.

    Returns:
        logits ``(B, C, *S)`` float32, logarithms of probabilities.

    Raises:
        TypeError: ``labels`` is not an integer tensor.
        ValueError: a label is out of range, or ``confidence`` or ``num_classes`` is.
    """
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {kind(labels)}")
    if labels.ndim < 2:
        raise ValueError(f"labels must be (B, H, W) or have 1 or 3 axes in place of (H, W), got {tuple(labels.shape)}")
    labels = labels.long()
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if num_classes > 1 and not 1.0 / num_classes <= confidence < 1.0:
        raise ValueError(f"confidence must lie in [1 / {num_classes}, 1), got {confidence}")
    unknown = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    known = labels[~unknown]
    low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1} or be {ignore_index}, got {low} to {high}")
    sure = torch.tensor(confidence if num_classes > 1 else 1.0)
    others = (1.0 - sure) / max(1, num_classes - 1)
    given = labels.masked_fill(unknown, 0).unsqueeze(1)
    logits = torch.full((labels.shape[0], num_classes, *labels.shape[1:]), float(others.clamp(min=1e-30).log()))
    logits = logits.to(labels.device).scatter_(1, given, float(sure.log()))
    return logits.masked_fill(unknown.unsqueeze(1), -float(torch.tensor(float(num_classes)).log()))
