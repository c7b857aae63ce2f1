"""DeepLab's heads on a backbone of your own: anything that turns an image into a feature map of some stride.

    BackboneDeepLab(timm.create_model("resnet50", features_only=True, output_stride=8), 21)
    BackboneDeepLab(dilate(backbone, 8), 21, head="largefov")

Where cell i lies on the image follows from the backbone's kernels, strides and paddings: at pixel s i for 3x3
convolutions padded by 1, in the middle of its patch for patches, s i + (s - 1) / 2 for pools of 2x2. Scores are
interpolated from there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.dilate import cells
from crfnet.models.geometry import pad_to, place, subsample_labels
from crfnet.models.heads import ASPP
from crfnet.models.preprocess import TORCHVISION, Convention, Preprocess

RATES = {"aspp": (6, 12, 18, 24), "largefov": (12,)}  # at stride 8


class BackboneDeepLab(nn.Module):
    """LargeFOV or ASPP on any backbone.

    Args:
        backbone: from a preprocessed image ``(B, G, H, W)`` to features ``(B, F, h, w)``, or to a list or a dict of
            them whose last entry counts (timm's ``features_only``).
        num_classes: number of labels ``L``.
        head: "aspp", "largefov", or a module of your own from features to scores.
        rates: dilations of the head; by default the paper's for stride 8, smaller in proportion for larger strides.
        convention: what the backbone's weights were trained with; torchvision's and timm's usual one by default.

    Shape:
        image ``(B, G, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``; with ``upsample=False`` scores of stride
        ``output_stride``, which is the backbone's own.

    Raises:
        TypeError, ValueError: the backbone returns no feature map, or one that does not grow with the image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head: Literal["aspp", "largefov"] | nn.Module = "aspp",
        rates: Sequence[int] | None = None,
        convention: Convention = TORCHVISION,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a module, got {type(backbone).__name__}")
        self.preprocess, self.backbone = Preprocess(convention), backbone
        channels, self.output_stride, self.first = _examine(backbone, len(convention.order))
        self.aligned = self.first == (0.0, 0.0)  # cell i lies at pixel output_stride * i
        # one pixel more puts a cell on the last pixel, but some backbones take whole multiples alone
        self.remainder = int(self.aligned and _takes(backbone, len(convention.order), 512 + 1))
        if isinstance(head, nn.Module):
            self.head = head
        else:
            among("head", head, ("aspp", "largefov"))
            scaled = [max(1, 8 * rate // self.output_stride) for rate in RATES[head]]
            self.head = ASPP(channels, num_classes, rates=scaled if rates is None else rates)

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size."""
        x = self.preprocess(image)
        if not upsample:
            return self.scores(x)
        x = pad_to(x, self.output_stride, self.remainder)
        return place(self.scores(x), image.shape[2:], self.output_stride, self.first)

    def scores(self, x: Tensor) -> Tensor:
        """``(B, L, h, w)`` from a preprocessed image."""
        scores: Tensor = self.head(_last(self.backbone(x)))
        return scores

    def subsample(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` labels at the scores of ``upsample=False``."""
        if not self.aligned:
            raise ValueError(
                f"the scores of this backbone do not lie at every {self.output_stride}th pixel: use upsample=True"
            )
        return subsample_labels(labels, stride=self.output_stride)


def _last(features: object) -> Tensor:
    """The feature map of a backbone's answer."""
    if isinstance(features, Mapping):
        features = list(features.values())
    if isinstance(features, list | tuple) and features:
        features = features[-1]
    if not isinstance(features, Tensor) or features.ndim != 4:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"backbone must return features (B, F, h, w), or a list of them, got {got}")
    return features


def _takes(backbone: nn.Module, channels: int, size: int) -> bool:
    try:
        _answer(backbone, channels, (size, size + 128))
    except ValueError:
        return False
    return True


def _answer(backbone: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Any, Any]:
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    try:
        return cells(backbone, torch.empty(1, channels, *size, dtype=dtype, device="meta"))
    except ValueError as error:
        hint = "backbone must take images of any size (timm's transformers: dynamic_img_size=True)"
        raise ValueError(f"{hint}, got for {size} pixels: {error}") from error


def _examine(backbone: nn.Module, channels: int) -> tuple[int, int, tuple[float, float]]:
    """Features' channels, stride and first cell's place, from shapes: nothing is computed."""
    sizes = ((512, 640), (768, 896))
    (small, _), (large, grid) = (_answer(backbone, channels, size) for size in sizes)
    few, many = _last(small), _last(large)
    found = grid(many)
    # pixels that one cell more stands for; borders without padding cost cells, so not pixels by cells
    slopes = [(sizes[1][a] - sizes[0][a]) / max(many.shape[2 + a] - few.shape[2 + a], 1) for a in (0, 1)]
    strides = set(map(float, slopes if found is None else found.stride))
    stride = round(strides.pop())
    if strides or many.shape == few.shape or abs(slopes[0] - stride) > 0.25 or abs(slopes[1] - stride) > 0.25:
        raise ValueError(
            f"backbone must return features (B, F, h, w) of one whole stride, got {tuple(few.shape)} for {sizes[0]} "
            f"and {tuple(many.shape)} for {sizes[1]} pixels"
        )
    patch = ((stride - 1) / 2,) * 2  # what cannot be followed is taken for patches
    return few.shape[1], stride, patch if found is None else found.first
