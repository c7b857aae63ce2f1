"""FCN on SIFT Flow: semantic and geometric labels at once (arXiv:1411.4038, section 5; siftflow-fcn*/net.py).

One trunk, two heads with score and upsampling layers of their own; the losses are added.
"""

from typing import NamedTuple

from torch import Tensor, nn

from crfnet.models.fcn import HEADS, Trunk
from crfnet.models.preprocess import SIFT_FLOW, Preprocess


class TwoLabels(NamedTuple):
    """Logits of both tasks."""

    semantic: Tensor  # (B, 33, H, W)
    geometric: Tensor  # (B, 3, H, W): sky, horizontal, vertical


class SiftFlowFCN(nn.Module):
    """FCN with a head for 33 semantic and one for 3 geometric classes.

    Args:
        num_semantic: semantic labels.
        num_geometric: geometric labels.
        stride: of both heads: 32, 16 or 8. A finer one starts from a coarser, ``crfnet.models.start_from``.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, num_semantic, H, W)`` and ``(B, num_geometric, H, W)``.
    """

    def __init__(self, num_semantic: int = 33, num_geometric: int = 3, *, stride: int = 16) -> None:
        super().__init__()
        if stride not in HEADS:
            raise ValueError(f"stride must be one of {sorted(HEADS)}, got {stride}")
        self.preprocess = Preprocess(SIFT_FLOW)
        self.trunk = Trunk()
        self.semantic, self.geometric = HEADS[stride](num_semantic), HEADS[stride](num_geometric)

    def forward(self, image: Tensor) -> TwoLabels:
        """Logits of both tasks at the image's own size."""
        features = self.trunk(self.preprocess(image))
        return TwoLabels(
            *(head.enlarge(head.scores(features), image.shape[2:]) for head in (self.semantic, self.geometric))
        )
