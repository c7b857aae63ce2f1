"""FCN-GoogLeNet (arXiv:1411.4038, section 4.1 and table 1) on GoogLeNet (arXiv:1409.4842, table 1).

| layer        | 1x1 | 3x3 (reduced to) | 5x5 (reduced to) | pool, 1x1 |
| inception_3a | 64  | 128 (96)         | 32 (16)          | 32        |
| ...          |     |                  |                  |           | as in INCEPTIONS below

conv1 7x7 s2 pad 3, pool; conv2 1x1, 3x3, pool; 3a 3b, pool; 4a to 4e, pool; 5a 5b; score_fr, deconvolution s32, crop.
The average pool, the classifier and the two auxiliary ones go. No reference network was released: here the input is not
padded by 100, since every layer of GoogLeNet pads itself, and the deconvolution has k63, odd as pools of 3x3 want it.
Cell i then lies at pixel 32 i + 30 (its last pool is 2x2 in torchvision: 32 i + 22), the deconvolution's at 32 i + 31.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.inputs import among
from crfnet.models.fcn import FCN, Features, Head32s
from crfnet.models.fcn_alexnet import LocalResponseNorm
from crfnet.models.preprocess import FCN as CONVENTION
from crfnet.models.preprocess import TORCHVISION_GOOGLENET
from crfnet.models.vgg import zero

Style = Literal["caffe", "torchvision"]
INCEPTIONS = {  # 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pool's 1x1
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
SMALLEST = 32  # pixels an axis; smaller images are padded to it, or the pools would run out


class Conv(nn.Module):
    """Convolution and ReLU; without bias, with batch norm between, in torchvision."""

    def __init__(self, inputs: int, outputs: int, kernel: int, style: Style, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=style == "caffe")
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        zero(self.conv.bias)
        self.bn = nn.Identity() if style == "caffe" else nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` → ``(B, outputs, ceil(H / stride), ceil(W / stride))``."""
        y: Tensor = self.bn(self.conv(x))
        return y.relu()


class Inception(nn.Module):
    """Four branches side by side. What is called 5x5 is 3x3 in torchvision."""

    def __init__(self, inputs: int, widths: tuple[int, ...], style: Style) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, project = widths
        self.conv1x1 = Conv(inputs, one, 1, style)
        self.conv3x3 = nn.Sequential(Conv(inputs, reduce3, 1, style), Conv(reduce3, three, 3, style))
        self.conv5x5 = nn.Sequential(
            Conv(inputs, reduce5, 1, style), Conv(reduce5, five, 5 if style == "caffe" else 3, style)
        )
        self.project = nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), Conv(inputs, project, 1, style))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` → ``(B, one + three + five + project, H, W)``."""
        return torch.cat([self.conv1x1(x), self.conv3x3(x), self.conv5x5(x), self.project(x)], 1)


class GoogLeNet(nn.Module):
    """The trunk up to inception_5b."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        among("style", style, get_args(Style))
        self.conv1 = Conv(3, 64, 7, style, stride=2)
        self.conv2 = nn.Sequential(Conv(64, 64, 1, style), Conv(64, 192, 3, style))
        self.norm = LocalResponseNorm() if style == "caffe" else nn.Identity()
        self.pool1, self.pool2, self.pool3 = (nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3))
        self.pool4 = nn.MaxPool2d(3 if style == "caffe" else 2, 2, ceil_mode=True)
        inputs = 192
        for name, widths in INCEPTIONS.items():
            self.add_module(f"inception_{name}", Inception(inputs, widths, style))
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        self.dropout = nn.Dropout(0.4 if style == "caffe" else 0.2)

    def forward(self, x: Tensor) -> Features:
        """inception_5b of an image that is preprocessed."""
        x = F.pad(x, (0, max(0, SMALLEST - x.shape[3]), 0, max(0, SMALLEST - x.shape[2])))
        x = self.norm(self.pool1(self.conv1(x)))
        x = self.pool2(self.norm(self.conv2(x)))
        for name in INCEPTIONS:
            if name == "4a":
                x = self.pool3(x)
            if name == "5a":
                x = self.pool4(x)
            x = self.get_submodule(f"inception_{name}")(x)
        return (self.dropout(x),)


class FCNGoogLeNet(FCN):
    """FCN-32s on GoogLeNet.

    Args:
        num_classes: number of labels ``L``.
        style: "caffe" for the paper's network; "torchvision" for torchvision's weights, whose network has batch norm
            and no 5x5 convolutions.
    """

    def __init__(self, num_classes: int = 21, *, style: Style = "caffe") -> None:
        caffe = style == "caffe"
        head = Head32s(num_classes, channels=1024, kernel=63, offset=1 if caffe else 9)
        super().__init__(GoogLeNet(style), head, CONVENTION if caffe else TORCHVISION_GOOGLENET)
