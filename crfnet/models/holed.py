"""Convolution and pools with what torch's own lack: padding at the end alone, and averages with holes.

`crfnet.models.dilate` turns layers into these where it has to; their parameters and names stay.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]  # along y and x


class HoledConv2d(nn.Conv2d):
    """A convolution whose input gets ``end`` further rows and columns of zeros."""

    end: Pair

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d."""
        return super().forward(F.pad(input, (0, self.end[1], 0, self.end[0])))


class HoledMaxPool2d(nn.MaxPool2d):
    """A max pool with holes and padding of any width (torch limits it by the kernel without holes), ``end`` further."""

    end: Pair

    def forward(self, input: Tensor) -> Tensor:
        """As nn.MaxPool2d."""
        (py, px), (ey, ex) = pair(self.padding), self.end
        x = F.pad(input, (px, px + ex, py, py + ey), value=-torch.inf)
        return F.max_pool2d(x, self.kernel_size, self.stride, 0, self.dilation)


class HoledAvgPool2d(nn.AvgPool2d):
    """An average pool with ``dilation``, which torch lacks; ``end`` further rows and columns count for nothing."""

    end: Pair
    dilation: Pair

    def forward(self, input: Tensor) -> Tensor:
        """As nn.AvgPool2d: divided by the pixels in the window, its own padding among them or not, or as told."""
        if self.divisor_override:
            return self._sums(input, 0.0) / self.divisor_override
        count = self._sums(torch.ones_like(input[..., :1, :, :]), float(self.count_include_pad))
        return self._sums(input, 0.0) / count.clamp(min=1)

    def _sums(self, x: Tensor, padding: float) -> Tensor:
        (kh, kw), (sy, sx), (py, px) = pair(self.kernel_size), pair(self.stride), pair(self.padding)
        (dy, dx), (ey, ex) = self.dilation, self.end
        x = F.pad(F.pad(x, (px, px, py, py), value=padding), (0, ex, 0, ey))
        H, W = x.shape[-2] - dy * (kh - 1), x.shape[-1] - dx * (kw - 1)
        x = reduce(torch.add, [x[..., j * dy : j * dy + H : sy, :] for j in range(kh)])
        return reduce(torch.add, [x[..., j * dx : j * dx + W : sx] for j in range(kw)])


def pair(value: Any) -> Pair:
    """A number for both axes, or one of each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]
