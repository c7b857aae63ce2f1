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
                "the scores of this backbone do not lie at every {self.output_stride}th pixel: use upsample=True"
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
    return cells(backbone, torch.empty(1, channels, *size, dtype=dtype, device="meta"))


def _examine(backbone: nn.Module, channels: int) -> tuple[int, int, tuple[float, float]]:
    """Features' channels, stride and first cell's place, from shapes: nothing is computed."""
    shapes = []
    for size in ((512, 640), (768, 896)):
        answer, grid = _answer(backbone, channels, size)
        features = _last(answer)
        shapes.append([size[axis] / features.shape[2 + axis] for axis in (0, 1)])
    stride = round(shapes[0][0])
    if any(round(ratio) != stride for ratio in sum(shapes, [])):
        raise ValueError(
            f"backbone must return features (B, F, h, w) of one whole stride, got {tuple(features.shape)} for {size}"
        )
    found = grid(features)
    patch = ((stride - 1) / 2,) * 2  # what cannot be followed is taken for patches
    return features.shape[1], stride, patch if found is None else found.first
