"""ResNet-101 as DeepLab v2 has it (arXiv:1512.03385, table 1; arXiv:1606.00915, section 4.1; the released prototxt).

| stage | blocks | channels | stride       | holes of the 3x3 at output stride 8 |
| conv1 | 7x7    | 64       | 2, pool1: 2  | 1                                   |
| res2  | 3      | 256      | 1            | 1                                   |
| res3  | 4      | 512      | 2            | 1                                   |
| res4  | 23     | 1024     | 1 (2)        | 2                                   |
| res5  | 3      | 2048     | 1 (2)        | 4                                   |

The published network has a stage's stride on its first 1x1 (reduce) and the shortcut, torchvision's has it on the 3x3:
where res3 halves the map the two compute something else from the same weights, hence ``stride_on``.
"""

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.inputs import among

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
StrideOn = Literal["reduce", "conv3x3"]


class FrozenBatchNorm(nn.Module):
    """Batch norm that keeps its statistics, scale and shift, in training too: the released networks fix all of them.

    Not a batch norm to torch, so that SyncBatchNorm does not take its place.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(x - running_mean) / sqrt(running_var + 1e-5) * weight + bias."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ConvNorm(nn.Module):
    """A convolution without bias, and its batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, hole: int = 1, freeze: bool = True
    ) -> None:
        super().__init__()
        padding = hole * (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, hole, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.bn = FrozenBatchNorm(outputs) if freeze else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` → ``(B, outputs, H / stride, W / stride)``."""
        y: Tensor = self.bn(self.conv(x))
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, hole: int, first: bool, stride_on: StrideOn, freeze: bool
    ) -> None:
        super().__init__()
        middle, (on_reduce, on_conv) = outputs // 4, (stride, 1) if stride_on == "reduce" else (1, stride)
        self.reduce = ConvNorm(inputs, middle, 1, stride=on_reduce, freeze=freeze)
        self.conv3x3 = ConvNorm(middle, middle, 3, stride=on_conv, hole=hole, freeze=freeze)
        self.increase = ConvNorm(middle, outputs, 1, freeze=freeze)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride, freeze=freeze) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` → ``(B, outputs, ceil(H / stride), ceil(W / stride))``."""
        y: Tensor = self.increase(self.conv3x3(self.reduce(x).relu()).relu()) + self.shortcut(x)
        return y.relu()


class ResNet(nn.Module):
    """ResNet of bottlenecks without its classifier.

    Args:
        depth: 50, 101 or 152.
        output_stride: 8, 16 or 32: what the strides of res4 and res5 would bring beyond it becomes holes.
        stride_on: "reduce" (Caffe, DeepLab) or "conv3x3" (torchvision).
        freeze_norm: keep batch norm as it is, in training too: for weights that are loaded. Until then the blocks are
            scaled down so that activations stay in bounds; to train from scratch, False.
        channels: of the input.

    Shape:
        ``(B, channels, H, W)`` → ``(B, 2048, h, w)``.
    """

    def __init__(
        self,
        depth: int = 101,
        *,
        output_stride: int = 8,
        stride_on: StrideOn = "reduce",
        freeze_norm: bool = True,
        channels: int = 3,
    ) -> None:
        super().__init__()
        among("stride_on", stride_on, get_args(StrideOn))
        if depth not in BLOCKS or output_stride not in (8, 16, 32):
            raise ValueError(
                f"depth must be one of {sorted(BLOCKS)} and output_stride 8, 16 or 32, got {depth} and {output_stride}"
            )
        self.stride_on = stride_on
        self.conv1 = ConvNorm(channels, 64, 7, stride=2, freeze=freeze_norm)
        self.pool1 = nn.MaxPool2d(3, 2, padding=1, ceil_mode=stride_on == "reduce")  # Caffe rounds up, torchvision down
        inputs, reached, hole = 64, 4, 1
        for stage, blocks in enumerate(BLOCKS[depth], 2):
            outputs, halves = 64 * 2**stage, stage > 2
            stride = 2 if halves and reached < output_stride else 1
            previous, hole = hole, 2 * hole if halves and stride == 1 else hole
            reached *= stride
            layers = nn.Sequential()
            for index in range(blocks):
                # where the 3x3 had the stride it still sees the denser grid of before (the hole algorithm)
                now = previous if index == 0 and stride_on == "conv3x3" else hole
                block = Bottleneck(
                    inputs, outputs, stride=stride if index == 0 else 1, hole=now, first=index == 0,
                    stride_on=stride_on, freeze=freeze_norm,
                )  # fmt: skip
                layers.append(block)
                inputs = outputs
            self.add_module(f"res{stage}", layers)
        if freeze_norm:
            self._scale_down()

    @torch.no_grad()
    def _scale_down(self) -> None:
        """What a norm that learns would do to images of -128..127 and to sums over 33 blocks."""
        cast(FrozenBatchNorm, self.conv1.bn).weight.fill_(1 / 64)
        for block in self.modules():
            if isinstance(block, Bottleneck):
                cast(FrozenBatchNorm, block.increase.bn).weight.fill_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last stage."""
        x = self.pool1(self.conv1(x).relu())
        for stage in range(2, 6):
            x = self.get_submodule(f"res{stage}")(x)
        return x
