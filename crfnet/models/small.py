"""A small residual network with atrous convolutions and DeepLab's head, for CPUs and a few hundred images.

Output stride 8: three convolutions of stride 2, after which the dilation grows instead (1, 2, 4), then an ASPP head of
parallel 3x3 convolutions and the image's mean (arXiv:1606.00915, section 3.2; arXiv:1706.05587, figure 5). Scores are
brought back to the size of the image bilinearly, as in both, so that edges are blurred over about 8 pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.inputs import whole_number
from crfnet.models.preprocess import Convention, Preprocess

OUTPUT_STRIDE = 8
CONVENTION = Convention((0, 1, 2), (122.675, 116.669, 104.008), (60.0, 60.0, 60.0))


def _conv(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1, size: int = 3) -> nn.Sequential:
    padding = dilation * (size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip connection."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride=stride, dilation=dilation)
        self.second = _conv(outputs, outputs, dilation=dilation)
        plain = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if plain else _conv(inputs, outputs, stride=stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, ceil(H / stride), ceil(W / stride))."""
        return (self.second(self.first(x).relu()) + self.skip(x)).relu()


class SmallDeepLab(nn.Module):
    """Residual atrous network of output stride 8 with an ASPP head.

    Args:
        num_classes: number of labels ``L``.
        width: channels of the first stage; the last has four times as many. 16 makes about 0.35 million parameters.
        rates: dilations of the head's branches, in pixels of the score map (8 pixels of the image).
        dropout: of the head's features, in training.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``.
    """

    def __init__(
        self, num_classes: int, *, width: int = 16, rates: tuple[int, ...] = (1, 3, 6), dropout: float = 0.1
    ) -> None:
        super().__init__()
        whole_number("num_classes", num_classes, 1)
        whole_number("width", width, 1)
        self.preprocess = Preprocess(CONVENTION)
        self.stem = _conv(3, width, stride=2)
        self.stages = nn.Sequential(
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            Block(4 * width, 4 * width),
            Block(4 * width, 4 * width, dilation=2),
            Block(4 * width, 4 * width, dilation=4),
        )
        self.branches = nn.ModuleList(_conv(4 * width, 2 * width, dilation=rate) for rate in rates)
        self.context = nn.Conv2d(4 * width, 2 * width, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(2 * width * (len(rates) + 1), num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's own size; any height and width from one pixel on."""
        x = self.stages(self.stem(self.preprocess(image)).relu())
        context = self.context(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[2:])
        features = torch.cat([branch(x).relu() for branch in self.branches] + [context], 1)
        scores = self.classifier(self.dropout(features))
        return F.interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=False)
