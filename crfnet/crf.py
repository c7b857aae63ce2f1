"""The fully connected CRF as a layer: parameters, input checks, and mean-field inference over the engines.

E(x) = sum_i u_i(x_i) + sum_{i<j} mu(x_i, x_j) sum_k w_k k_k(i, j),    u = -logits
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from .inference import infer
from .inputs import Inputs, among, check_inputs, kind, whole_number
from .kernels import WEIGHTS, Kernel, PairwiseKernel, Weights, check_theta, holds, positive, store
from .meanfield import Term, factors, mean_field, update
from .ops.gpu import host_may_read, serves
from .ops.operator import METHODS, PRECISIONS, Method, Precision
from .ops.reference import NORMALIZATIONS, Normalization

Compatibility = Literal["potts", "per_class", "full"]
COMPATIBILITIES: tuple[str, ...] = get_args(Compatibility)
LEARNABLE = ("weights", "compatibility", "bandwidths")


class Diagnostics(NamedTuple):
    """What inference did, iteration by iteration; index 0 is the unary alone."""

    free_energy: Tensor  # (T + 1, B) float64, the KL divergence to the CRF's distribution up to a constant
    change: Tensor  # (T, B), largest change of any marginal in each iteration


class DenseCRF(nn.Module):
    """Mean-field inference in a CRF that joins every pair of pixels, differentiable in all that it is made of.

    The defaults are CRF-RNN's: spatial and bilateral kernel with ``(C, C)`` weights that start diagonal at 3 and 5, a
    full compatibility matrix that starts as Potts, fixed bandwidths 160 / 3 / 3, 5 iterations in training and 10 in
    evaluation. DeepLab's model is ``weights="scalar", compatibility="potts"``.

    Args:
        num_classes: number of labels ``C``, background included.
        theta_alpha: bilateral bandwidth in pixels.
        theta_beta: bilateral bandwidth in intensity levels of an image in 0..255.
        theta_gamma: spatial bandwidth in pixels.
        spatial_weight: weight of the spatial kernel: a number, or ``(C,)`` or ``(C, C)`` to match ``weights``.
        bilateral_weight: weight of the bilateral kernel, likewise. A fixed weight of 0 leaves the kernel out.
        weights: "scalar" one a kernel, "per_class", or "full" ``(C, C)`` matrices. The first two stay positive.
        compatibility: "potts" mu(a, b) = [a != b], fixed; "per_class" c_b [a != b] with c positive; "full", any
            ``(C, C)`` matrix; or a tensor ``(C,)`` or ``(C, C)`` to start one of the last two from.
        learn: which of "weights", "compatibility", "bandwidths" are parameters; the others are buffers.
        kernels: further kernels over the image or over guides of your own, see :class:`crfnet.Kernel`.
        num_iterations: mean-field updates in training mode.
        num_iterations_eval: mean-field updates in evaluation mode.
        damping: in [0, 1), how much of the previous logits each update keeps.
        normalization: of every kernel: "after" (DeepLab, CRF-RNN), "symmetric" (pydensecrf), "before" or "none".
        remove_self: leave out j = i, as the papers' equations do; no known implementation does.
        image_range: the values that stand for black and white; the image is scaled to 0..255 by it, which is what
            ``theta_beta`` counts in. None takes any guide as it is, with ``theta_beta`` in the guide's own unit.
        engine: "exact", "lattice" or "auto", for the kernels that have a guide; see :class:`crfnet.ops.GaussianFilter`.
            The spatial kernel is always exact, one separable pass an axis.
        precision: "float32", "tf32" or "fp16", of the exact engine's products on a GPU; likewise.
        checkpoint: in training, recompute each iteration in backward instead of storing its messages.
        label_tolerance: on a CPU, where no gradients are wanted and couplings are Potts or per class, labels whose
            messages together change no marginal by this much in an iteration are taken as one, which saves most of the
            time when few of many classes occur. Results differ by far less, except at pixels on the very brink between
            two labels. 0 keeps every label for itself.

    Shape:
        logits ``(B, C, *S)`` with 1 to 3 axes S, image ``(B, G, *S)`` with any number of channels G, mask ``(B, *S)``
        bool → logits of the marginals ``(B, C, *S)``, in the dtype of ``logits``: their softmax over dim 1 is q. What
        all labels of a pixel share is arbitrary.

    Gradients reach the logits, the image and the other guides, and every parameter.

    Raises:
        ValueError, TypeError: the arguments say what they must be and what they were.

    Sources: Krähenbühl and Koltun, arXiv:1210.5644, Algorithm 1; Zheng et al., arXiv:1502.03240, section 4;
    Chen et al., arXiv:1412.7062, equations 2 and 3.
    """

    log_compatibility: Tensor
    compatibility_matrix: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        theta_alpha: float = 160.0,
        theta_beta: float | Sequence[float] = 3.0,
        theta_gamma: float = 3.0,
        spatial_weight: float | Tensor = 3.0,
        bilateral_weight: float | Tensor = 5.0,
        weights: Weights = "full",
        compatibility: Compatibility | Tensor = "full",
        learn: Collection[str] = ("weights", "compatibility"),
        kernels: Sequence[Kernel] = (),
        num_iterations: int = 5,
        num_iterations_eval: int = 10,
        damping: float = 0.0,
        normalization: Normalization = "after",
        remove_self: bool = False,
        image_range: tuple[float, float] | None = (0.0, 255.0),
        engine: Method = "auto",
        precision: Precision = "tf32",
        checkpoint: bool = False,
        label_tolerance: float = 1e-2,
    ) -> None:
        super().__init__()
        among("weights", weights, WEIGHTS)
        among("normalization", normalization, NORMALIZATIONS)
        among("engine", engine, METHODS)
        among("precision", precision, PRECISIONS)
        for name in [learn] if isinstance(learn, str) else learn:
            among("learn", name, LEARNABLE)
        whole_number("num_iterations", num_iterations, 0)
        whole_number("num_iterations_eval", num_iterations_eval, 0)
        whole_number("num_classes", num_classes, 1)
        if not 0.0 <= damping < 1.0:
            raise ValueError(f"damping must lie in [0, 1), got {damping}")
        if not 0.0 <= label_tolerance < 1.0:
            raise ValueError(f"label_tolerance must lie in [0, 1), got {label_tolerance}")
        if image_range is not None:
            black, white = image_range if len(image_range) == 2 else (0.0, 0.0)
            if not (black < white and math.isfinite(white - black)):
                raise ValueError(f"image_range must be (black, white) with black < white, or None, got {image_range}")
        self.num_classes = num_classes
        self.num_iterations, self.num_iterations_eval = int(num_iterations), int(num_iterations_eval)
        self.damping, self.normalization, self.remove_self = damping, normalization, remove_self
        self.image_range, self.engine, self.precision = image_range, engine, precision
        self.checkpoint, self.label_tolerance = checkpoint, label_tolerance
        for name, theta in (("theta_alpha", theta_alpha), ("theta_beta", theta_beta), ("theta_gamma", theta_gamma)):
            check_theta(name, theta)
        spatial = Kernel("spatial", spatial_weight, theta_position=theta_gamma)
        bilateral = Kernel("bilateral", bilateral_weight, theta_position=theta_alpha, theta_guide=theta_beta)
        specs = [spatial, bilateral, *kernels]
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError(f"kernels must have names of their own, got {[spec.name for spec in specs]}")
        self.kernels = nn.ModuleDict()
        for spec in specs:
            self.kernels[spec.name] = PairwiseKernel(
                spec, num_classes, weights, learn_weight="weights" in learn, learn_bandwidths="bandwidths" in learn
            )
        self._set_compatibility(compatibility, "compatibility" in learn)

    def _set_compatibility(self, given: Compatibility | Tensor, learn: bool) -> None:
        C = self.num_classes
        if isinstance(given, Tensor):
            if given.shape not in ((C,), (C, C)):
                raise ValueError(f"compatibility must be ({C},) or ({C}, {C}), got {tuple(given.shape)}")
            if not holds(given.isfinite()):
                raise ValueError(f"compatibility must be finite, got {given.tolist()}")
            start = given.detach().float().clone()
            self.compatibility_form: Compatibility = "per_class" if given.ndim == 1 else "full"
        else:
            among("compatibility", given, COMPATIBILITIES)
            start = torch.ones(C) if given == "per_class" else 1.0 - torch.eye(C)
            self.compatibility_form = given
        if self.compatibility_form == "per_class":
            if not holds(start > 0):
                raise ValueError(f"a compatibility per class must be positive, got {start.tolist()}")
            start = start.log()
        if self.compatibility_form != "potts":
            name = "log_compatibility" if self.compatibility_form == "per_class" else "compatibility_matrix"
            store(self, name, start, learn)

    @property
    def compatibility(self) -> Tensor:
        """Mu ``(C, C)``: what label a pays for hearing label b."""
        if self.compatibility_form == "full":
            return self.compatibility_matrix
        return self._strength() * (1.0 - torch.eye(self.num_classes, device=self._strength().device))

    def _strength(self) -> Tensor:
        """``(C,)``, where a matrix is not needed: what hearing one's own label is worth, -mu up to what all share."""
        if self.compatibility_form == "per_class":
            return positive(self.log_compatibility)
        spatial = cast(PairwiseKernel, self.kernels["spatial"])
        return spatial.weights().detach().new_ones(self.num_classes)

    def forward(
        self, logits: Tensor, image: Tensor, mask: Tensor | None = None, guides: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits of the marginals, ``(B, C, *S)``.

        Args:
            logits: ``(B, C, *S)`` floating point, finite where the mask is True; larger is likelier.
            image: ``(B, G, *S)``, values within ``image_range``.
            mask: ``(B, *S)`` bool, True where a pixel takes part. The others (padding, no data) neither send nor
                receive messages and keep their logits.
            guides: by name, ``(B, G, *S)`` each: what the further kernels compare pixels by.
        """
        inputs = check_inputs(self.num_classes, logits, image, mask, guides or {}, self.image_range)
        with torch.autocast(logits.device.type, enabled=False):
            out = self._infer(inputs).mT.reshape(logits.shape)
        if out.dtype != logits.dtype:  # what all labels share says nothing, but may be more than a half can hold
            out = (out - out.amax(1, keepdim=True)).clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)
        return out if mask is None else torch.where(mask.unsqueeze(1), out, logits)

    def _infer(self, inputs: Inputs) -> Tensor:
        terms = self._terms(inputs)
        count = self.num_iterations if self.training else self.num_iterations_eval
        thetas = [theta for _, kernel in self._kernels() for theta in (kernel.theta_position, kernel.theta_guide)]
        sources = [inputs.logits, *inputs.guides.values(), *(term.coupling for term in terms), *thetas]
        gradients = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in sources)
        eager_on_cpu = host_may_read(inputs.logits) and not inputs.logits.is_cuda and not serves(inputs.logits)
        if self.normalization == "after" and self.damping == 0.0 and not gradients and eager_on_cpu:
            row = math.prod(inputs.shape[1:])
            return infer(inputs.logits, terms, count, row=row, label_tolerance=self.label_tolerance)
        return mean_field(inputs.logits, terms, count, damping=self.damping, recompute=self.checkpoint and gradients)

    def _terms(self, inputs: Inputs) -> list[Term]:
        """The filters of the kernels that have a weight, for these inputs, each with its coupling."""
        known = {kernel.guide for kernel in self.kernels.values() if isinstance(kernel, PairwiseKernel)}
        if unknown := sorted(set(inputs.guides) - known - {"image"}):
            raise ValueError(f"guides must be those that kernels compare pixels by, got {unknown} that none has")
        terms = []
        for name, kernel in self._kernels():
            if kernel.guide is not None and kernel.guide not in inputs.guides:
                raise ValueError(f"guides must have {kernel.guide!r} for kernel {name!r}, got {sorted(inputs.guides)}")
            message_filter = kernel.filter(
                inputs.shape,
                None if kernel.guide is None else inputs.guides[kernel.guide],
                inputs.mask,
                like=inputs.logits,
                engine=self.engine,
                normalization=self.normalization,
                remove_self=self.remove_self,
                precision=self.precision,
            )
            terms.append(Term(message_filter, self._coupling(kernel).to(inputs.logits)))
        return terms

    def _coupling(self, kernel: PairwiseKernel) -> Tensor:
        """``(C,)`` strengths where no matrix is needed, else mu W ``(C, C)``."""
        if self.compatibility_form == "full" or kernel.form == "full":
            return self._coupling_matrix(kernel)
        return kernel.weights() * self._strength()

    def _coupling_matrix(self, kernel: PairwiseKernel) -> Tensor:  # (C, C)
        weights = kernel.weights()
        return self.compatibility @ weights if kernel.form == "full" else self.compatibility * weights

    def _kernels(self) -> list[tuple[str, PairwiseKernel]]:
        """The kernels by name, without those of fixed weight 0."""
        kernels = [(name, kernel) for name, kernel in self.kernels.items() if isinstance(kernel, PairwiseKernel)]
        return [(name, kernel) for name, kernel in kernels if not kernel.silent()]

    def energy(
        self,
        labels: Tensor,
        logits: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        guides: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Energy E(x) of a labelling, ``(B,)``: its unaries, and for every pair of pixels once the pairwise cost.

        As in inference a pixel counts as half a pair with itself, unless ``remove_self``; for Potts and per-class
        compatibility that costs nothing.

        Args:
            labels: ``(B, *S)`` integers in 0..C - 1.
            logits: as for ``forward``, and so ``image``, ``mask`` and ``guides``.

        Raises:
            ValueError: ``labels`` has another shape or a value out of range.
        """
        inputs = check_inputs(self.num_classes, logits, image, mask, guides or {}, self.image_range)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers {(len(logits), *inputs.shape)}, got {kind(labels)}")
        if labels.shape != (len(logits), *inputs.shape):
            raise ValueError(f"labels must be integers {(len(logits), *inputs.shape)}, got {tuple(labels.shape)}")
        flat = labels.flatten(1).long()
        if inputs.mask is not None:
            flat = flat.masked_fill(~inputs.mask, 0)
        if int(flat.min()) < 0 or int(flat.max()) >= self.num_classes:
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {int(flat.min())}..{int(flat.max())}")
        q = nn.functional.one_hot(flat, self.num_classes).to(inputs.logits)
        with torch.autocast(logits.device.type, enabled=False):
            return self._expected_energy(inputs, q, self._terms(inputs))

    @torch.no_grad()
    def diagnose(
        self,
        logits: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        guides: Mapping[str, Tensor] | None = None,
        num_iterations: int | None = None,
    ) -> Diagnostics:
        """Free energy and largest change of a marginal, iteration by iteration; arguments as for ``forward``.

        With a symmetric, positive kernel ("symmetric" or no normalisation, exact engine) and Potts the free energy
        never rises (Krähenbühl and Koltun, ICML 2013). "after" is not symmetric: nothing promises it there.
        """
        inputs = check_inputs(self.num_classes, logits, image, mask, guides or {}, self.image_range)
        count = self.num_iterations_eval if num_iterations is None else num_iterations
        whole_number("num_iterations", count, 0)
        with torch.autocast(logits.device.type, enabled=False):
            terms = self._terms(inputs)
            normalizers = factors(inputs.logits, terms)
            energy, q = inputs.logits, inputs.logits.softmax(2)
            values, changes = [self._free_energy(inputs, energy, terms)], [energy.new_zeros(len(energy))]
            for _ in range(count):
                energy = torch.lerp(update(inputs.logits, q, terms, normalizers), energy, self.damping)
                previous, q = q, energy.softmax(2)
                values.append(self._free_energy(inputs, energy, terms))
                changes.append((q - previous).abs().amax((1, 2)))
        return Diagnostics(torch.stack(values), torch.stack(changes)[1:])

    def _free_energy(self, inputs: Inputs, energy: Tensor, terms: Sequence[Term]) -> Tensor:
        """``(B,)`` float64: expected energy minus entropy, for the marginals softmax(energy)."""
        q = energy.softmax(2)
        negative_entropy = q * energy.log_softmax(2)
        if inputs.mask is not None:
            negative_entropy = negative_entropy * inputs.mask[..., None]
        return negative_entropy.sum((1, 2), dtype=torch.float64) + self._expected_energy(inputs, q, terms)

    def _expected_energy(self, inputs: Inputs, q: Tensor, terms: Sequence[Term]) -> Tensor:
        """``(B,)`` float64: -sum_i q_i logits_i + 1/2 sum_k q_i mu W_k m_k,i over the pixels that take part."""
        if inputs.mask is not None:
            q = q * inputs.mask[..., None]
        total = -(q * inputs.logits).sum((1, 2), dtype=torch.float64)
        for (_, kernel), term in zip(self._kernels(), terms, strict=True):
            matrix = self._coupling_matrix(kernel).to(q)
            total = total + 0.5 * (q * (term.filter(q) @ matrix.mT)).sum((1, 2), dtype=torch.float64)
        return total

    def extra_repr(self) -> str:
        """What the parameters do not show."""
        return (
            f"{self.num_classes}, compatibility={self.compatibility_form!r}, normalization={self.normalization!r}, "
            f"engine={self.engine!r}, num_iterations={self.num_iterations}/{self.num_iterations_eval}"
        )


def dense_crf(
    image: Tensor,
    logits: Tensor,
    *,
    theta_alpha: float = 160.0,
    theta_beta: float | Sequence[float] = 3.0,
    theta_gamma: float = 3.0,
    spatial_weight: float = 3.0,
    bilateral_weight: float = 5.0,
    num_iterations: int = 10,
    normalization: Normalization = "after",
    mask: Tensor | None = None,
    image_range: tuple[float, float] | None = (0.0, 255.0),
    engine: Method = "auto",
    precision: Precision = "tf32",
    compatibility: Compatibility | Tensor = "potts",
    label_tolerance: float = 1e-2,
) -> Tensor:
    """Mean-field inference without a module, for post-processing: logits in, logits of the marginals out.

    Args:
        image: ``(B, G, *S)``, values within ``image_range``.
        logits: ``(B, C, *S)``; from probabilities by :func:`crfnet.logits_from_probabilities`, from a label map by
            :func:`crfnet.logits_from_labels`.
        num_iterations: mean-field updates.
        mask: ``(B, *S)`` bool, True where a pixel takes part.
        theta_alpha, theta_beta, theta_gamma, spatial_weight, bilateral_weight, normalization, image_range, engine,
            precision, compatibility, label_tolerance: as for :class:`DenseCRF`.

    Returns:
        ``(B, C, *S)``: ``.softmax(1)`` are the marginals, ``.argmax(1)`` the labels.

    Raises:
        ValueError, TypeError: the arguments say what they must be and what they were.

    Source: Krähenbühl and Koltun, arXiv:1210.5644, Algorithm 1.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 3:
        raise ValueError(f"logits must be (B, C, H, W), got {getattr(logits, 'shape', type(logits).__name__)}")
    crf = DenseCRF(
        logits.shape[1],
        theta_alpha=theta_alpha,
        theta_beta=theta_beta,
        theta_gamma=theta_gamma,
        spatial_weight=spatial_weight,
        bilateral_weight=bilateral_weight,
        weights="scalar",
        compatibility=compatibility,
        learn=(),
        num_iterations=num_iterations,
        num_iterations_eval=num_iterations,
        normalization=normalization,
        image_range=image_range,
        engine=engine,
        precision=precision,
        label_tolerance=label_tolerance,
    )
    out: Tensor = crf.to(logits.device).eval()(logits, image, mask)
    return out
