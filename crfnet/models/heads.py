"""DeepLab's heads: a 3x3 convolution with wide holes, or several of other rates, added (arXiv:1606.00915, figure 7).

scores = sum_k branch_k(features),   branch_k = 3x3 of rate r_k
on VGG-16: 3x3 of rate r_k, 1x1, 1x1, with ReLU and dropout between (fc6_k, fc7_k, fc8_k)
"""

from collections.abc import Sequence

from torch import Tensor, nn

from crfnet.inputs import whole_number
from crfnet.models.vgg import fully_connected, score_layer, zero


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: parallel branches, one a rate, whose scores are added.

    Args:
        inputs: channels of the features.
        num_classes: number of labels ``L``.
        rates: dilations in cells of the features: (6, 12, 18, 24) ASPP-L, (2, 4, 8, 12) ASPP-S, at stride 8.
        hidden: channels between, 1024 in VGG-16's branches (fc6, fc7, fc8); None for one convolution a branch.

    Shape:
        features ``(B, inputs, h, w)`` → scores ``(B, L, h, w)``.
    """

    def __init__(
        self, inputs: int, num_classes: int, *, rates: Sequence[int] = (6, 12, 18, 24), hidden: int | None = None
    ) -> None:
        super().__init__()
        whole_number("num_classes", num_classes, 1)
        if isinstance(rates, int) or not rates or any(not isinstance(rate, int) or rate < 1 for rate in rates):
            raise ValueError(f"rates must be dilations of at least 1, one a branch, got {rates}")
        self.branches = nn.ModuleList(_branch(inputs, num_classes, rate, hidden) for rate in rates)

    def forward(self, features: Tensor) -> Tensor:
        """The sum of the branches' scores."""
        total: Tensor = self.branches[0](features)
        for branch in self.branches[1:]:
            total = total + branch(features)
        return total


class LargeFOV(ASPP):
    """The one branch of rate 12, a field of view of 224 pixels at stride 8 (arXiv:1412.7062, section 3.2)."""

    def __init__(self, inputs: int, num_classes: int, *, rate: int = 12, hidden: int | None = None) -> None:
        super().__init__(inputs, num_classes, rates=(rate,), hidden=hidden)


class Branch(nn.Module):
    """fc6 of some rate, fc7, fc8."""

    def __init__(self, inputs: int, num_classes: int, rate: int, hidden: int) -> None:
        super().__init__()
        self.fc6 = fully_connected(inputs, hidden, 3, hole=rate, padding=rate)
        self.fc7 = fully_connected(hidden, hidden, 1)
        self.fc8 = score_layer(hidden, num_classes, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of one branch."""
        scores: Tensor = self.fc8(self.fc7(self.fc6(features)))
        return scores


def _branch(inputs: int, num_classes: int, rate: int, hidden: int | None) -> nn.Module:
    if hidden is not None:
        return Branch(inputs, num_classes, rate, hidden)
    conv = nn.Conv2d(inputs, num_classes, 3, padding=rate, dilation=rate)
    nn.init.normal_(conv.weight, std=0.01)
    zero(conv.bias)
    return conv
