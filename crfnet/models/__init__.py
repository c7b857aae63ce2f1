"""Networks from images (B, 3, H, W) in 0..255 to logits (B, L, H, W), one network a file."""

from crfnet.models.small import SmallDeepLab
from crfnet.models.with_crf import WithCRF

__all__ = ["SmallDeepLab", "WithCRF"]
