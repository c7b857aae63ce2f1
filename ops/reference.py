"""The definitions: what every faster engine is judged against, in plain differentiable PyTorch.

    out_i = sum_j K_ij v_j,    K_ij = exp(-|f_i - f_j|² / 2),    j = i included.

Any floating dtype and device; in float64 this file is the oracle. Features are already divided by their bandwidths.
Masked pixels neither send nor receive: K_ij becomes m_i K_ij m_j, whatever the features and values there, NaN included.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["none", "before", "after", "symmetric"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

# A pixel that takes part receives its own message, so n >= 1 for the exact kernel; only rows of zeros (masked pixels)
# are ever this small. Larger than the 1e-20 of other systems so that 1 / n², a gradient, stays finite in float32.
EPS = 1e-12

# Least row sum once self-messages are removed: a pixel without neighbours then hears nothing instead of rounding noise.
SELF_FLOOR = 1e-3


def normalized(
    apply: Callable[[Tensor], Tensor],  # (B, N, C) → (B, N, C), x ↦ K x, a new tensor
    values: Tensor,  # (B, N, C)
    n: Tensor | None,  # (B, N, 1), the row sums K 1; unused and may be None for "none"
    normalization: str,
) -> Tensor:  # (B, N, C)
    """Apply K with its row sums n = K 1 divided out.

    none: K x;  before: K (x / n);  after: (K x) / n;  symmetric: s K (s x) with s = n^(-1/2). The four variants of
    Krähenbühl and Koltun's dense CRF library; "after" is what DeepLab and CRF-RNN use.
    """
    if normalization == "none":
        return apply(values)
    if n is None:
        raise ValueError(f"n must be the row sums K 1 for normalization {normalization!r}, got None")
    n = n.clamp(min=EPS)
    if normalization == "before":
        return apply(values / n)
    if normalization == "after":
        return _scaled(apply(values), n.reciprocal())
    if normalization == "symmetric":
        s = n.rsqrt()
        return _scaled(apply(s * values), s)
    raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")


def _scaled(new: Tensor, factor: Tensor) -> Tensor:
    """``new * factor``, in place where nobody will differentiate it: ``new`` is nobody else's."""
    recorded = torch.is_grad_enabled() and (new.requires_grad or factor.requires_grad)
    return new * factor if recorded else new.mul_(factor)


def kernel_matrix(
    features: Tensor,  # (B, N, D)
    mask: Tensor | None = None,  # (B, N) bool, True = takes part
) -> Tensor:  # (B, N, N)
    """K_ij = exp(-|f_i - f_j|² / 2), rows and columns of masked pixels set to 0."""
    if mask is None:
        difference = features[:, :, None] - features[:, None]  # (B, N, N, D)
        return torch.exp(-0.5 * difference.square().sum(-1))
    pairs = mask[:, :, None] & mask[:, None]
    return kernel_matrix(features.masked_fill(~mask[..., None], 0)).masked_fill(~pairs, 0)


def gaussian_filter(
    features: Tensor,  # (B, N, D), each column divided by its bandwidth
    values: Tensor,  # (B, N, C)
    mask: Tensor | None = None,  # (B, N) bool, True = takes part
    normalization: str = "none",
) -> Tensor:  # (B, N, C)
    """out_i = sum_j exp(-|f_i - f_j|² / 2) v_j, normalised, with the (N, N) kernel matrix stored in full."""
    kernel = kernel_matrix(features, mask)
    if mask is not None:
        values = values.masked_fill(~mask[..., None], 0)
    return normalized(lambda x: kernel @ x, values, kernel.sum(2, keepdim=True), normalization)


def values_gradient(
    features: Tensor,  # (B, N, D)
    grad: Tensor,  # (B, N, C), d loss / d out
) -> Tensor:  # (B, N, C)
    """Gradient of sum(grad * gaussian_filter(features, v)) with respect to v: K^T grad, and K is symmetric."""
    return gaussian_filter(features, grad)


def feature_gradient(
    features: Tensor,  # (B, N, D)
    values: Tensor,  # (B, N, C)
    grad: Tensor,  # (B, N, C), d loss / d out
) -> Tensor:  # (B, N, D)
    """Gradient of sum(grad * gaussian_filter(features, values)) with respect to the features, in closed form.

    dF_i = sum_j K_ij (g_i·v_j + v_i·g_j) (f_j - f_i): pixel i as receiver and as sender
    (the Gauss-transform gradient of Krähenbühl and Koltun, ICML 2013).
    """
    products = grad @ values.mT  # (B, N, N), g_i·v_j
    weights = kernel_matrix(features) * (products + products.mT)
    return weights @ features - weights.sum(2, keepdim=True) * features


def gaussian_filter_chunked(
    features: Tensor,  # (..., N, D)
    values: Tensor,  # (..., N, C)
    rows: Tensor | None = None,  # (R,) int64, the receivers wanted; None for all
    chunk_bytes: int = 2**26,
) -> Tensor:  # (..., R, C)
    """Rows of the unnormalised, unmasked definition by brute force, never holding more than a strip of the kernel.

    Differences are taken before they are squared, so float64 gives an oracle at any N: the cost is R * N exponentials.
    """
    N, D = features.shape[-2:]
    receivers = features if rows is None else features[..., rows, :]
    strip = max(1, chunk_bytes // (max(1, features[..., :1].numel()) * features.element_size()))
    out = []
    for part in receivers.split(strip, dim=-2):
        exponent = part.new_zeros(*part.shape[:-1], N)
        for d in range(D):
            exponent -= (part[..., :, None, d] - features[..., None, :, d]).square_()
        out.append(exponent.mul_(0.5).exp_() @ values)
    return torch.cat(out, dim=-2)
