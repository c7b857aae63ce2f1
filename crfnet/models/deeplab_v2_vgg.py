"""DeepLab v2 on VGG-16: LargeFOV or ASPP on pool5 (arXiv:1606.00915, figure 7 and table 3; the released prototxts).

    VGG-16 of stride 8 (pools 3x3, conv5 with hole 2) → parallel fc6_k (1024, 3x3, rate r_k), fc7_k, fc8_k, added

| head       | rates         |
| "largefov" | 12            |
| "aspp-s"   | 2, 4, 8, 12   |
| "aspp-l"   | 6, 12, 18, 24 |

LargeFOV is v1's network, average pool and all; ASPP has no such pool.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.deeplab_v1 import three_by_three_pools
from crfnet.models.geometry import crop, pad_to, subsample_labels, zoom
from crfnet.models.heads import ASPP
from crfnet.models.preprocess import DEEPLAB, Convention, Preprocess
from crfnet.models.vgg import VGG16

Head = Literal["aspp-l", "aspp-s", "largefov"]
RATES = {"largefov": (12,), "aspp-s": (2, 4, 8, 12), "aspp-l": (6, 12, 18, 24)}


class DeepLabV2VGG(nn.Module):
    """DeepLab v2 on VGG-16.

    Args:
        num_classes: number of labels ``L``.
        head: "aspp-l", "aspp-s" or "largefov".
        convention: channels and mean of the input.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``; with ``upsample=False`` scores of stride 8 as
        in training: 321 x 321 gives 41 x 41. ``subsample`` picks their labels.
    """

    output_stride, aligned = 8, True  # score i lies at pixel 8 i

    def __init__(self, num_classes: int = 21, *, head: Head = "aspp-l", convention: Convention = DEEPLAB) -> None:
        super().__init__()
        among("head", head, get_args(Head))
        self.preprocess = Preprocess(convention)
        self.vgg = VGG16(three_by_three_pools(), channels=len(convention.order), last_hole=2)
        self.pool5a = nn.AvgPool2d(3, 1, padding=1) if head == "largefov" else nn.Identity()
        self.head = ASPP(512, num_classes, rates=RATES[head], hidden=1024)

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size, bilinear from the scores."""
        x = self.preprocess(image)
        return crop(zoom(self.scores(pad_to(x, 8, 1)), 8), 0, image.shape[2:]) if upsample else self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        """``(B, L, h, w)`` of stride 8, score i at pixel 8 i, from a preprocessed image."""
        scores: Tensor = self.head(self.pool5a(self.vgg(x)[-1]))
        return scores

    def subsample(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` labels at the scores of ``upsample=False``: crops of 8 k + 1 pixels."""
        return subsample_labels(labels, stride=8)
