"""Image and label files as tensors, and random crops and mirrors applied to both alike.

A sample is a triple of an image ``(3, H, W)`` float32 in 0..255, its labels ``(H, W)`` int64 with 255 = void, and
``inside (H, W)`` bool, which is False where a crop was padded beyond its picture: there the image has the mean colour,
the labels are void, and a CRF should take the pixel as absent.

Every random draw depends on (seed, epoch, index) alone, so the same samples come from any number of worker processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from crfnet.images import read_image, read_labels

VOID = 255
MEAN_COLOUR = (122.675, 116.669, 104.008)  # RGB, the ImageNet mean that DeepLab pads with

Sample = tuple[Tensor, Tensor, Tensor]


def read_sample(image_file: Path, label_file: Path, num_classes: int, ignore_index: int = VOID) -> Sample:
    """Reads one image with its labels; ``ignore_index`` becomes 255 (void).

    Raises:
        ValueError: sizes differ, or a label is neither below ``num_classes`` nor ``ignore_index``; names the file.
    """
    image, labels = read_image(image_file), read_labels(label_file)
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"{label_file} is {labels.shape[1]}x{labels.shape[0]} pixels, "
            f"its image {image_file} {image.shape[1]}x{image.shape[0]}; wanted the same size"
        )
    labels = np.where(labels == ignore_index, VOID, labels)
    wrong = np.unique(labels[(labels >= num_classes) & (labels != VOID)])
    if len(wrong):
        raise ValueError(
            f"{label_file} holds the labels {wrong.tolist()}; "
            f"wanted 0..{num_classes - 1} and ignore_index {ignore_index} (num_classes is {num_classes})"
        )
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).contiguous()
    return pixels, torch.from_numpy(labels.astype(np.int64)), torch.ones(labels.shape, dtype=torch.bool)


def image_sizes(files: Sequence[tuple[Path, Path]]) -> np.ndarray:
    """Height and width of each image, (n, 2), from the heads of the files.

    Raises:
        ValueError: a file is no image; names it.
    """
    sizes = []
    for path, _ in files:
        try:
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: not an image in a format that Pillow reads") from error
    return np.array(sizes)


@dataclass(frozen=True)
class Crop:
    """Resizes, mirrors half of the samples and cuts a window of ``size`` (height, width) at a random place.

    The scale is drawn log-uniformly from ``scale``; images are resized bilinearly, labels by the nearest pixel. A
    picture smaller than the window is padded at the bottom and right with the mean colour and void labels, as DeepLab
    does. ``size`` None keeps the whole picture.
    """

    size: tuple[int, int] | None
    mirror: bool = True
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if (self.size is not None and min(self.size) < 1) or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"wanted size >= 1 and 0 < scale[0] <= scale[1], got {self.size} and {self.scale}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Cuts one window out of ``sample``; image, labels and inside come back with ``size`` pixels."""
        image, labels, inside = sample
        if self.scale != (1.0, 1.0):
            factor = float(np.exp(rng.uniform(*np.log(self.scale))))
            resized = [max(1, round(factor * n)) for n in labels.shape]
            image = F.interpolate(image[None], resized, mode="bilinear", antialias=True)[0].clamp(0, 255)
            pair = torch.stack([labels, inside.long()])[None].double()  # exact for every label
            labels, inside = F.interpolate(pair, resized, mode="nearest-exact")[0].long()
            inside = inside.bool()
        if self.mirror and rng.random() < 0.5:
            image, labels, inside = image.flip(-1), labels.flip(-1), inside.flip(-1)
        height, width = self.size or labels.shape
        top = int(rng.integers(0, max(labels.shape[0] - height, 0) + 1))
        left = int(rng.integers(0, max(labels.shape[1] - width, 0) + 1))
        window = (slice(top, top + height), slice(left, left + width))
        image, labels, inside = image[(slice(None), *window)], labels[window], inside[window]
        h, w = labels.shape
        if (h, w) == (height, width):
            return image.contiguous(), labels.contiguous(), inside.contiguous()
        padded = torch.tensor(MEAN_COLOUR)[:, None, None].repeat(1, height, width)
        padded[:, :h, :w] = image
        void, outside = torch.full((height, width), VOID), torch.zeros(height, width, dtype=torch.bool)
        void[:h, :w], outside[:h, :w] = labels, inside
        return padded, void, outside


class Samples(Dataset[Sample]):
    """The samples of a list of files, each passed through a transform.

    Args:
        files: image and label file of each sample.
        num_classes: number of labels; larger ones in a file are an error.
        ignore_index: label that stands for void in the files.
        transform: takes a sample and a random generator; None leaves the samples as they are.
        seed: of the random generators, together with the epoch and the index.
        keep: keeps decoded files in memory, 4 bytes a pixel.

    ``set_epoch`` before each pass gives new crops; a ``DataLoader`` passes it on to workers that it starts afterwards
    (leave ``persistent_workers`` off).
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        num_classes: int,
        *,
        ignore_index: int = VOID,
        transform: Crop | None = None,
        seed: int = 0,
        keep: bool = False,
    ) -> None:
        self.files, self.num_classes, self.ignore_index = list(files), num_classes, ignore_index
        self.transform, self.seed, self.epoch = transform, seed, 0
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None  # uint8 images and labels

    def set_epoch(self, epoch: int) -> None:
        """Selects the random draws of one pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``: image, labels and inside."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")  # ends a plain for loop over the samples
        index %= len(self)
        if self.kept is not None and index in self.kept:
            image, labels = self.kept[index]
            sample = image.float(), labels.long(), torch.ones(labels.shape, dtype=torch.bool)
        else:
            sample = read_sample(*self.files[index], self.num_classes, self.ignore_index)
            if self.kept is not None:
                self.kept[index] = sample[0].byte(), sample[1].byte()
        if self.transform is None:
            return sample
        return self.transform(sample, np.random.default_rng([self.seed, self.epoch, index]))
