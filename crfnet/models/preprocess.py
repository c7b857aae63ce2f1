"""What a family of networks makes of an image before its first convolution: x_c = (image[order_c] - mean_c) / std_c.

Every network of this package takes RGB in 0..255 and does the rest itself. The numbers are buffers: they are saved with
the weights, and loading a checkpoint of another family replaces them, so that no network is fed another one's colours.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crfnet.inputs import extremes, frames_of_ours, kind
from crfnet.ops.gpu import host_may_read


class Convention(NamedTuple):
    """Channels of the input, numbers in the order in which the network sees them."""

    order: tuple[int, ...]  # channel of the image that comes c-th: (2, 1, 0) makes BGR of RGB
    mean: tuple[float, ...]
    std: tuple[float, ...]
    logarithm: tuple[int, ...] = ()  # channels of the image whose logarithm is taken first: depth


_BGR, _ONES = (2, 1, 0), (1.0, 1.0, 1.0)
# the reference code of each: shelhamer/fcn voc_layers.py and nyud_layers.py, DeepLab's prototxts, torchvision's docs
FCN = Convention(_BGR, (104.00699, 116.66877, 122.67892), _ONES)
DEEPLAB = Convention(_BGR, (104.008, 116.669, 122.675), _ONES)
CAFFENET = FCN  # the mean of ImageNet's colours, as FCN-AlexNet's training takes it
SIFT_FLOW = Convention(_BGR, (114.578, 115.294, 108.353), _ONES)
PASCAL_CONTEXT = Convention(_BGR, (104.007, 116.669, 122.679), _ONES)
NYUD_COLOUR = Convention(_BGR, (116.190, 97.203, 92.318), _ONES)  # looks like RGB's mean; taken from BGR as there
NYUD_HHA = Convention((0, 1, 2), (132.431, 94.076, 118.477), _ONES)  # disparity, height, angle as stored
NYUD_COLOUR_DEPTH = Convention((2, 1, 0, 3), (*NYUD_COLOUR.mean, 7.844), (1.0,) * 4, logarithm=(3,))
TORCHVISION = Convention((0, 1, 2), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
TORCHVISION_GOOGLENET = Convention((0, 1, 2), (127.5,) * 3, (127.5,) * 3)  # its transform_input undoes ImageNet's


class Preprocess(nn.Module):
    """Checks an image and brings it to a convention.

    Args:
        convention: one of this module's constants, or another of the same number of channels.

    Shape:
        image ``(B, G, H, W)``, colours in 0..255, any real dtype → ``(B, G, H, W)`` in the dtype of the buffers.

    Raises:
        TypeError, ValueError: not numbers, another shape, colours outside 0..255 (as when a mean was subtracted),
            a logarithm of depths that are not positive, a pixel that is not finite.
    """

    order: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        _check(convention)
        self.built_for, self.logarithm = convention, convention.logarithm
        self.register_buffer("order", torch.tensor(convention.order))
        self.register_buffer("mean", torch.tensor(convention.mean))
        self.register_buffer("std", torch.tensor(convention.std))

    def become(self, convention: Convention) -> None:
        """Take the numbers of another convention, as when weights of another family are loaded."""
        _check(convention)
        if len(convention.order) != len(self.order) or convention.logarithm != self.logarithm:
            raise ValueError(f"convention must have {len(self.order)} channels like this one, got {convention}")
        for name in ("order", "mean", "std"):
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.tensor(getattr(convention, name)))

    def forward(self, image: Tensor) -> Tensor:
        """``(B, G, H, W)`` in 0..255 → the network's own input."""
        G = len(self.order)
        if not isinstance(image, Tensor) or image.is_complex() or image.dtype == torch.bool:
            raise TypeError(f"image must be a tensor of numbers, got {kind(image)}")
        if image.ndim != 4 or image.shape[1] != G or 0 in image.shape:
            raise ValueError(
                f"image must be (B, {G}, H, W), not empty, got {tuple(image.shape)}; one image alone is image[None]"
            )
        image = image.to(self.mean.dtype)
        self._check_values(image)
        if self.logarithm:
            image = torch.cat(
                [image[:, c : c + 1].log() if c in self.logarithm else image[:, c : c + 1] for c in range(G)], 1
            )
        shape = (1, G, 1, 1)
        return (image[:, self.order] - self.mean.view(shape)) / self.std.view(shape)

    def _check_values(self, image: Tensor) -> None:
        colours = [c for c in range(len(self.order)) if c not in self.logarithm]
        low, high = extremes(image[:, colours] if self.logarithm else image)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("image must be finite, got NaN or infinity")
        if low < -1 or high > 256:  # resampling overshoots a little
            hint = "; was its mean subtracted? the network does that itself" if low < -1 else ""
            raise ValueError(f"image must lie in 0..255, got {low:g} to {high:g}{hint}")
        if low < high <= 1.0:
            text = f"image spans {low:g} to {high:g}, where networks here take 0..255: if white is 1, pass 255 * image"
            warnings.warn(text, stacklevel=frames_of_ours() + 1)
        for c in self.logarithm:
            least, most = extremes(image[:, c])
            if host_may_read(image) and not image.is_meta and not (0 < least and math.isfinite(most)):
                raise ValueError(
                    f"channel {c} of image must be positive and finite (its logarithm is taken), got {least:g}"
                )


def _check(convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(f"convention must be one of crfnet.models.preprocess, got {convention!r}")
    order, mean, std, logarithm = convention
    G = len(order)
    if sorted(order) != list(range(G)) or len(mean) != G or len(std) != G or min(std, default=0) <= 0:
        raise ValueError(f"convention must have an order of 0..G-1, G means and G positive stds, got {convention}")
    if not set(logarithm) <= set(order):
        raise ValueError(f"convention must take logarithms of channels that it has, got {convention}")
