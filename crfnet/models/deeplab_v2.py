"""DeepLab v2's networks by the names that the rows of its tables have."""

from typing import Literal, get_args

from crfnet.inputs import among
from crfnet.models.deeplab_v2_resnet import DeepLabV2ResNet
from crfnet.models.deeplab_v2_vgg import DeepLabV2VGG
from crfnet.models.resnet import StrideOn

DeepLabV2Name = Literal[
    "vgg-largefov", "vgg-aspp-s", "vgg-aspp-l", "resnet-plain", "resnet-largefov", "resnet-aspp"
]  # fmt: skip


def deeplab_v2(
    name: DeepLabV2Name, num_classes: int = 21, *, stride_on: StrideOn = "reduce"
) -> DeepLabV2VGG | DeepLabV2ResNet:
    """The network of a row of arXiv:1606.00915, tables 2 to 9, at one scale; ``MultiScale`` makes it three.

    Args:
        name: trunk and head, such as "vgg-aspp-l" or "resnet-aspp".
        num_classes: number of labels.
        stride_on: of ResNet-101, "reduce" for DeepLab's own weights, "conv3x3" for torchvision's.

    Raises:
        ValueError: another name, or a ``stride_on`` for VGG-16.
    """
    among("name", name, get_args(DeepLabV2Name))
    trunk, head = name.split("-", 1)
    if trunk == "vgg":
        if stride_on != "reduce":
            raise ValueError(f"stride_on is of ResNet-101, got {stride_on!r} for {name!r}")
        return DeepLabV2VGG(num_classes, head=head)  # type: ignore[arg-type]
    return DeepLabV2ResNet(num_classes, head=head, stride_on=stride_on)  # type: ignore[arg-type]
