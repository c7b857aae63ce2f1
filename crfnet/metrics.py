"""Scores of label maps, from one confusion matrix n over a whole set (n_ij: pixels of true class i called j).

With t_i = sum_j n_ij pixels of true class i:

    pixel accuracy  sum_i n_ii / sum_i t_i
    mean accuracy   mean_i n_ii / t_i
    IoU of class i  n_ii / (t_i + sum_j n_ji - n_ii), and mean IoU its mean
    weighted IoU    sum_i t_i IoU_i / sum_i t_i

Means run over the classes that occur in the ground truth. Never average per-image scores: that is another number.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, called class) over a set of label maps; pixels of ``ignore_index`` are left out."""

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # rows: truth, columns: called

    def add(self, predicted: Tensor, labels: Tensor, where: Tensor | None = None) -> None:
        """Adds the pixels of one or more label maps.

        Args:
            predicted: integer labels of any shape, 0..num_classes-1.
            labels: the truth, same shape; ``ignore_index`` where there is none.
            where: bool, same shape; pixels outside do not count (a trimap band, say).

        Raises:
            ValueError: shapes differ, or a counted label is out of range.
        """
        if predicted.shape != labels.shape or (where is not None and where.shape != labels.shape):
            got = [tuple(t.shape) for t in (predicted, labels, where) if t is not None]
            raise ValueError(f"predicted, labels and where must have one shape, got {got}")
        counted = labels != self.ignore_index
        if where is not None:
            counted = counted & where
        truth, called = labels[counted].long().cpu(), predicted[counted].long().cpu()
        for name, values in (("predicted", called), ("labels", truth)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(
                    f"{name} must be 0..{self.num_classes - 1}, got {int(values.min())}..{int(values.max())}"
                )
        L = self.num_classes
        self.counts += torch.bincount(truth * L + called, minlength=L * L).view(L, L)

    def per_class_iou(self) -> Tensor:
        """IoU of each class (L,) float64; NaN for classes without a pixel in the ground truth."""
        n = self.counts.double()
        iou = n.diagonal() / (n.sum(1) + n.sum(0) - n.diagonal()).clamp_min(1)
        return torch.where(n.sum(1) > 0, iou, torch.nan)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes of the ground truth; NaN when nothing was counted."""
        return float(self.per_class_iou().nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the counted pixels that are right; NaN when nothing was counted."""
        return float(self.counts.diagonal().sum().double() / self.counts.sum())

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes of the ground truth of the fraction of their pixels that are right."""
        n = self.counts.double()
        return float((n.diagonal() / n.sum(1)).nanmean())

    @property
    def frequency_weighted_iou(self) -> float:
        """IoU of the classes, each weighted by its pixels in the ground truth."""
        truth = self.counts.sum(1).double()
        return float((truth * self.per_class_iou().nan_to_num()).sum() / truth.sum())


def trimap_band(labels: Tensor, width: int, *, ignore_index: int = 255) -> Tensor:
    """Pixels near an object boundary: those with another label, or void, at most ``width`` pixels away.

    Distances count as in a square window of side ``2 width + 1``. On maps with VOC's void border between all objects
    this is DeepLab's trimap (void dilated by that square, void itself left out); on maps without void it is the band of
    ``width`` pixels on either side of every change of label.

    Args:
        labels: (*B, H, W) integer.
        width: at least 1, in pixels.
        ignore_index: the label of void pixels, which are never in the band themselves.

    Returns:
        (*B, H, W) bool.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 pixel, got {width}")
    if labels.ndim < 2:
        raise ValueError(f"labels must be (*B, H, W), got {tuple(labels.shape)}")
    values = labels.cpu().numpy().astype(np.int64)
    window = (1,) * (values.ndim - 2) + (2 * width + 1,) * 2
    # outside the image the nearest pixel is repeated, which brings no new label into any window
    mixed = ndimage.maximum_filter(values, window, mode="nearest") != ndimage.minimum_filter(
        values, window, mode="nearest"
    )
    return torch.from_numpy(mixed & (values != ignore_index)).to(labels.device)
