"""Features of a pixel: its position and its guide's channels, each divided by its bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_features(
    guide: Tensor,  # (B, G, *S)
    theta_position: float | Tensor | None,  # pixels, one for all axes or one for each; None leaves positions out
    theta_guide: float | Tensor,  # one for all channels or one for each
) -> Tensor:  # (B, N, axes + G), or (B, N, G) without positions
    """f_i = (p_i / theta_position, I_i / theta_guide), pixels in row-major order, in the guide's dtype."""
    features = guide.flatten(2).mT / theta_guide
    if theta_position is None:
        return features
    axes = [torch.arange(n, dtype=guide.dtype, device=guide.device) for n in guide.shape[2:]]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, len(axes)) / theta_position
    return torch.cat([positions.expand(guide.shape[0], -1, -1), features], 2)
