"""What a segmentation is worth: its scores over a set of samples, and pictures of a few of them.

A predictor takes an image (1, 3, H, W) and returns logits (1, L, H, W) of the same size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from crfnet.data import Samples
from crfnet.images import Uint8, panel, voc_palette
from crfnet.metrics import ConfusionMatrix, trimap_band
from crfnet.processes import add_up, rank, world_size

ROW_HEIGHT = 180  # pixels, about: small samples are magnified to it

Predictor = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate(
    predict: Predictor, samples: Samples, *, trimap_width: int = 3, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Mean IoU, pixel accuracy, and mean IoU in the trimap band (``trimap_iou_3px``), fractions over the whole set.

    Of several processes every one must call it: each predicts its share of the images, and all get the same scores.
    """
    everywhere, border = ConfusionMatrix(samples.num_classes), ConfusionMatrix(samples.num_classes)
    for index in range(rank(), len(samples), world_size()):
        image, labels, _ = samples[index]
        called = predict(image[None].to(device)).argmax(1)[0].cpu()
        everywhere.add(called, labels)
        border.add(called, labels, trimap_band(labels, trimap_width))
    for matrix in (everywhere, border):
        matrix.counts = add_up(matrix.counts.to(device)).cpu()
    return {
        "mean_iou": everywhere.mean_iou,
        "pixel_accuracy": everywhere.pixel_accuracy,
        f"trimap_iou_{trimap_width}px": border.mean_iou,
    }


@torch.no_grad()
def comparison(
    samples: Samples, predictors: Sequence[Predictor], *, count: int = 4, device: str | torch.device = "cpu"
) -> Uint8:
    """A picture with a row per sample, evenly spread over the set: image, truth, then each predictor's labels."""
    palette, rows = voc_palette(), []
    for index in np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int):
        image, labels, _ = samples[int(index)]
        called = [predict(image[None].to(device)).argmax(1)[0].cpu() for predict in predictors]
        picture = image.permute(1, 2, 0).round().byte().numpy()
        rows.append(panel([picture, *(palette[label_map.numpy()] for label_map in (labels, *called))]))
        zoom = max(1, round(ROW_HEIGHT / rows[-1].shape[0]))  # whole pixels, so that labels stay what they are
        rows[-1] = rows[-1].repeat(zoom, 0).repeat(zoom, 1)
    width = max(row.shape[1] for row in rows)
    framed = [np.pad(row, ((0, 8), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(framed)[:-8]
