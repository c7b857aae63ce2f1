"""Image and label files as tensors, and random crops, mirrors and scales applied to both alike.

A sample is a triple of an image ``(G, H, W)`` float32, its labels ``(H, W)`` int64 with 255 = void, or ``(K, H, W)``
where a data set has several labellings, and ``inside (H, W)`` bool, which is False where a crop was padded beyond its
picture: there the labels are void, and a CRF should take the pixel as absent. Colours are RGB in 0..255; a network's
own ``preprocess`` makes BGR of them and subtracts the mean.

Every random draw depends on (seed, epoch, index) alone, so the same samples come from any number of worker processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from crfnet import images

VOID = 255
MEAN_COLOUR = (122.675, 116.669, 104.008)  # RGB, the ImageNet mean that DeepLab pads with
DEEPLAB_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)  # what "random scaling from 0.5 to 1.5" is in DeepLab v2's released code

Sample = tuple[Tensor, Tensor, Tensor]
ImageReader = Callable[[Path], np.ndarray]  # → (G, H, W) uint8 or float32
LabelReader = Callable[[Path], np.ndarray]  # → (H, W) or (K, H, W) uint8, 255 = void


def read_rgb(path: Path) -> np.ndarray:
    """The picture as RGB, (3, H, W) uint8."""
    return images.read_image(path).transpose(2, 0, 1)


def read_sample(
    image_file: Path,
    label_file: Path,
    num_classes: int,
    ignore_index: int = VOID,
    *,
    read_image: ImageReader = read_rgb,
    read_labels: LabelReader = images.read_labels,
) -> Sample:
    """Reads one image with its labels; ``ignore_index`` becomes 255 (void).

    Raises:
        ValueError: sizes differ, or a label is neither below ``num_classes`` nor ``ignore_index``; names the file.
    """
    return _sample(*_decode(image_file, label_file, num_classes, ignore_index, read_image, read_labels))


def _decode(
    image_file: Path,
    label_file: Path,
    num_classes: int,
    ignore_index: int,
    read_image: ImageReader,
    read_labels: LabelReader,
) -> tuple[Tensor, Tensor]:
    """Image as read, uint8 or float32, and labels as uint8: what is worth keeping of a sample."""
    image, labels = read_image(image_file), read_labels(label_file)
    if image.ndim != 3 or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"read_image must give (G, H, W) uint8 or float32, got {_describe(image)} for {image_file}")
    if labels.ndim not in (2, 3) or labels.dtype != np.uint8:
        raise ValueError(f"read_labels must give (H, W) or (K, H, W) uint8, got {_describe(labels)} for {label_file}")
    if image.shape[1:] != labels.shape[-2:]:
        raise ValueError(
            f"{label_file} is {labels.shape[-1]}x{labels.shape[-2]} pixels, "
            f"its image {image_file} {image.shape[2]}x{image.shape[1]}; wanted the same size"
        )
    void = labels == ignore_index
    if read_labels is not images.read_labels:  # that of a data set, which gives 255 for void whatever the files have
        void |= labels == VOID
    wrong = np.unique(labels[(labels >= num_classes) & ~void])
    if len(wrong):
        raise ValueError(
            f"{label_file} holds the labels {wrong.tolist()}; "
            f"wanted 0..{num_classes - 1} and ignore_index {ignore_index} (num_classes is {num_classes})"
        )
    labels = np.where(labels == ignore_index, np.uint8(VOID), labels)
    return torch.from_numpy(np.array(image, order="C")), torch.from_numpy(labels)


def _sample(image: Tensor, labels: Tensor) -> Sample:
    inside = torch.ones(labels.shape[-2:], dtype=torch.bool)
    return image.to(torch.float32, copy=True), labels.long(), inside


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def image_sizes(files: Sequence[tuple[Path, Path]]) -> np.ndarray:
    """Height and width of each image as it is read, turned as its EXIF data say, (n, 2); from the heads of the files.

    Raises:
        ValueError: a file is no image, damaged, or over the limit of pixels; names it.
    """
    sizes = []
    for path, _ in files:
        with images.opened(path, images.MAX_PIXELS) as image:
            known = image.format != "PNG" or "exif" in image.info  # a PNG would be unpacked to look for more
            turned = known and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
            sizes.append((image.width, image.height) if turned else (image.height, image.width))
    return np.array(sizes)


@dataclass(frozen=True)
class Crop:
    """Resizes, mirrors half of the samples and cuts a window of ``size`` (height, width) at a random place.

    Images are resized bilinearly, labels by the nearest pixel. A picture smaller than the window is padded at the
    bottom and right with void labels, as DeepLab does. Takes images of any number of channels, and labels ``(H, W)`` or
    ``(K, H, W)``.

    Args:
        size: of the window; None keeps the whole picture.
        mirror: mirrors half of the samples.
        scale: range from which the scale is drawn log-uniformly.
        scales: scales from which one is drawn, all alike, in place of ``scale``; DeepLab v2's are ``DEEPLAB_SCALES``.
        fill: value of each channel in the padding; None takes the mean colour of ImageNet for three channels, and the
            mean of the window's own pixels for any other number.
    """

    size: tuple[int, int] | None
    mirror: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    scales: tuple[float, ...] = ()
    fill: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.size is not None and min(self.size) < 1) or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"wanted size >= 1 and 0 < scale[0] <= scale[1], got {self.size} and {self.scale}")
        if self.scales and (min(self.scales) <= 0 or self.scale != (1.0, 1.0)):
            raise ValueError(f"wanted scales > 0 and no scale beside them, got {self.scales} and {self.scale}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Cuts one window out of ``sample``; image, labels and inside come back with ``size`` pixels."""
        image, labels, inside = sample
        if self.fill is not None and len(self.fill) != len(image):
            raise ValueError(f"fill must have a value for each of {len(image)} channels, got {self.fill}")
        if self.scales:
            image, labels, inside = _resize(sample, self.scales[int(rng.integers(len(self.scales)))])
        elif self.scale != (1.0, 1.0):
            image, labels, inside = _resize(sample, float(np.exp(rng.uniform(*np.log(self.scale)))))
        if self.mirror and rng.random() < 0.5:
            image, labels, inside = image.flip(-1), labels.flip(-1), inside.flip(-1)
        height, width = self.size or inside.shape
        top = int(rng.integers(0, max(inside.shape[0] - height, 0) + 1))
        left = int(rng.integers(0, max(inside.shape[1] - width, 0) + 1))
        window = (..., slice(top, top + height), slice(left, left + width))
        image, labels, inside = image[window], labels[window], inside[window]
        h, w = inside.shape
        if (h, w) == (height, width):
            return image.contiguous(), labels.contiguous(), inside.contiguous()
        fill = self.fill or (MEAN_COLOUR if len(image) == 3 else image.mean((1, 2)).tolist())
        padded = torch.tensor(fill)[:, None, None].repeat(1, height, width)
        padded[:, :h, :w] = image
        void, outside = torch.full((*labels.shape[:-2], height, width), VOID), torch.zeros(height, width).bool()
        void[..., :h, :w], outside[:h, :w] = labels, inside
        return padded, void, outside


def _resize(sample: Sample, factor: float) -> Sample:
    """The sample ``factor`` times as high and wide."""
    image, labels, inside = sample
    size = [max(1, round(factor * n)) for n in inside.shape]
    low, high = min(0.0, float(image.min())), max(255.0, float(image.max()))  # depth goes beyond 255
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(low, high)
    maps = torch.cat([labels.reshape(-1, *inside.shape), inside.long()[None]])[None].double()  # exact for every label
    maps = F.interpolate(maps, size, mode="nearest-exact")[0].long()
    return image, maps[:-1].reshape(*labels.shape[:-2], *size), maps[-1].bool()


class Samples(Dataset[Sample]):
    """The samples of a list of files, each passed through a transform.

    Args:
        files: image and label file of each sample.
        num_classes: number of labels, of the labelling with the most; larger ones in a file are an error.
        ignore_index: label that stands for void in the files.
        transform: takes a sample and a random generator; None leaves the samples as they are.
        seed: of the random generators, together with the epoch and the index.
        keep: keeps decoded files in memory, 4 bytes a pixel of a picture.
        read_image: reads an image file, ``(G, H, W)`` uint8 or float32; RGB, unless given.
        read_labels: reads a label file, ``(H, W)`` or ``(K, H, W)`` uint8 with 255 = void; an indexed or grey picture,
            unless given. Both must be functions that a worker process can import.

    An index is a number, or (epoch, number), as ``crfnet.order`` draws them: each epoch has random draws of its own.
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
        read_image: ImageReader = read_rgb,
        read_labels: LabelReader = images.read_labels,
    ) -> None:
        self.files, self.num_classes, self.ignore_index = list(files), num_classes, ignore_index
        self.transform, self.seed = transform, seed
        self.read_image, self.read_labels = read_image, read_labels
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None  # images as read, uint8 labels

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """Image, labels and inside of the sample ``index``, or (epoch, index); an index alone is of epoch 0."""
        epoch, index = (0, index) if isinstance(index, int) else index
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")  # ends a plain for loop over the samples
        index %= len(self)
        decoded = None if self.kept is None else self.kept.get(index)
        if decoded is None:
            decoded = _decode(
                *self.files[index], self.num_classes, self.ignore_index, self.read_image, self.read_labels
            )
            if self.kept is not None:
                self.kept[index] = decoded
        sample = _sample(*decoded)
        if self.transform is None:
            return sample
        return self.transform(sample, np.random.default_rng([self.seed, epoch, index]))
