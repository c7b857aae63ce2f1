"""FCN-32s, FCN-16s and FCN-8s on VGG-16 (arXiv:1411.4038, section 4; shelhamer/fcn.berkeleyvision.org, voc-fcn*).

| net     | scores                                                              | last deconvolution   | crop      |
| FCN-32s | score_fr                                                            | upscore, k64 s32     | 19        |
| FCN-16s | upscore2 (k4 s2) of them + score_pool4                              | upscore16, k32 s16   | 5, 27     |
| FCN-8s  | upscore_pool4 (k4 s2) of those + score_pool3                        | upscore8, k16 s8     | 5, 9, 31  |

conv1_1 is padded by 100 pixels, so that any image, of one pixel even, gives scores; crops bring them back in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crfnet.models.geometry import crop, deconvolution
from crfnet.models.preprocess import FCN as CONVENTION
from crfnet.models.preprocess import Convention, Preprocess
from crfnet.models.vgg import VGG16, fully_connected, score_layer

Features = Sequence[Tensor]  # of strides 8, 16 and 32 (pool3, pool4, fc7), or of 32 alone


class Trunk(nn.Module):
    """VGG-16 made convolutional: fc6 is a 7x7 convolution without padding, fc7 a 1x1."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        pools = [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(5)]
        self.vgg = VGG16(pools, channels=channels, first_padding=100)
        self.fc6 = fully_connected(512, 4096, 7)
        self.fc7 = fully_connected(4096, 4096, 1)

    def forward(self, x: Tensor) -> Features:
        """pool3, pool4 and fc7 of an image that is preprocessed."""
        _, _, pool3, pool4, pool5 = self.vgg(x)
        return pool3, pool4, self.fc7(self.fc6(pool5))


class Head32s(nn.Module):
    """Scores of stride 32, and the one deconvolution that enlarges them.

    Args:
        num_classes: number of labels ``L``.
        channels: of the features, fc7's.
        kernel: of the deconvolution.
        offset: of the crop; both belong to the trunk.
    """

    def __init__(self, num_classes: int, *, channels: int = 4096, kernel: int = 64, offset: int = 19) -> None:
        super().__init__()
        self.offset = offset
        self.score_fr = score_layer(channels, num_classes)
        self.upscore = deconvolution(num_classes, kernel, 32)

    def scores(self, features: Features) -> Tensor:
        """``(B, L, h, w)`` at the stride of the head."""
        scores: Tensor = self.score_fr(features[-1])
        return scores

    def enlarge(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """``(B, L, *size)`` in the place of the image."""
        return crop(self.upscore(scores), self.offset, size)


class Head16s(nn.Module):
    """Those of stride 32 and of pool4, added.

    ``learn_upsampling`` lets the deconvolutions but the last learn (section 4.3; the released nets fix all).
    """

    def __init__(self, num_classes: int, *, learn_upsampling: bool = False) -> None:
        super().__init__()
        self.scale4 = 1.0
        self.score_fr = score_layer(4096, num_classes)
        self.upscore2 = deconvolution(num_classes, 4, 2, learn=learn_upsampling)
        self.score_pool4 = score_layer(512, num_classes)
        self.upscore16 = deconvolution(num_classes, 32, 16)

    def scores(self, features: Features) -> Tensor:
        """``(B, L, h, w)`` at stride 16."""
        _, pool4, fc7 = features
        coarse: Tensor = self.upscore2(self.score_fr(fc7))
        return coarse + crop(self.score_pool4(pool4), 5, coarse.shape[2:])

    def enlarge(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """``(B, L, *size)`` in the place of the image."""
        return crop(self.upscore16(scores), 27, size)


class Head8s(nn.Module):
    """Those of stride 16 and of pool3, added.

    Args:
        num_classes: number of labels ``L``.
        at_once: pool4 and pool3 are scaled by 0.01 and 0.0001, so that all strides can be trained together.
        learn_upsampling: as of stride 16.
        upscore2_bias: CRF-RNN's FCN-8s has one.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        at_once: bool = False,
        learn_upsampling: bool = False,
        upscore2_bias: bool = False,
    ) -> None:
        super().__init__()
        self.scale4, self.scale3 = (0.01, 0.0001) if at_once else (1.0, 1.0)
        self.score_fr = score_layer(4096, num_classes)
        self.upscore2 = deconvolution(num_classes, 4, 2, learn=learn_upsampling, bias=upscore2_bias)
        self.score_pool4 = score_layer(512, num_classes)
        self.upscore_pool4 = deconvolution(num_classes, 4, 2, learn=learn_upsampling)
        self.score_pool3 = score_layer(256, num_classes)
        self.upscore8 = deconvolution(num_classes, 16, 8)

    def scores(self, features: Features) -> Tensor:
        """``(B, L, h, w)`` at stride 8."""
        pool3, pool4, fc7 = features
        coarse = self.upscore2(self.score_fr(fc7))
        middle = coarse + crop(self.score_pool4(self.scale4 * pool4), 5, coarse.shape[2:])
        fine: Tensor = self.upscore_pool4(middle)
        return fine + crop(self.score_pool3(self.scale3 * pool3), 9, fine.shape[2:])

    def enlarge(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """``(B, L, *size)`` in the place of the image."""
        return crop(self.upscore8(scores), 31, size)


HEADS: dict[int, type[Head32s] | type[Head16s] | type[Head8s]] = {32: Head32s, 16: Head16s, 8: Head8s}


class FCN(nn.Module):
    """A head on a trunk, which all FCNs are.

    Shape:
        image ``(B, G, H, W)``, RGB in 0..255 and further channels as the convention has → logits ``(B, L, H, W)``;
        with ``upsample=False`` scores ``(B, L, h, w)`` at the stride of the head, padded borders and all.
    """

    def __init__(self, trunk: nn.Module, head: Head32s | Head16s | Head8s, convention: Convention) -> None:
        super().__init__()
        self.preprocess, self.trunk, self.head = Preprocess(convention), trunk, head

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size."""
        scores = self.head.scores(self.trunk(self.preprocess(image)))
        return self.head.enlarge(scores, image.shape[2:]) if upsample else scores


class FCN32s(FCN):
    """FCN-32s.

    Args:
        num_classes: number of labels ``L``.
        convention: channels and mean of the input, of :mod:`crfnet.models.preprocess`. With NYUD_COLOUR_DEPTH the input
            has four channels (early fusion), the last a depth in the unit of NYUDv2's files, positive.
    """

    def __init__(self, num_classes: int = 21, *, convention: Convention = CONVENTION) -> None:
        super().__init__(Trunk(len(convention.order)), Head32s(num_classes), convention)


class FCN16s(FCN):
    """FCN-16s; trained from an FCN-32s: ``start_from(fcn16s, fcn32s)``. Arguments as of its head and of FCN-32s."""

    def __init__(
        self, num_classes: int = 21, *, learn_upsampling: bool = False, convention: Convention = CONVENTION
    ) -> None:
        head = Head16s(num_classes, learn_upsampling=learn_upsampling)
        super().__init__(Trunk(len(convention.order)), head, convention)


class FCN8s(FCN):
    """FCN-8s; trained from an FCN-16s: ``start_from(fcn8s, fcn16s)``. Arguments as of its head and of FCN-32s."""

    def __init__(
        self,
        num_classes: int = 21,
        *,
        at_once: bool = False,
        learn_upsampling: bool = False,
        convention: Convention = CONVENTION,
    ) -> None:
        head = Head8s(num_classes, at_once=at_once, learn_upsampling=learn_upsampling)
        super().__init__(Trunk(len(convention.order)), head, convention)


@torch.no_grad()
def start_from(finer: nn.Module, coarser: nn.Module) -> list[str]:
    """Copies into an FCN all that another has learnt, a last deconvolution of larger stride excepted.

    So FCN-16s starts from FCN-32s, FCN-8s from FCN-16s (arXiv:1411.4038, section 4.2), CRF-RNN's FCN-8s from FCN-8s.
    Returns the names of what it leaves: the layers that are new.

    Raises:
        ValueError: the coarser net has layers that the finer one lacks or has in another shape, or scales pool4
            differently (at once). Nothing is copied then.
    """
    old, new = coarser.state_dict(), finer.state_dict()
    kept = {n: v for n, v in old.items() if n in new or not n.endswith(("upscore.weight", "upscore16.weight"))}
    wrong = sorted(name for name in kept if name not in new or new[name].shape != kept[name].shape)
    if wrong or not kept:
        raise ValueError(
            f"coarser must be an FCN of no smaller stride, with the same classes and input as {type(finer).__name__}, "
            f"got {type(coarser).__name__}" + (f" with other {', '.join(wrong[:8])}" if wrong else "")
        )
    scales = [{m.scale4 for m in net.modules() if isinstance(m, Head16s | Head8s)} for net in (coarser, finer)]
    if scales[0] and scales[0] != scales[1]:
        raise ValueError(f"coarser must scale pool4 by {scales[1]} as finer does (at once), got {scales[0]}")
    for name, value in kept.items():
        new[name].copy_(value)
    return [name for name in new if name not in kept]
