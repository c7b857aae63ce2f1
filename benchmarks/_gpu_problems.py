"""What benchmarks/gpu.py runs: pictures with unaries, the engines alone, and the CRF in inference and in training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _measure import bilateral_features, image_tensor, procedural_scene, voc_scene
from torch import Tensor
from torch.nn import functional as F

import crfnet
from crfnet.meanfield import Term, mean_field
from crfnet.ops import GaussianFilter, GridFilter
from crfnet.ops.operator import Method, Precision

PRECISIONS: tuple[Precision, ...] = ("tf32", "fp16", "float32")
THETA = (160.0, 3.0, 3.0)  # alpha, beta, gamma: CRF-RNN's


@dataclass
class Problem:
    """One picture with unaries, on a device."""

    image: Tensor  # (1, 3, H, W)
    logits: Tensor  # (1, C, H, W)
    labels: Tensor  # (1, H, W)
    features: Tensor  # (N, 5)
    name: str

    @property
    def unary(self) -> Tensor:  # (1, N, C)
        """Logits, a row a pixel."""
        return self.logits.flatten(2).mT.contiguous()


def problem(size: tuple[int, int], classes: int, device: torch.device) -> Problem:
    """A photograph where there is one of that size, else the procedural scene; coarse, noisy logits for its labels."""
    width, height = size
    photograph = voc_scene("voc_2007_000346") if size == (500, 375) else None
    image, labels = photograph or procedural_scene(height, width)
    known = torch.from_numpy(np.where(labels < classes, labels, 0).astype(np.int64))
    small = 4.0 * F.one_hot(known[::8, ::8], classes).permute(2, 0, 1)[None].float()
    small += torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(small.to(device), labels.shape, mode="bilinear", align_corners=False)
    features = bilateral_features(image, *THETA[:2]).to(device)
    name = f"{width}x{height}x{classes} " + ("voc_2007_000346" if photograph else "procedural")
    return Problem(image_tensor(image).to(device), logits, known[None].to(device), features, name)


def draw(N: int, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Marginals and a gradient, ``(N, C)`` each, the same on every run."""
    generator = torch.Generator().manual_seed(2)
    v = (3 * torch.randn(N, C, generator=generator)).softmax(1)
    return v.to(device), torch.randn(N, C, generator=generator).to(device)


def exact_engine(features: Tensor, tolerance: float, precision: Precision) -> Any:
    """The exact engine alone."""
    from crfnet.ops.gpu.exact import TritonExactEngine

    return TritonExactEngine(features, [len(features)], tolerance, precision)


def lattice_engine(features: Tensor) -> Any:
    """The lattice alone."""
    from crfnet.ops.gpu.lattice import TritonLatticeEngine

    return TritonLatticeEngine(features, [len(features)])


def inference(p: Problem, engine: Method, iterations: int) -> Callable[[], Tensor]:
    """DeepLab's CRF from logits to logits of the marginals, its filters built anew."""
    crf = crfnet.DenseCRF(
        p.logits.shape[1],
        weights="scalar",
        compatibility="potts",
        engine=engine,
        num_iterations_eval=iterations,
        label_tolerance=0.0,
    )
    crf = crf.to(p.logits.device).eval()

    def infer() -> Tensor:
        with torch.no_grad():
            out: Tensor = crf(p.logits, p.image)
        return out

    return infer


def training(p: Problem, engine: Method, iterations: int, *, guide: bool = False) -> Callable[[], object]:
    """CRF-RNN's CRF, forward and backward to logits, weights and compatibility; with ``guide`` to all there is."""
    learn = ("weights", "compatibility", "bandwidths")[: 3 if guide else 2]
    crf = crfnet.DenseCRF(p.logits.shape[1], engine=engine, num_iterations=iterations, learn=learn)
    crf = crf.to(p.logits.device).train()
    logits, image = p.logits.clone().requires_grad_(), p.image.clone().requires_grad_(guide)
    labels = p.labels.clamp(max=logits.shape[1] - 1)
    wanted = [logits, *crf.parameters(), *([image] if guide else [])]
    return lambda: torch.autograd.grad(F.cross_entropy(crf(logits, image), labels), wanted)


def exact_inference(p: Problem, tolerance: float, precision: Precision, iterations: int) -> Callable[[], Tensor]:
    """The same inference as `inference` with the exact engine of any tolerance, build included."""
    H, W = p.image.shape[2:]
    theta = torch.tensor(THETA[2], dtype=torch.float64, device=p.features.device)
    strengths = [p.features.new_full((p.logits.shape[1],), weight) for weight in (3.0, 5.0)]
    unary = p.unary

    def infer() -> Tensor:
        bilateral = GaussianFilter(
            p.features[None],
            method="exact",
            normalization="after",
            tolerance=tolerance,
            precision=precision,
        )
        terms = [Term(GridFilter((H, W), theta, normalization="after"), strengths[0]), Term(bilateral, strengths[1])]
        with torch.no_grad():
            return mean_field(unary, terms, iterations)

    return infer


def brute_force(features: Tensor, values: Tensor, rows: int, precision: str) -> Tensor:
    """The first ``rows`` outputs as PyTorch alone computes them: 256 whole rows of the kernel matrix at a time."""
    features = features - features.mean(0)
    half = 0.5 * features.square().sum(1)
    out = []
    for own, receivers in zip(half[:rows].split(256), features[:rows].split(256), strict=True):
        torch.set_float32_matmul_precision("highest")  # distances
        strip = torch.addmm(-half, receivers, features.T).sub_(own[:, None]).exp_()
        torch.set_float32_matmul_precision(precision)
        out.append(strip @ values)
    torch.set_float32_matmul_precision("highest")
    return torch.cat(out)
