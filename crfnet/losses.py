"""Losses for pixel labels: L = -(1/M) sum over the M labelled pixels i of log softmax(logits_i)[labels_i].

Several processes, or several scales, each know a part of that sum and of M: hence parts, a sum and what divides it.

| loss | resolution | divided by | of |
| --- | --- | --- | --- |
| `full_resolution` | the image's | labelled pixels | |
| `full_resolution` of ``normalize=False`` | the image's | images | FCN's and CRF-RNN's released nets |
| `at_scores` | the scores', 1/8 | labelled pixels | DeepLab |
| `multi_scale` | 1/8 of three losses, 1/16 of one | labelled pixels, each its own | DeepLab v2's three scales |
| `both_labellings` | the image's | labelled pixels, or images | FCN's two heads for SIFT Flow |
| `through_crf` | the image's | labelled pixels, or images | CRF-RNN; padding is no part of the CRF |
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.models.geometry import subsample_labels

Part = tuple[Tensor, Tensor | float]  # a sum over pixels, and what it is to be divided by


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
    total, count = cross_entropy_part(logits, labels, ignore_index=ignore_index)
    return total / count.clamp_min(1)


def cross_entropy_part(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy, and the number of labelled pixels; arguments as of `cross_entropy`."""
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"logits (B, L, *S) and labels (B, *S) must belong together, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    count = (labels != ignore_index).sum()
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # torch's own for images adds in any order
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum"), count


def full_resolution(network: nn.Module, batch: Sequence[Tensor], *, normalize: bool = True) -> list[Part]:
    """Of logits at the image's size: image ``(B, G, H, W)``, labels ``(B, H, W)``, and whatever else the batch has."""
    image, labels, *_ = batch
    total, count = cross_entropy_part(network(image), labels)
    return [(total, count if normalize else len(image))]


def at_scores(network: nn.Module, batch: Sequence[Tensor]) -> list[Part]:
    """Of the scores themselves and the labels that lie at them; for DeepLab's networks."""
    image, labels, *_ = batch
    inner: Any = getattr(network, "module", network)  # of DistributedDataParallel
    return [cross_entropy_part(network(image, upsample=False), inner.subsample(labels))]


def multi_scale_parts(scores: Sequence[Tensor], labels: Tensor, *, ignore_index: int = 255) -> list[Part]:
    """The four cross-entropies of `multi_scale_loss`, each as a sum and its number of labels."""
    if any(n % 32 != 1 for n in labels.shape[-2:]):
        raise ValueError(
            f"labels must have 32 k + 1 pixels an axis, where the scales' scores lie on each other, "
            f"got {tuple(labels.shape[-2:])}"
        )
    eighth, sixteenth = subsample_labels(labels, stride=8), subsample_labels(labels, stride=16)
    targets = (eighth, eighth, eighth, sixteenth)
    return [
        cross_entropy_part(part, target, ignore_index=ignore_index)
        for part, target in zip(scores, targets, strict=True)
    ]


def multi_scale_loss(scores: Sequence[Tensor], labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum of four mean cross-entropies: fused, 1 and 0.75 at labels of stride 8, 0.5 at labels of stride 16.

    Args:
        scores: of ``MultiScale(network)(image, upsample=False)``.
        labels: ``(B, H, W)`` int64, 0..L-1 or ``ignore_index``, of the image's size, 32 k + 1 pixels an axis: 321, say.
        ignore_index: label of the pixels left out.

    Raises:
        ValueError: another size of labels.
    """
    parts = multi_scale_parts(scores, labels, ignore_index=ignore_index)
    return torch.stack([total / torch.as_tensor(count).clamp_min(1) for total, count in parts]).sum()


def multi_scale(network: nn.Module, batch: Sequence[Tensor]) -> list[Part]:
    """The four of `crfnet.models.MultiScale`, as `multi_scale_parts` has them."""
    image, labels, *_ = batch
    return multi_scale_parts(network(image, upsample=False), labels)


def both_labellings(network: nn.Module, batch: Sequence[Tensor], *, normalize: bool = True) -> list[Part]:
    """The loss of both tasks, each a part: as `full_resolution`, with labels ``(B, 2, H, W)``.

    ``normalize=False`` divides by the images, as the released nets do.

    Raises:
        ValueError: the labels are not the semantic and the geometric ones.
    """
    image, labels, *_ = batch
    if labels.ndim != 4 or labels.shape[1] != 2:
        raise ValueError(f"labels must be (B, 2, H, W), semantic and geometric, got {tuple(labels.shape)}")
    parts = [cross_entropy_part(logits, labels[:, task]) for task, logits in enumerate(network(image))]
    return [(total, count if normalize else len(image)) for total, count in parts]


def through_crf(network: nn.Module, batch: Sequence[Tensor], *, normalize: bool = True) -> list[Part]:
    """Of the marginals of `WithCRF`, with what a crop was padded by left out of the CRF."""
    image, labels, inside = batch
    total, count = cross_entropy_part(network(image, inside), labels)
    return [(total, count if normalize else len(image))]
