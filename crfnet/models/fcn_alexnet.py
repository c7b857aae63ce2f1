"""FCN-AlexNet (arXiv:1411.4038, table 1; shelhamer/fcn.berkeleyvision.org, voc-fcn-alexnet/net.py).

| layer | CaffeNet                | torchvision's AlexNet | then                       |
| conv1 | 96, 11x11 s4 pad 100    | 64, the same          | ReLU, pool 3x3 s2, (LRN)   |
| conv2 | 256, 5x5 pad 2, group 2 | 192, 5x5 pad 2        | ReLU, pool 3x3 s2, (LRN)   |
| conv3 | 384, 3x3 pad 1          | 384, 3x3 pad 1        | ReLU                       |
| conv4 | 384, 3x3 pad 1, group 2 | 256, 3x3 pad 1        | ReLU                       |
| conv5 | 256, 3x3 pad 1, group 2 | 256, 3x3 pad 1        | ReLU, pool 3x3 s2          |
| fc6   | 4096, 6x6               | the same              | ReLU, dropout              |
| fc7   | 4096, 1x1               | the same              | ReLU, dropout              |

Only CaffeNet, the paper's, normalises locally (5, 1e-4, 0.75). score_fr, deconvolution k63 s32, crop 18.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.fcn import FCN, Features, Head32s
from crfnet.models.preprocess import CAFFENET, TORCHVISION
from crfnet.models.vgg import fully_connected, zero

Style = Literal["caffe", "torchvision"]


class LocalResponseNorm(nn.LocalResponseNorm):
    """Over 5 channels, x / (1 + 1e-4 / 5 sum x²)^0.75, in float32: the squares overflow float16."""

    def __init__(self) -> None:
        super().__init__(5, alpha=1e-4, beta=0.75)

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and dtype."""
        return (
            super().forward(input.float() if input.dtype in (torch.float16, torch.bfloat16) else input).to(input.dtype)
        )


class AlexNet(nn.Module):
    """The convolutional trunk, fc6 and fc7 in it."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        among("style", style, get_args(Style))
        caffe = style == "caffe"
        widths, groups = ((96, 256, 384, 384, 256), 2) if caffe else ((64, 192, 384, 256, 256), 1)
        self.conv1 = nn.Conv2d(3, widths[0], 11, 4, padding=100)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5, padding=2, groups=groups)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.conv4 = nn.Conv2d(widths[2], widths[3], 3, padding=1, groups=groups)
        self.conv5 = nn.Conv2d(widths[3], widths[4], 3, padding=1, groups=groups)
        self.pool1, self.pool2, self.pool5 = (nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3))
        self.norm = LocalResponseNorm() if caffe else nn.Identity()
        self.fc6 = fully_connected(256, 4096, 6)
        self.fc7 = fully_connected(4096, 4096, 1)
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            zero(layer.bias)

    def forward(self, x: Tensor) -> Features:
        """fc7 of an image that is preprocessed."""
        x = self.norm(self.pool1(self.conv1(x).relu()))
        x = self.norm(self.pool2(self.conv2(x).relu()))
        x = self.conv4(self.conv3(x).relu()).relu()
        x = self.pool5(self.conv5(x).relu())
        return (self.fc7(self.fc6(x)),)


class FCNAlexNet(FCN):
    """FCN-32s on AlexNet.

    Args:
        num_classes: number of labels ``L``.
        style: "caffe" for the paper's, on CaffeNet; "torchvision" for torchvision's weights, which fit no CaffeNet.
    """

    def __init__(self, num_classes: int = 21, *, style: Style = "caffe") -> None:
        head = Head32s(num_classes, kernel=63, offset=18)
        super().__init__(AlexNet(style), head, CAFFENET if style == "caffe" else TORCHVISION)
