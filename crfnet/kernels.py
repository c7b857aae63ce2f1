"""The pairwise kernels of the CRF: Gaussians over pixel position, guide channels, or both.

    k(i, j) = exp(-|p_i - p_j|² / (2 theta_position²) - |I_i - I_j|² / (2 theta_guide²))

The spatial (smoothness) kernel has positions only, the bilateral (appearance) kernel positions and the image.
Source: Krähenbühl and Koltun, arXiv:1210.5644, equation 3; Chen et al., arXiv:1412.7062, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from .features import pixel_features
from .ops import GaussianFilter, GridFilter
from .ops.gpu import host_may_read
from .ops.operator import Method, Precision
from .ops.reference import Normalization

Weights = Literal["scalar", "per_class", "full"]
WEIGHTS: tuple[str, ...] = get_args(Weights)


@dataclass(frozen=True)
class Kernel:
    """What a user says of one kernel.

    Args:
        name: how the kernel's parameters are called in the module's state dict.
        weight: its weight: a number, or a tensor ``(C,)`` or ``(C, C)`` matching the module's form of weights.
        theta_position: bandwidth in pixels, one number or one for each axis; None where position plays no part.
        theta_guide: bandwidth of the guide, in the guide's unit, one number or one for each of its channels; None for a
            kernel of positions only.
        guide: which guide: "image", or a name in the ``guides`` given to ``forward``.

    Raises:
        ValueError: neither bandwidth is given, or one is not positive.
    """

    name: str
    weight: float | Tensor
    theta_position: float | Sequence[float] | None = None
    theta_guide: float | Sequence[float] | None = None
    guide: str = "image"

    def __post_init__(self) -> None:
        """Check the name and the bandwidths."""
        if not self.name.isidentifier() or hasattr(nn.ModuleDict, self.name):
            raise ValueError(f"name of a kernel must be an identifier that no module has, got {self.name!r}")
        if self.theta_position is None and self.theta_guide is None:
            raise ValueError(f"kernel {self.name!r} needs theta_position, theta_guide or both, got neither")
        if self.theta_guide is None and self.guide != "image":
            raise ValueError(f"kernel {self.name!r} needs theta_guide to compare its guide {self.guide!r} by, got None")
        for what in ("theta_position", "theta_guide"):
            if getattr(self, what) is not None:
                check_theta(f"{what} of kernel {self.name!r}", getattr(self, what))


def check_theta(name: str, theta: float | Sequence[float]) -> None:
    """Raise ValueError unless a bandwidth, or each of several, is a positive number that float32 can hold."""
    several = list(theta) if isinstance(theta, Sequence) and not isinstance(theta, str) else [theta]
    numbers = several and all(isinstance(number, (int, float)) for number in several)
    limits = torch.finfo(torch.float32)
    if not numbers or not all(limits.tiny <= number <= limits.max for number in several):
        raise ValueError(f"{name} must be positive and finite in float32, got {theta!r}")


class PairwiseKernel(nn.Module):
    """One kernel of a :class:`crfnet.DenseCRF`: its bandwidths and weight, learnable or fixed, and its filter.

    Bandwidths, and weights that are scalar or per class, are stored as logarithms, so they stay positive whatever the
    optimiser does; a ``(C, C)`` weight matrix is stored as it is and may take any sign, as in CRF-RNN.
    """

    weight: Tensor
    log_weight: Tensor
    log_theta_position: Tensor | None
    log_theta_guide: Tensor | None

    def __init__(
        self, spec: Kernel, num_classes: int, form: Weights, *, learn_weight: bool, learn_bandwidths: bool
    ) -> None:
        super().__init__()
        self.name, self.form, self.learns_weight = spec.name, form, learn_weight
        self.guide = spec.guide if spec.theta_guide is not None else None
        weight = torch.as_tensor(spec.weight, dtype=torch.float32).detach().clone()
        shape = {"scalar": (), "per_class": (num_classes,), "full": (num_classes, num_classes)}[form]
        if weight.ndim == 0:
            weight = weight * torch.eye(num_classes) if form == "full" else weight.expand(shape).clone()
        if weight.shape != shape or not holds(weight.isfinite()):
            got = tuple(weight.shape) if weight.shape != shape else spec.weight
            raise ValueError(
                f"weight of kernel {spec.name!r} must be a finite number or {shape} for {form!r} weights, got {got}"
            )
        if form != "full":
            if not holds(weight > 0 if learn_weight else weight >= 0):
                kind = "positive to be learnable" if learn_weight else "0 or more"
                raise ValueError(f"weight of kernel {spec.name!r} must be {kind}, got {weight.tolist()}")
            weight = weight.log()
        store(self, "weight" if form == "full" else "log_weight", weight, learn_weight)
        for what, theta in (("position", spec.theta_position), ("guide", spec.theta_guide)):
            value = None if theta is None else torch.as_tensor(theta, dtype=torch.float32).log()
            store(self, f"log_theta_{what}", value, learn_bandwidths)

    @property
    def theta_position(self) -> Tensor | None:
        """Bandwidth in pixels, 0-d; None where position plays no part."""
        return None if self.log_theta_position is None else positive(self.log_theta_position)

    @property
    def theta_guide(self) -> Tensor | None:
        """Bandwidth of the guide, 0-d or one a channel; None for a kernel of positions only."""
        return None if self.log_theta_guide is None else positive(self.log_theta_guide)

    def weights(self) -> Tensor:
        """The weight as a scalar, ``(C,)`` or ``(C, C)``."""
        return self.weight if self.form == "full" else positive(self.log_weight)

    def silent(self) -> bool:
        """Whether the kernel has weight 0 and no way to change it, so that nobody need filter with it."""
        weights = self.weights()
        return not self.learns_weight and host_may_read(weights) and not bool(weights.any())

    def filter(
        self,
        shape: Sequence[int],  # of the pixel grid
        guide: Tensor | None,  # (B, G, *shape), in units of theta_guide
        mask: Tensor | None,  # (B, N)
        *,
        like: Tensor,  # (B, N, C), of the dtype and on the device to filter in
        engine: Method,
        normalization: Normalization,
        remove_self: bool,
        precision: Precision,
    ) -> GaussianFilter | GridFilter:
        """Build the filter, ``(B, N, C)`` to ``(B, N, C)``, that passes this kernel's messages."""
        width = self.theta_position
        if width is not None and width.ndim == 1 and len(width) not in (1, len(shape)):
            raise ValueError(
                f"theta_position of kernel {self.name!r} must be one number or {len(shape)}, one for each axis, "
                f"got {len(width)}"
            )
        if guide is None:
            assert self.theta_position is not None
            return GridFilter(
                shape, self.theta_position, normalization=normalization, mask=mask, remove_self=remove_self
            )
        theta = cast(Tensor, self.theta_guide)
        if theta.ndim == 1 and len(theta) != guide.shape[1]:
            raise ValueError(
                f"{self.guide} must have {len(theta)} channels, one for each theta_guide of kernel {self.name!r} "
                f"(theta_beta of the bilateral kernel), got {guide.shape[1]}"
            )
        features = pixel_features(guide.to(like), None if width is None else width.to(like), theta.to(like))
        return GaussianFilter(
            features,
            method=engine,
            normalization=normalization,
            mask=mask,
            remove_self=remove_self,
            precision=precision,
        )


def holds(conditions: Tensor) -> bool:
    """Whether all of them are true; they pass on the meta device, where nothing is known."""
    return conditions.is_meta or bool(conditions.all())


def positive(logarithm: Tensor) -> Tensor:
    """exp, held where float32 can still hold it and its square: an optimiser may run away, a parameter not vanish.

    A fixed weight of 0 has the logarithm -inf and stays 0.
    """
    return torch.where(logarithm.isneginf(), logarithm, logarithm.clamp(-40.0, 40.0)).exp()


def store(module: nn.Module, name: str, value: Tensor | None, learn: bool) -> None:
    """As a parameter where it is learnt, as a buffer (saved and moved all the same) where it is fixed."""
    if learn and value is not None:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)
