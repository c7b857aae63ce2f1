"""Losses for pixel labels: L = -(1/M) sum over the M labelled pixels i of log softmax(logits_i)[labels_i]."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the pixels that carry a label.

    DeepLab calls it a sum but divides by the number of valid pixels (its Caffe layer does), as here; a batch without
    any labelled pixel gives 0, with zero gradients, instead of 0 / 0.

    Args:
        logits: (B, L, *S), any real values.
        labels: (B, *S) int64, 0..L-1 or ``ignore_index``.
        ignore_index: label of the pixels left out.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"logits (B, L, *S) and labels (B, *S) must belong together, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)
