"""VGG-16 (arXiv:1409.1556, table 1, D) without its fully connected layers: the trunk of FCN, DeepLab and CRF-RNN.

    conv1_1 conv1_2 pool1 | conv2_1-2 pool2 | conv3_1-3 pool3 | conv4_1-3 pool4 | conv5_1-3 pool5

Every convolution is 3x3 and followed by a ReLU. What the papers change are padding, pools and holes; the fully
connected layers become convolutions in the networks' own files.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crfnet.inputs import whole_number

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The thirteen convolutions, with pools of the caller's.

    Args:
        pools: pool1 to pool5.
        channels: of the input.
        first_padding: of conv1_1; 100 in FCN.
        last_hole: dilation of conv5_1 to conv5_3; 2 in DeepLab.

    Shape:
        ``(B, channels, H, W)`` → pool1 to pool5, a list.
    """

    def __init__(
        self, pools: Sequence[nn.Module], *, channels: int = 3, first_padding: int = 1, last_hole: int = 1
    ) -> None:
        super().__init__()
        for stage, widths in enumerate(WIDTHS, 1):
            hole = last_hole if stage == 5 else 1
            for index, width in enumerate(widths, 1):
                padding = first_padding if (stage, index) == (1, 1) else hole
                conv = nn.Conv2d(channels, width, 3, padding=padding, dilation=hole)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                zero(conv.bias)
                self.add_module(f"conv{stage}_{index}", conv)
                channels = width
            self.add_module(f"pool{stage}", pools[stage - 1])

    def stage(self, number: int, x: Tensor) -> Tensor:
        """Convolutions and pool of one stage, 1 to 5."""
        for index in range(1, len(WIDTHS[number - 1]) + 1):
            x = self.get_submodule(f"conv{number}_{index}")(x).relu()
        pooled: Tensor = self.get_submodule(f"pool{number}")(x)
        return pooled

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of the five pools."""
        outputs = []
        for number in range(1, 6):
            x = self.stage(number, x)
            outputs.append(x)
        return outputs


def zero(bias: Tensor | None) -> None:
    """Biases start at 0."""
    if bias is not None:
        nn.init.zeros_(bias)


class WideConv2d(nn.Conv2d):
    """nn.Conv2d; on a CPU half of the output channels after the other where there are many and holes.

    torch 2.13 takes minutes for the gradient of 4096 channels of 7x7 with holes to their weights, and under a second
    for half of them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` → ``(B, outputs, h, w)``."""
        if input.device.type != "cpu" or self.dilation == (1, 1) or self.out_channels <= 2048 or self.bias is None:
            return super().forward(input)
        halves = zip(self.weight.chunk(2), self.bias.chunk(2), strict=True)
        return torch.cat([self._conv_forward(input, weight, bias) for weight, bias in halves], 1)


def fully_connected(inputs: int, outputs: int, kernel: int, *, hole: int = 1, padding: int = 0) -> nn.Sequential:
    """fc6 or fc7 as a convolution, with its ReLU and dropout: ``nn.Sequential`` whose ``0`` is the convolution."""
    conv = (nn.Conv2d if hole == 1 else WideConv2d)(inputs, outputs, kernel, padding=padding, dilation=hole)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    zero(conv.bias)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Dropout(0.5))


def score_layer(inputs: int, num_classes: int, *, std: float = 0.0) -> nn.Conv2d:
    """1x1 classifier of Gaussian weights, bias 0; FCN's start at zero, DeepLab's at 0.01."""
    whole_number("num_classes", num_classes, 1)
    conv = nn.Conv2d(inputs, num_classes, 1)
    nn.init.normal_(conv.weight, std=std)
    zero(conv.bias)
    return conv
