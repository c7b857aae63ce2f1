"""DeepLab's coarse-to-fine search for the parameters of a dense CRF on held-out images.

Every combination of a coarse grid is tried, then the neighbours of the best one, with steps half as large each round
(arXiv:1412.7062 section 5, arXiv:1606.00915 section 4.1.1). Weights and bandwidths are scales, so steps are ratios: a
grid 30, 60, 120 goes on with the factor 2^(1/2) around its best value, then 2^(1/4). The score of a trial is the mean
IoU of one confusion matrix over all images. "No CRF" is the first trial: the best never scores less than the DCNN.

The structure of the bilateral filter depends on the bandwidths alone. It is built once per image and pair of bandwidths
and filters the marginals of all weights together, as further channels:

    q_r = softmax(x_r),   x_r <- logits + w1_r K_bilateral q_r + w2_r K_spatial q_r,   r = 1 .. number of weights

(kernels normalised "after", Potts compatibility up to a constant over labels, as in Kraehenbuehl and Koltun's library).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crfnet.features import pixel_features
from crfnet.metrics import ConfusionMatrix
from crfnet.ops import GaussianFilter, GridFilter
from crfnet.ops.operator import Method

MAX_CHANNELS = 128  # marginals filtered together: bounds memory at 128 floats a pixel per temporary

NEGLIGIBLE = 1e-4  # probability below which, together and in every pixel, labels are left out


@dataclass(frozen=True)
class Parameters:
    """Parameters of a dense CRF, named as in `crfnet.DenseCRF`; ``DenseCRF(L, **asdict(parameters))`` takes them."""

    bilateral_weight: float
    theta_alpha: float
    theta_beta: float
    spatial_weight: float
    theta_gamma: float


@dataclass(frozen=True)
class Trial:
    """One row of the table: parameters, mean IoU on the held-out images (0..1), and the round that tried them."""

    parameters: Parameters
    mean_iou: float
    round: int


@dataclass(frozen=True)
class Search:
    """What a search found: the best trial, and all of them in the order they were tried (the first is "no CRF")."""

    best: Trial
    table: list[Trial]

    @property
    def without_crf(self) -> Trial:
        """The trial with both weights zero: the score of the DCNN alone."""
        return self.table[0]

    @property
    def best_crf(self) -> Trial:
        """The best trial that has a CRF, better than none or not."""
        return max(self.table[1:], key=lambda trial: trial.mean_iou)


def search(
    images: Sequence[Tensor],
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    bilateral_weight: Sequence[float] = (3.0, 5.0, 8.0),
    theta_alpha: Sequence[float] = (30.0, 55.0, 100.0),
    theta_beta: Sequence[float] = (3.0, 6.0, 12.0),
    spatial_weight: Sequence[float] = (3.0,),
    theta_gamma: Sequence[float] = (1.0,),
    rounds: int = 1,
    num_iterations: int = 10,
    ignore_index: int = 255,
    method: Method = "auto",
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Search:
    """Searches the CRF parameters with the highest mean IoU on the given images.

    An axis of one value stays fixed, as DeepLab does with ``spatial_weight`` and ``theta_gamma``. The default ranges
    are DeepLab's, for images of about 500 pixels; scale ``theta_alpha`` with the size of others.

    Args:
        images: n guides (G, H_n, W_n), 0..255.
        logits: the DCNN's scores for them, (L, H_n, W_n).
        labels: (H_n, W_n) integer, 0..L-1 or ``ignore_index``.
        bilateral_weight: coarse grid of w1, positive.
        theta_alpha: coarse grid, pixels.
        theta_beta: coarse grid, intensity levels.
        spatial_weight: coarse grid of w2, positive.
        theta_gamma: coarse grid, pixels.
        rounds: of refinement around the best trial after the coarse grid.
        num_iterations: of mean field.
        ignore_index: label of the pixels that do not count.
        method: engine of the bilateral filter, see `crfnet.ops.GaussianFilter`.
        progress: wraps the list of bandwidths of each round, ``tqdm`` for example.

    Raises:
        ValueError: no images, sizes that do not belong together, an empty or non-positive grid.
    """
    axes = [
        tuple(map(float, axis)) for axis in (bilateral_weight, theta_alpha, theta_beta, spatial_weight, theta_gamma)
    ]
    _check(images, logits, labels, axes)
    if rounds < 0 or num_iterations < 1:
        raise ValueError(f"rounds must be >= 0 and num_iterations >= 1, got {rounds} and {num_iterations}")

    num_classes = logits[0].shape[0]
    plain = ConfusionMatrix(num_classes, ignore_index=ignore_index)
    for scores, truth in zip(logits, labels, strict=True):
        plain.add(scores.argmax(0), truth)
    start = Parameters(*(axis[0] for axis in axes))
    table = [Trial(replace(start, bilateral_weight=0.0, spatial_weight=0.0), plain.mean_iou, 0)]
    tried: set[Parameters] = set()
    # the coarse steps as ratios; an axis of one value has none
    ratios = [(max(axis) / min(axis)) ** (1 / (len(axis) - 1)) if len(axis) > 1 else 1.0 for axis in axes]

    for number in range(rounds + 1):
        wanted = [point for point in map(_rounded, itertools.product(*axes)) if point not in tried]
        tried.update(wanted)
        groups: dict[tuple[float, ...], list[Parameters]] = {}
        for point in dict.fromkeys(wanted):
            groups.setdefault((point.theta_alpha, point.theta_beta, point.theta_gamma), []).append(point)
        for points in progress(list(groups.values())):
            matrices = [ConfusionMatrix(num_classes, ignore_index=ignore_index) for _ in points]
            for image, scores, truth in zip(images, logits, labels, strict=True):
                for matrix, called in zip(
                    matrices, _refine(image, scores, points, num_iterations, method), strict=True
                ):
                    matrix.add(called, truth)
            table += [Trial(p, m.mean_iou, number) for p, m in zip(points, matrices, strict=True)]
        centre = max(table[1:], key=lambda trial: trial.mean_iou).parameters
        steps = [ratio ** (0.5 ** (number + 1)) for ratio in ratios]
        axes = [
            (value,) if step == 1 else (value / step, value, value * step)
            for value, step in zip(astuple(centre), steps, strict=True)
        ]
    return Search(max(table, key=lambda trial: trial.mean_iou), table)  # the first of equals: no CRF before any


@torch.no_grad()
def _refine(
    image: Tensor, logits: Tensor, points: list[Parameters], num_iterations: int, method: Method
) -> list[Tensor]:
    """Labels (H, W) of one image for each point; all points share their three bandwidths."""
    L, H, W = logits.shape
    theta_alpha, theta_beta, theta_gamma = points[0].theta_alpha, points[0].theta_beta, points[0].theta_gamma
    features = pixel_features(image[None].float(), theta_alpha, theta_beta)
    bilateral = GaussianFilter(features, method=method, normalization="after")
    spatial = GridFilter((H, W), theta_gamma, normalization="after")

    unary = logits.flatten(1).mT.float()  # (N, L)
    alive = _alive(unary.softmax(1))
    unary = unary[:, None, alive]  # (N, 1, A)
    called: list[Tensor] = []
    batch = max(1, MAX_CHANNELS // len(alive))
    for first in range(0, len(points), batch):
        part = points[first : first + batch]
        w1, w2 = (
            torch.tensor([getattr(point, name) for point in part], device=unary.device)[:, None]  # (R, 1)
            for name in ("bilateral_weight", "spatial_weight")
        )
        x = unary.expand(-1, len(part), -1)  # (N, R, A)
        for _ in range(num_iterations):
            q = x.softmax(2).view(1, H * W, -1)
            x = unary + w1 * bilateral(q).view(x.shape) + w2 * spatial(q).view(x.shape)
        called += list(alive[x.argmax(2)].mT.reshape(-1, H, W))
    return called


def _alive(q: Tensor) -> Tensor:
    """Indices, ascending, of the labels of q (N, L) that take part.

    Labels that together hold less than ``NEGLIGIBLE`` of every pixel change no message by more than that.
    """
    order = q.amax(0).argsort()  # rarest first
    dropped = q[:, order].cumsum(1).amax(0) < NEGLIGIBLE
    return order[~dropped].sort().values


def _rounded(values: tuple[float, ...]) -> Parameters:
    """Six significant digits, so that a point reached on two ways is one point."""
    return Parameters(*(float(f"{value:.6g}") for value in values))


def _check(
    images: Sequence[Tensor], logits: Sequence[Tensor], labels: Sequence[Tensor], axes: list[tuple[float, ...]]
) -> None:
    if not len(images) == len(logits) == len(labels) or not images:
        raise ValueError(
            f"wanted as many images as logits and labels, at least one; got {len(images)}, {len(logits)}, {len(labels)}"
        )
    for index, (image, scores, truth) in enumerate(zip(images, logits, labels, strict=True)):
        if image.ndim != 3 or scores.ndim != 3 or not image.shape[1:] == scores.shape[1:] == truth.shape:
            shapes = tuple(image.shape), tuple(scores.shape), tuple(truth.shape)
            raise ValueError(f"image {index}: wanted (G, H, W), (L, H, W) and (H, W), got {shapes}")
        if scores.shape[0] != logits[0].shape[0]:
            raise ValueError(f"image {index} has logits of {scores.shape[0]} labels, image 0 of {logits[0].shape[0]}")
    names = ("bilateral_weight", "theta_alpha", "theta_beta", "spatial_weight", "theta_gamma")
    for name, axis in zip(names, axes, strict=True):
        if not axis or min(axis) <= 0:
            raise ValueError(f"{name} wants at least one positive value, got {axis}")
