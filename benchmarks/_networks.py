"""The networks that networks.py measures: how each is built and trained, and weights drawn for it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crfnet import DenseCRF, models
from crfnet.losses import cross_entropy, multi_scale_loss

SPREAD = 4.0  # standard deviation of the logits


def full_size_loss(network: Any, image: Tensor, labels: Tensor) -> Tensor:
    """FCN's and CRF-RNN's."""
    return cross_entropy(network(image), labels)


def two_losses(network: Any, image: Tensor, labels: Tensor) -> Tensor:
    """SIFT Flow's, semantic and geometric labels."""
    semantic, geometric = network(image)
    return cross_entropy(semantic, labels) + cross_entropy(geometric, labels % 3)


def loss_at_scores(network: Any, image: Tensor, labels: Tensor) -> Tensor:
    """DeepLab's, an eighth of the size."""
    return cross_entropy(network(image, upsample=False), network.subsample(labels))


def three_scales_loss(network: Any, image: Tensor, labels: Tensor) -> Tensor:
    """DeepLab v2's with three scales."""
    return multi_scale_loss(network(image, upsample=False), labels)


class Network(NamedTuple):
    """What is built, and how it is trained."""

    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor] = full_size_loss
    crop: tuple[int, int] = (1, 0)  # (s, r): crops of s k + r pixels
    labels: tuple[int, ...] = (21,)
    channels: int = 3
    trained: str = ""  # the part that is; "" all of it

    def largest_crop(self, size: int) -> int:
        """Pixels an axis of the largest crop within ``size`` that the loss takes."""
        stride, remainder = self.crop
        pixels = size - (size - remainder) % stride
        if pixels < 1:
            raise ValueError(
                f"size must be {remainder} or more for crops of {stride} k + {remainder} pixels, got {size}"
            )
        return pixels


def piecewise() -> nn.Module:
    """DeepLab under its CRF, which is fitted to the trained network; values within the range searched in the paper."""
    crf = DenseCRF(
        21, theta_alpha=50, theta_beta=3, theta_gamma=3, spatial_weight=3, bilateral_weight=5,
        weights="scalar", compatibility="potts", learn=(),
    )  # fmt: skip
    return models.WithCRF(models.DeepLabV1(), crf)


at_scores = partial(Network, loss=loss_at_scores, crop=(8, 1))
v1, vgg, resnet = models.DeepLabV1, models.DeepLabV2VGG, models.DeepLabV2ResNet
NETWORKS = {
    "FCN-32s": Network(models.FCN32s),
    "FCN-16s": Network(models.FCN16s),
    "FCN-8s": Network(models.FCN8s),
    "FCN-AlexNet": Network(models.FCNAlexNet),
    "FCN-GoogLeNet": Network(models.FCNGoogLeNet),
    "FCN-32s-NYUD-RGB-HHA": Network(models.LateFusionFCN, labels=(40,), channels=6),
    "FCN-16s-SIFT-Flow": Network(models.SiftFlowFCN, two_losses, labels=(33, 3)),
    "DeepLabV1-deeplab": at_scores(lambda: v1(variant="deeplab"), crop=(8, 2)),
    "DeepLabV1-7x7": at_scores(lambda: v1(variant="7x7"), crop=(8, 2)),
    "DeepLabV1-4x4": at_scores(lambda: v1(variant="4x4"), crop=(8, 2)),
    "DeepLabV1-largefov": at_scores(v1),
    "DeepLabV1-MSc-largefov": at_scores(models.DeepLabV1MSc),
    "DeepLabV2-VGG-aspp-s": at_scores(lambda: vgg(head="aspp-s")),
    "DeepLabV2-VGG-aspp-l": at_scores(lambda: vgg(head="aspp-l")),
    "DeepLabV2-ResNet-largefov": at_scores(lambda: resnet(head="largefov")),
    "DeepLabV2-ResNet-aspp": at_scores(resnet),
    "DeepLabV2-ResNet-aspp-MultiScale": Network(lambda: models.MultiScale(resnet()), three_scales_loss, (32, 1)),
    "CRF-RNN": Network(models.CRFRNN),
    "DeepLabV1-largefov-CRF": at_scores(piecewise, trained="network"),
    "SmallDeepLab": Network(lambda: models.SmallDeepLab(21)),
}


def outputs(logits: Any) -> list[Tensor]:
    """Those of each task, in float32."""
    return [task.float() for task in (logits if isinstance(logits, tuple) else (logits,))]


def normalise(norm: Any, inputs: tuple[Tensor]) -> None:
    """Let a batch norm, frozen or not, bring its input to unit scale.

    Did it take means off, or scale channels one by one, 100 drawn layers would amplify roundings; trained ones do not.
    """
    norm.running_var.fill_(inputs[0].square().mean())


@torch.no_grad()
def draw(network: Network, image: Tensor) -> nn.Module:
    """The network with drawn weights that do to numbers what trained ones do: none at 0, none that grow.

    Score layers, which start at 0 in FCN, are drawn too, and spread the logits by SPREAD.
    """
    model = network.build().to(image.device).eval()
    scores = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in network.labels]
    for layer in scores:
        nn.init.normal_(layer.weight, std=0.01)
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    hooks = [norm.register_forward_pre_hook(normalise) for norm in norms]
    bare = getattr(model, "network", model)  # without CRF, and at one scale
    logits = torch.cat([task.flatten() for task in outputs(bare(image[..., :257, :257]))])
    for hook in hooks:
        hook.remove()
    for layer in scores:
        layer.weight.mul_(SPREAD / logits.std())
    return model
