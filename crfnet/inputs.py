"""The checks at the CRF's door: what came, what was wanted, before anything is computed."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.gpu import host_may_read


class Inputs(NamedTuple):
    """Checked inputs, pixels in one axis."""

    logits: Tensor  # (B, N, C) float32 or float64, 0 where masked; not contiguous
    guides: dict[str, Tensor]  # by name, (B, G, *shape), same dtype
    mask: Tensor | None  # (B, N)
    shape: tuple[int, ...]  # of the pixel grid


def among(name: str, got: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``got`` is one of ``allowed``."""
    if got not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {got!r}")


def whole_number(name: str, got: Any, least: int) -> None:
    """Raise ValueError unless ``got`` is a whole number of at least ``least``."""
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {got!r}")


def check_inputs(
    num_classes: int,
    logits: Tensor,
    image: Tensor,
    mask: Tensor | None,
    guides: Mapping[str, Tensor],
    image_range: tuple[float, float] | None,
) -> Inputs:
    """Check everything, scale the image to 0..255 by its range, and bring all to one dtype.

    Values are not looked at while a graph is compiled or captured: the host cannot read them then.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {kind(logits)}")
    if not 3 <= logits.ndim <= 5 or logits.shape[1] != num_classes or 0 in logits.shape:
        raise ValueError(
            f"logits must be (B, {num_classes}, H, W), or have 1 or 3 axes in place of (H, W), none of them 0, "
            f"got {tuple(logits.shape)}; one image alone is logits[None]"
        )
    if "image" in guides:
        raise ValueError("guides must have names of their own, got 'image', which is the image's")
    for name, guide in {"image": image, **guides}.items():
        _check_guide(name, guide, logits)
    if mask is not None:
        _check_mask(mask, logits)
    inside = None if mask is None else mask.unsqueeze(1)
    if inside is not None:
        logits = logits.masked_fill(~inside, 0)
    if not all(map(math.isfinite, extremes(logits))):
        raise ValueError(
            "logits must be finite, got NaN or infinity; for the logarithm of probabilities that may be 0 there is "
            "crfnet.logits_from_probabilities"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    checked = {}
    for name, guide in {"image": image, **guides}.items():
        guide = guide.to(dtype)
        if inside is not None:
            guide = torch.where(inside, guide, guide.new_zeros(()) if image_range is None else float(image_range[0]))
        low, high = extremes(guide)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite, got NaN or infinity; a mask leaves pixels without data out")
        if name == "image" and image_range is not None:
            if host_may_read(guide):
                _check_range(low, high, image.is_floating_point(), *image_range)
            guide = (guide - image_range[0]) * (255.0 / (image_range[1] - image_range[0]))
        checked[name] = guide
    flat_mask = None if mask is None else mask.flatten(1)
    return Inputs(logits.to(dtype).flatten(2).mT, checked, flat_mask, tuple(logits.shape[2:]))


def extremes(values: Tensor) -> tuple[float, float]:
    """Least and greatest value, NaN where there is one; (0, 0) where the host may not read them, or there are none."""
    if values.is_meta or not host_may_read(values):
        return 0.0, 0.0
    low, high = values.detach().aminmax()
    # one wait for a GPU, not two; of the same dtype whatever autocast thinks
    both = torch.empty(2, dtype=values.dtype, device=values.device)
    both[0], both[1] = low, high
    least, greatest = both.tolist()
    return least, greatest


def _check_mask(mask: Tensor, logits: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a pixel takes part, got {kind(mask)}")
    wanted = (logits.shape[0], *logits.shape[2:])
    if mask.shape != wanted or mask.device != logits.device:
        raise ValueError(
            f"mask must be {wanted} on {logits.device} like the logits, got {tuple(mask.shape)} on {mask.device}"
        )
    if host_may_read(mask) and not bool(mask.flatten(1).any(1).all()):
        empty = int((~mask.flatten(1).any(1)).nonzero()[0])
        raise ValueError(f"mask must leave at least one pixel in every image, got none in image {empty}")


def _check_guide(name: str, guide: Tensor, logits: Tensor) -> None:
    if not isinstance(guide, Tensor) or guide.is_complex() or guide.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of numbers, got {kind(guide)}")
    B, _, *shape = logits.shape
    if guide.ndim != logits.ndim or guide.shape[0] != B or list(guide.shape[2:]) != shape or guide.shape[1] == 0:
        wanted = ", ".join(map(str, [B, "G", *shape]))
        raise ValueError(f"{name} must be ({wanted}) for logits {tuple(logits.shape)}, got {tuple(guide.shape)}")
    if guide.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like the logits, got {guide.device}")


def _check_range(low: float, high: float, real: bool, black: float, white: float) -> None:
    slack = 1e-3 * (white - black)  # resampling overshoots a little
    if low < black - slack or high > white + slack:
        hint = "; was its mean subtracted?" if low < black - slack else ""
        raise ValueError(
            f"image must lie in image_range {black:g}..{white:g}, got {low:g} to {high:g}{hint} "
            "(image_range=None takes any guide as it is)"
        )
    if real and white == 255.0 and low < high <= 1.0:
        warnings.warn(
            f"image spans {low:g} to {high:g} of image_range {black:g}..{white:g}: "
            "if white is 1, pass image_range=(0, 1)",
            stacklevel=frames_of_ours() + 1,
        )


def frames_of_ours() -> int:
    """How many frames, from the caller on, belong to crfnet or torch: a warning points at the one that called them."""
    frame, count = sys._getframe(1), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("crfnet", "torch"):
        frame, count = frame.f_back, count + 1  # type: ignore[assignment]
    return count


def kind(thing: Any) -> str:
    """How to name what came in an error message."""
    return f"a tensor of {thing.dtype}" if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
