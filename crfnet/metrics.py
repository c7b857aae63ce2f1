"""Scores of label maps, from one confusion matrix n over a whole set (n_ij: pixels of true class i called j).

With t_i = sum_j n_ij pixels of true class i:

    pixel accuracy  sum_i n_ii / sum_i t_i
    mean accuracy   mean_i n_ii / t_i
    IoU of class i  n_ii / (t_i + sum_j n_ji - n_ii), and mean IoU its mean
    weighted IoU    sum_i t_i IoU_i / sum_i t_i

Means run over the classes that occur in the ground truth. Never average per-image scores: that is another number.

Near boundaries, d_p king's moves from pixel p to the nearest pixel of another label or void:

    trimap band of width w = {p : p is not void, d_p <= w}
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

FAR = int(np.iinfo(np.int32).max)  # distance where there is no boundary


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
        counted = labels != self.ignore_index
        if where is not None:
            if where.shape != labels.shape:
                raise ValueError(f"where must have the shape of labels, got {_shapes(where, labels)}")
            counted = counted & where
        L = self.num_classes
        self.counts += torch.bincount(pair_codes(predicted, labels, counted, L), minlength=L * L).view(L, L)

    def scores(self) -> dict[str, float]:
        """The four scores by name, fractions; NaN when nothing was counted."""
        return {
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "mean_iou": self.mean_iou,
            "frequency_weighted_iou": self.frequency_weighted_iou,
        }

    def per_class_iou(self) -> Tensor:
        """IoU of each class (L,) float64; NaN for classes without a pixel in the ground truth."""
        n = self.counts.double()
        iou = n.diagonal() / (n.sum(1) + n.sum(0) - n.diagonal()).clamp_min(1)
        return torch.where(n.sum(1) > 0, iou, torch.nan)

    def per_class_accuracy(self) -> Tensor:
        """Fraction of each class's pixels that are right (L,) float64; NaN for classes without a pixel in the truth."""
        n = self.counts.double()
        return n.diagonal() / n.sum(1)  # 0 / 0 is NaN

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
        return float(self.per_class_accuracy().nanmean())

    @property
    def frequency_weighted_iou(self) -> float:
        """IoU of the classes, each weighted by its pixels in the ground truth."""
        truth = self.counts.sum(1).double()
        return float((truth * self.per_class_iou().nan_to_num()).sum() / truth.sum())


def pair_codes(predicted: Tensor, labels: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """``truth * num_classes + called`` of the counted pixels, (n,) int64 on the CPU, for counting by ``bincount``.

    Raises:
        ValueError: shapes differ, or a counted label is out of range.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted and labels must have one shape, got {_shapes(predicted, labels)}")
    truth, called = labels[counted].long().cpu(), predicted[counted].long().cpu()
    for name, values in (("predicted", called), ("labels", truth)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"{name} must be 0..{num_classes - 1}, got {int(values.min())}..{int(values.max())}")
    return truth * num_classes + called


def _shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


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


def boundary_distance(labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """How far every pixel is from the nearest one with another label, or void: the band of every width in one pass.

    ``boundary_distance(labels) <= width`` is ``trimap_band(labels, width)``, for all widths from 1.

    Args:
        labels: (*B, H, W) integer.
        ignore_index: the label of void pixels, themselves ``FAR``, as are all pixels of a map of one label.

    Returns:
        (*B, H, W) int32, at least 1.
    """
    if labels.ndim < 2:
        raise ValueError(f"labels must be (*B, H, W), got {tuple(labels.shape)}")
    values = labels.cpu().numpy().astype(np.int64)
    distance = np.full(values.shape, FAR, np.int32)
    window = (1,) * (values.ndim - 2) + (3, 3)
    edge = ndimage.maximum_filter(values, window, mode="nearest") != ndimage.minimum_filter(
        values, window, mode="nearest"
    )
    # a king's shortest walk to another label leaves the own label by an edge pixel, at its last step
    for index in np.ndindex(values.shape[:-2]):
        if edge[index].any():
            distance[index] = ndimage.distance_transform_cdt(~edge[index], "chessboard") + 1
    distance[values == ignore_index] = FAR
    return torch.from_numpy(distance).to(labels.device)
