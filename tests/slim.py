"""The package's networks with an eighth or a sixteenth of their channels: all layers, strides, holes; no waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from crfnet.models.resnet import FrozenBatchNorm

NORMS = (nn.BatchNorm2d, FrozenBatchNorm)
LABELS = (21, 33, 40)  # and 3, 4 and 6 channels: what no trunk has, and what therefore stays as it is


@contextmanager
def slim(divisor: int = 16) -> Iterator[None]:
    """Within it, networks get ``channels // divisor`` wherever channels are those of a trunk."""

    def few(channels: int) -> int:
        return channels if channels <= 6 or channels in LABELS else max(1, channels // divisor)

    conv, norm, frozen = nn.Conv2d.__init__, nn.BatchNorm2d.__init__, FrozenBatchNorm.__init__

    def slim_conv(self, inputs, outputs, *args, **settings):
        conv(self, few(inputs), few(outputs), *args, **settings)

    def slim_norm(self, channels, *args, **settings):
        norm(self, few(channels), *args, **settings)

    def slim_frozen(self, channels):
        frozen(self, few(channels))

    with (
        mock.patch.object(nn.Conv2d, "__init__", slim_conv),
        mock.patch.object(nn.BatchNorm2d, "__init__", slim_norm),
        mock.patch.object(FrozenBatchNorm, "__init__", slim_frozen),
    ):
        yield


def make(build: Callable[[], nn.Module], *, divisor: int = 16, seed: int = 0) -> nn.Module:
    """A slim network in evaluation mode, its own initial values."""
    torch.manual_seed(seed)
    with slim(divisor):
        return build().eval()


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, statistics of batch norm all drawn anew, so that no layer is an identity or zero.

    Deconvolutions keep theirs. Activations neither vanish nor explode over a hundred layers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            bound = (6 / module.weight[0].numel()) ** 0.5  # variance 2 / fan in, as He's
            module.weight.copy_(draw(module.weight, -bound, bound))
            if module.bias is not None:
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
        elif isinstance(module, NORMS):
            gain = 0.3 if name.endswith("increase.bn") else 1.0  # residual branches, else the sum doubles a block
            module.weight.copy_(draw(module.weight, 0.5 * gain, 1.5 * gain))
            module.bias.copy_(draw(module.bias, -0.5, 0.5))
            module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
    return network


@torch.no_grad()
def positive(network: nn.Module) -> nn.Module:
    """Makes it linear with positive weights: averages for maxima, no biases, no local norm, no preprocessing.

    The gradient of one output is then the whole of what it sees, and where it sees it.
    """
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):  # a pool used twice has two names
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
            elif isinstance(child, nn.LocalResponseNorm):
                setattr(module, name, nn.Identity())
            elif name == "preprocess":
                setattr(module, name, without_preprocessing(child))
            elif isinstance(child, nn.Conv2d):
                child.weight.fill_(1 / child.weight[0].numel())
                if child.bias is not None:
                    child.bias.zero_()
    return network


def without_preprocessing(preprocess: nn.Module) -> nn.Module:
    if isinstance(preprocess, nn.ModuleDict):
        return nn.ModuleDict({name: nn.Identity() for name in preprocess})
    return nn.Identity()
