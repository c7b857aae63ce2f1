"""DeepLab v2 on ResNet-101 of output stride 8 (arXiv:1606.00915, section 4.1.2 and table 4; the released prototxt).

ResNet-101 → parallel 3x3 convolutions of 6, 12, 18 and 24 holes to the labels, added (ASPP); or one of 12 (LargeFOV);
or none: 1x1, the rows of table 4 without either. What these had is not published; the network on COCO has 1x1.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.geometry import crop, pad_to, subsample_labels, zoom
from crfnet.models.heads import ASPP
from crfnet.models.preprocess import DEEPLAB, Convention, Preprocess
from crfnet.models.resnet import ResNet, StrideOn
from crfnet.models.vgg import score_layer

Head = Literal["aspp", "largefov", "plain"]
RATES = {"aspp": (6, 12, 18, 24), "largefov": (12,), "plain": (1,)}


class DeepLabV2ResNet(nn.Module):
    """DeepLab v2 on ResNet-101; in ``MultiScale`` it is the published network.

    Args:
        num_classes: number of labels ``L``.
        head: "aspp", "largefov" or "plain", one 1x1 convolution.
        stride_on: "reduce" for DeepLab's own weights, "conv3x3" for torchvision's.
        freeze_norm: keep batch norm as it is, in training too, as DeepLab does with loaded weights; False from scratch.
        convention: channels and mean of the input.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``; with ``upsample=False`` scores of stride 8 as
        in training: 321 x 321 gives 41 x 41. ``subsample`` picks their labels.
    """

    output_stride, aligned = 8, True  # score i lies at pixel 8 i

    def __init__(
        self,
        num_classes: int = 21,
        *,
        head: Head = "aspp",
        stride_on: StrideOn = "reduce",
        freeze_norm: bool = True,
        convention: Convention = DEEPLAB,
    ) -> None:
        super().__init__()
        among("head", head, get_args(Head))
        self.preprocess = Preprocess(convention)
        channels = len(convention.order)
        self.resnet = ResNet(101, stride_on=stride_on, freeze_norm=freeze_norm, channels=channels)
        self.head = ASPP(2048, num_classes, rates=RATES[head])
        if head == "plain":
            self.head.branches[0] = score_layer(2048, num_classes, std=0.01)

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size, bilinear from the scores."""
        x = self.preprocess(image)
        return crop(zoom(self.scores(pad_to(x, 8, 1)), 8), 0, image.shape[2:]) if upsample else self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        """``(B, L, h, w)`` of stride 8, score i at pixel 8 i, from a preprocessed image."""
        scores: Tensor = self.head(self.resnet(x))
        return scores

    def subsample(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` labels at the scores of ``upsample=False``: crops of 8 k + 1 pixels."""
        return subsample_labels(labels, stride=8)
