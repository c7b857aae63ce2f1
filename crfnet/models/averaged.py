"""Inference at several scales and mirrored: class probabilities averaged at the image's size.

    p = mean over scales s, and m in {as it is, mirrored}, of softmax(m(up(network(m(resize(image, s))))))
    out = log p, so that softmax(out) = p                                   up = bilinear to the image's size

A CRF comes once, on the average and the whole image, as in DeepLab v2, where it follows the fusion of the scales
(arXiv:1606.00915, section 4.1.2). That paper fuses three scales by the maximum of their scores, in training too, which
is ``MultiScale``; one may be averaged as well. Source of the mean of probabilities: tensorflow/models,
research/deeplab/model.py, predict_labels_multi_scale.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.crf import DenseCRF
from crfnet.models.with_crf import WithCRF

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)


class Averaged(nn.Module):
    """A network on several sizes of an image and its mirror images, for inference.

    Args:
        network: from images ``(B, G, H, W)`` to logits ``(B, L, h, w)`` of any size, or to a tuple of them for several
            labellings (``SiftFlowFCN``). Of a ``WithCRF`` the network is averaged and the CRF applied once, at the
            image's own size: ``Averaged(WithCRF(network, crf))`` is ``WithCRF(Averaged(network), crf)``.
        scales: of height and width, ``round(scale * n)`` pixels each, at least 1.
        mirror: at each scale left and right exchanged as well.

    Shape:
        image ``(B, G, H, W)``, mask ``(B, H, W)`` bool with a ``WithCRF`` alone → logarithms of the averaged
        probabilities ``(B, L, H, W)``, or the CRF's logits.

    The image is shrunk and enlarged bilinearly, over the area of a pixel when shrunk, as ``crfnet.data.Crop`` does in
    training. One forward pass at a time, ``len(scales) * (1 + mirror)`` in all.
    """

    def __init__(self, network: nn.Module, *, scales: Sequence[float] = SCALES, mirror: bool = True) -> None:
        super().__init__()
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(f"scales must be at least one, positive and finite, got {tuple(scales)}")
        inner = network.network if isinstance(network, WithCRF) else network
        within = [name or "the network itself" for name, part in inner.named_modules() if isinstance(part, DenseCRF)]
        if within:
            raise ValueError(
                f"{type(network).__name__} holds a CRF ({', '.join(within)}), which would run at every scale; "
                "put it around the network with WithCRF, and it runs once"
            )
        self.network, self.scales, self.mirror = network, tuple(scales), mirror

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Any:
        """Log-probabilities at the image's own size, or the CRF's logits."""
        if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape:
            raise ValueError(f"image must be (B, G, H, W), not empty, got {tuple(getattr(image, 'shape', ()))}")
        if isinstance(self.network, WithCRF):
            averaged = self._average(self.network.network, self.network.preprocess, image)
            if not isinstance(averaged, Tensor):
                raise TypeError(f"a network under a CRF must return one tensor of logits, got {len(averaged)}")
            return self.network.crf(averaged, image, mask)
        if mask is not None:
            raise ValueError("mask is for a CRF, and this network has none")
        return self._average(self.network, None, image)

    def _average(self, network: nn.Module, preprocess: nn.Module | None, image: Tensor) -> Any:
        total: list[Tensor] = []
        for scale in self.scales:
            scaled = _resized(image, scale)
            for mirrored in (False, True) if self.mirror else (False,):
                view = scaled.flip(-1) if mirrored else scaled
                out = network(view if preprocess is None else preprocess(view))
                parts = [_log_probabilities(part, mirrored, image) for part in _parts(out)]
                total = [a.logaddexp(b) for a, b in zip(total, parts, strict=True)] if total else parts
        mean = [part - math.log(len(self.scales) * (1 + self.mirror)) for part in total]
        if isinstance(out, Tensor):
            return mean[0]
        return type(out)(*mean) if hasattr(out, "_fields") else tuple(mean)  # a named tuple stays one


def _resized(image: Tensor, scale: float) -> Tensor:
    image = image if image.is_floating_point() else image.float()
    size = [max(1, round(scale * n)) for n in image.shape[2:]]
    if size == list(image.shape[2:]):
        return image
    out = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    # a mean, but for rounding: no channel leaves the range it had
    return out.clamp(image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True))


def _parts(out: Any) -> tuple[Tensor, ...]:
    parts = (out,) if isinstance(out, Tensor) else out
    if not isinstance(parts, tuple) or not parts or not all(isinstance(p, Tensor) and p.ndim == 4 for p in parts):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"network must return logits (B, L, H, W), or a tuple of such tensors, got {got}")
    return parts


def _log_probabilities(logits: Tensor, mirrored: bool, image: Tensor) -> Tensor:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if logits.shape[2:] != image.shape[2:]:
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
    return (logits.flip(-1) if mirrored else logits).log_softmax(1)
