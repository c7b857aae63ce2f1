"""What a segmentation is worth: its scores over a set of samples. `crfnet.report` has more of them, and pictures.

A predictor takes an image (1, 3, H, W) and returns logits (1, L, H, W) of the same size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crfnet.data import Samples
from crfnet.metrics import ConfusionMatrix, trimap_band
from crfnet.processes import add_up, rank, world_size

Predictor = Callable[[Tensor], Tensor]


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module is in the mode it had: a frozen part may differ from the whole."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
