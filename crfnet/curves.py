"""Trimap curves: scores in the band of w pixels along the boundaries, for w = 1..40, and their plot.

    counts_k = confusion matrix of the pixels with w_(k-1) < d <= w_k          d = boundary_distance(labels)
    matrix of width w_k = counts_1 + ... + counts_k

so that one distance transform an image serves all widths, and adding up ``counts`` adds up sets of images.
Sources: arXiv:1412.7062, figure 5; arXiv:1606.00915, figure 10.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crfnet.data import Samples
from crfnet.evaluation import Predictor
from crfnet.images import Uint8
from crfnet.metrics import ConfusionMatrix, boundary_distance, pair_codes
from crfnet.plots import Panel, draw

WIDTHS = tuple(range(1, 41))  # pixels, as the papers have it


class TrimapCurve:
    """A confusion matrix for each width of the band, over a set of label maps.

    Args:
        num_classes: number of labels ``L``.
        widths: of the band on either side of a boundary, in pixels, ascending.
        ignore_index: the label of void pixels, which never count.
    """

    def __init__(self, num_classes: int, *, widths: Sequence[int] = WIDTHS, ignore_index: int = 255) -> None:
        self.widths = tuple(widths)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not self.widths or self.widths[0] < 1 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must be ascending, from 1 pixel on, got {self.widths}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # of the pixels that a width has beyond the one before; rows: truth, columns: called
        self.counts = torch.zeros(len(self.widths), num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Adds the pixels of one or more label maps ``(*B, H, W)``.

        Raises:
            ValueError: shapes differ, or a counted label is out of range.
        """
        distance = boundary_distance(labels, ignore_index=self.ignore_index)
        counted = distance <= self.widths[-1]  # never true of void
        codes = pair_codes(predicted, labels, counted, self.num_classes)
        ring = torch.bucketize(distance[counted].cpu(), torch.tensor(self.widths, dtype=torch.int32))
        cells = self.num_classes**2
        self.counts += torch.bincount(ring * cells + codes, minlength=self.counts.numel()).view_as(self.counts)

    def matrices(self) -> list[ConfusionMatrix]:
        """The confusion matrix of the band of each width."""
        matrices = []
        for counts in self.counts.cumsum(0):
            matrix = ConfusionMatrix(self.num_classes, ignore_index=self.ignore_index)
            matrix.counts = counts
            matrices.append(matrix)
        return matrices

    def mean_iou(self) -> list[float]:
        """Mean IoU in the band of each width; NaN where it holds no pixel."""
        return [matrix.mean_iou for matrix in self.matrices()]

    def pixel_accuracy(self) -> list[float]:
        """Pixel accuracy in the band of each width; NaN where it holds no pixel."""
        return [matrix.pixel_accuracy for matrix in self.matrices()]


@torch.no_grad()
def trimap_curve(
    predict: Predictor, samples: Samples, *, widths: Sequence[int] = WIDTHS, device: str | torch.device = "cpu"
) -> TrimapCurve:
    """The curve of a predictor, from images (1, 3, H, W) to logits (1, L, H, W), over a set of samples."""
    curve = TrimapCurve(samples.num_classes, widths=widths)
    for index in range(len(samples)):
        image, labels, _ = samples[index]
        curve.add(predict(image[None].to(device)).argmax(1)[0].cpu(), labels)
    return curve


def trimap_plot(curves: Mapping[str, TrimapCurve]) -> Uint8:
    """Pixel accuracy and mean IoU over the width of the band, a line a method (DCNN, + CRF, joint), (H, W, 3).

    Raises:
        ValueError: no curve, or no width of any curve has a pixel.
    """
    accuracy = {name: (curve.widths, _percent(curve.pixel_accuracy())) for name, curve in curves.items()}
    iou = {name: (curve.widths, _percent(curve.mean_iou())) for name, curve in curves.items()}
    width = "trimap width (pixels)"
    return draw([Panel("Pixel accuracy (%)", width, accuracy), Panel("Mean IoU (%)", width, iou)])


def _percent(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]
