"""DeepLab v2's three scales: one network on the image at 1, 0.75 and 0.5, scores fused by their maximum.

    scores = max(s(x), up(s(x at 0.75)), up(s(x at 0.5)))           element-wise, up = bilinear to the size of s(x)

In training four losses are added, of the fused scores and of each scale (arXiv:1606.00915, section 4.1.2; the released
train.prototxt): those at 0.75 after enlarging, those at 0.5 at their own size, stride 16 of the image.
"""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from crfnet.models.geometry import crop, interp, pad_to, zoom


class Scores(NamedTuple):
    """What the losses compare with labels, sizes for an image of 321 x 321."""

    fused: Tensor  # (B, L, 41, 41)
    full: Tensor  # (B, L, 41, 41), scale 1
    three_quarters: Tensor  # (B, L, 41, 41), scale 0.75, enlarged
    half: Tensor  # (B, L, 21, 21), scale 0.5


class Single(Protocol):
    """What a network must have."""

    preprocess: nn.Module
    output_stride: int
    aligned: bool  # whether score i lies at pixel output_stride * i

    def scores(self, x: Tensor) -> Tensor:
        """``(B, L, h, w)`` from a preprocessed image."""
        ...


class MultiScale(nn.Module):
    """A network at three scales with shared weights.

    Args:
        network: one whose score i lies at pixel 8 i: DeepLabV2ResNet, DeepLabV2VGG, DeepLabV1 with 3x3 pools,
            BackboneDeepLab on such a backbone.

    Shape:
        image ``(B, 3, H, W)`` → logits ``(B, L, H, W)``; with ``upsample=False`` the :class:`Scores`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        wanted = {"output_stride": 8, "aligned": True}
        got = {name: getattr(network, name, None) for name in wanted}
        if got != wanted or not hasattr(network, "preprocess") or not hasattr(network, "scores"):
            raise ValueError(
                f"network must have scores at every 8th pixel, as DeepLabV2ResNet has, got "
                f"{type(network).__name__} with {got}"
            )
        self.network = network

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor | Scores:
        """Fused logits at the image's own size."""
        x = self.network.preprocess(image)  # type: ignore[operator]
        if not upsample:
            return self.scores(x)
        return crop(zoom(self.scores(pad_to(x, 32, 1)).fused, 8), 0, image.shape[2:])

    def scores(self, x: Tensor) -> Scores:
        """Scores of all scales from a preprocessed image; 32 k + 1 pixels an axis put them exactly on each other."""
        network: Single = self.network  # type: ignore[assignment]
        full = network.scores(x)
        # Caffe's Interp: shrink by 4 and zoom by 3; shrink by 2
        three_quarters = interp(network.scores(interp(x, [(n - 1) // 4 * 3 + 1 for n in x.shape[2:]])), full.shape[2:])
        half = network.scores(interp(x, [(n - 1) // 2 + 1 for n in x.shape[2:]]))
        fused = full.maximum(three_quarters).maximum(interp(half, full.shape[2:]))
        return Scores(fused, full, three_quarters, half)
