"""A network that needs no training: two labels by brightness, and pictures on which it is right but for the noise."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crfnet.data import Samples


class Threshold(nn.Module):
    """Two labels by brightness, with the certainty of ``sharp``; shifted sideways by some pixels."""

    def __init__(self, sharp: float = 0.02, shift: int = 0) -> None:
        super().__init__()
        self.sharp, self.shift = nn.Parameter(torch.tensor(sharp)), shift

    def forward(self, image: Tensor) -> Tensor:
        score = self.sharp * (image.mean(1).roll(self.shift, -1) - 110)
        return torch.stack([-score, score], 1)


def rectangles(root: Path) -> Samples:
    """Five noisy bright rectangles on dark ground, with a void border at the top, written to a folder."""
    rng, files = np.random.default_rng(0), []
    for index in range(5):
        labels = np.zeros((30, 40 + index), np.uint8)
        labels[8:20, 6 + index : 24 + index] = 1
        image = np.clip(80 + 60.0 * labels[..., None] + rng.normal(0, 40, (*labels.shape, 3)), 0, 255)
        labels[:2] = 255
        files.append((root / f"{index}.png", root / f"{index}_labels.png"))
        Image.fromarray(image.astype(np.uint8)).save(files[-1][0])
        Image.fromarray(labels).save(files[-1][1])
    return Samples(files, 2)
