"""DeepLab's coarse-to-fine search for the parameters of a dense CRF on held-out images.

Every combination of a coarse grid is tried, then the neighbours of the best one, with steps half as large each round
(arXiv:1412.7062 section 5, arXiv:1606.00915 section 4.1.1). Weights and bandwidths are scales, so steps are ratios: a
grid 30, 60, 120 goes on with the factor 2^(1/2) around its best value, then 2^(1/4). The score of a trial is the mean
IoU of one confusion matrix over all images. "No CRF" is the first trial: the best never scores less than the DCNN.

The structure of the bilateral filter depends on the bandwidths alone. It is built once per image and pair of bandwidths
and filters the marginals of all weights together, as further channels:

    q_r = softmax(x_r),   x_r <- logits + w1_r K_bilateral q_r + w2_r K_spatial q_r,   r = 1 .. number of weights

(kernels normalised "after", Potts compatibility up to a constant over labels, as in Kraehenbuehl and Koltun's library).

    images, logits, labels = unaries(network, held_out)
    found = search(images, logits, labels, **asdict(DEEPLAB_V2_GRID), table="search.csv")
    DenseCRF(21, **asdict(found.parameters))

A table on disk is both the record of what was tried and what a stopped search goes on from, see `crfnet.trials`.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.data import Samples
from crfnet.evaluation import in_eval_mode
from crfnet.features import pixel_features
from crfnet.images import PathLike
from crfnet.inputs import whole_number
from crfnet.metrics import ConfusionMatrix
from crfnet.ops import GaussianFilter, GridFilter
from crfnet.ops.operator import Method
from crfnet.trials import NAMES, Parameters, Trial, TrialTable

MAX_CHANNELS = 128  # marginals filtered together: bounds memory at 128 floats a pixel per temporary

NEGLIGIBLE = 1e-4  # probability below which, together and in every pixel, labels are left out


@dataclass(frozen=True)
class Grid:
    """What a search tries, ``search(images, logits, labels, **asdict(grid))``; nests in the flags of a recipe.

    The defaults are near DeepLab's, with w2 and its bandwidth fixed, for images of about 500 pixels; scale
    ``theta_alpha`` with the size of others.
    """

    bilateral_weight: tuple[float, ...] = (3.0, 5.0, 8.0)  # w1, the coarse values
    theta_alpha: tuple[float, ...] = (30.0, 55.0, 100.0)  # sigma_alpha, pixels
    theta_beta: tuple[float, ...] = (3.0, 6.0, 12.0)  # sigma_beta, intensity levels
    spatial_weight: tuple[float, ...] = (3.0,)  # w2; one value stays fixed
    theta_gamma: tuple[float, ...] = (1.0,)  # sigma_gamma, pixels
    rounds: int = 1  # of refinement around the best, each with steps half as large
    num_iterations: int = 10  # of mean field


# The papers' ranges: their ends and the geometric mean. The papers step evenly, by 10 pixels and 1 level; ours are
# ratios, which two rounds of refinement make finer than that in mid-range. How often the papers refined is not said.
# arXiv:1412.7062, section 5: w1 5 to 10, sigma_alpha 50:10:100, sigma_beta 3:1:10. The script in the released code,
# python/my_script/crf_runner.py, has w1 5 and 10, and sigma_alpha from 40 on.
DEEPLAB_V1_GRID = Grid((5.0, 7.1, 10.0), (50.0, 71.0, 100.0), (3.0, 5.5, 10.0), (3.0,), (3.0,), rounds=2)
# arXiv:1606.00915, section 4.1.1: w1 3:6, sigma_alpha 30:10:100, sigma_beta 3:6
DEEPLAB_V2_GRID = Grid((3.0, 4.2, 6.0), (30.0, 55.0, 100.0), (3.0, 4.2, 6.0), (3.0,), (3.0,), rounds=2)


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

    @property
    def parameters(self) -> Parameters:
        """The parameters to use: those of the best trial, or where no CRF is best those of `middle`.

        The best CRF has none to start a training with then, as the search has crept towards where a CRF does nothing.
        """
        return self.middle if self.best == self.without_crf else self.best.parameters

    @property
    def middle(self) -> Parameters:
        """The bandwidths in the middle of the coarse grid (geometric means) with both weights zero.

        The labels are the DCNN's, and a training may start from there.
        """
        coarse = np.array([astuple(trial.parameters) for trial in self.table[1:] if trial.round == 0])
        middle = _rounded(np.exp(np.log(coarse).mean(0)))
        return replace(middle, bilateral_weight=0.0, spatial_weight=0.0)


@torch.no_grad()
def unaries(
    network: nn.Module,
    samples: Samples,
    *,
    count: int = 100,
    seed: int = 10,
    device: str | torch.device = "cpu",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Images, a DCNN's logits for them and their labels, of held-out samples chosen by chance: what `search` takes.

    100 images are DeepLab's number, and 10 its seed (``SetupEnv.m`` of the released code); which images Matlab's
    generator then chose, no other one can tell. The network predicts in eval mode and is left in the modes it had.

    Args:
        network: from images ``(1, G, H, W)`` to logits ``(1, L, h, w)``, on ``device``. Logits of another size than
            the image's are enlarged bilinearly, as `crfnet.models.WithCRF` does.
        samples: the held-out ones.
        count: how many; all of them where there are fewer. They come in the order of ``samples``.
        seed: of the choice.
        device: of the network.

    Returns:
        Lists of images (G, H, W), logits (L, H, W) and labels (H, W), on the CPU: 4 L bytes a pixel.

    Raises:
        ValueError: ``count`` below 1, no samples, labels of several labellings, or a sample padded by its transform.
        TypeError: the network returns something else than one tensor (1, L, h, w).
    """
    whole_number("count", count, 1)
    if not len(samples):
        raise ValueError("samples must be at least one, got none")
    chosen = sorted(np.random.default_rng(seed).permutation(len(samples))[:count].tolist())
    images, logits, labels = [], [], []
    with in_eval_mode(network):
        for index in chosen:
            image, truth, inside = samples[index]
            if truth.ndim != 2 or not inside.all():
                wanted = f"sample {index}: wanted labels (H, W) and no padded pixels"
                raise ValueError(f"{wanted}, got {tuple(truth.shape)} and {int((~inside).sum())}")
            scores = network(image[None].to(device))
            if not isinstance(scores, Tensor) or scores.ndim != 4 or len(scores) != 1:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise TypeError(f"network must return logits (1, L, h, w), one tensor, got {got}")
            if scores.shape[2:] != image.shape[1:]:
                scores = F.interpolate(scores, image.shape[1:], mode="bilinear", align_corners=False)
            images.append(image)
            logits.append(scores[0].cpu())
            labels.append(truth)
    return images, logits, labels


def search(
    images: Sequence[Tensor],
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    bilateral_weight: Sequence[float] = Grid.bilateral_weight,
    theta_alpha: Sequence[float] = Grid.theta_alpha,
    theta_beta: Sequence[float] = Grid.theta_beta,
    spatial_weight: Sequence[float] = Grid.spatial_weight,
    theta_gamma: Sequence[float] = Grid.theta_gamma,
    rounds: int = Grid.rounds,
    num_iterations: int = Grid.num_iterations,
    ignore_index: int = 255,
    method: Method = "auto",
    device: str | torch.device | None = None,
    table: PathLike | None = None,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Search:
    """Searches the CRF parameters with the highest mean IoU on the given images.

    An axis of one value stays fixed, as DeepLab does with ``spatial_weight`` and ``theta_gamma``. Defaults and ranges
    are those of `Grid`.

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
        device: where the filters run, image by image; where the logits are, unless given.
        table: a CSV file of all that was tried, rewritten after each group of weights that share their bandwidths.
            Where it exists, its points are not tried again: a search that was stopped goes on and ends with the table
            of one that was not, and another grid adds its rows before those that it does not share. Logits must be
            the same to the last bit: those of a network on another device, say, are others.
        progress: wraps the list of bandwidths of each round, ``tqdm`` for example.

    Raises:
        ValueError: no images, sizes that do not belong together, no pixel that counts, an empty or non-positive grid; a
            ``table`` that is damaged, no such table, or one of other images, logits, labels, ``num_iterations``,
            ``method`` or ``ignore_index``, which is left as it is.
        OSError: the disk refuses the table; before anything is tried where its folder is missing.
    """
    axes = [
        tuple(map(float, axis)) for axis in (bilateral_weight, theta_alpha, theta_beta, spatial_weight, theta_gamma)
    ]
    _check(images, logits, labels, axes)
    whole_number("rounds", rounds, 0)
    whole_number("num_iterations", num_iterations, 1)

    num_classes = logits[0].shape[0]
    plain = ConfusionMatrix(num_classes, ignore_index=ignore_index)
    for scores, truth in zip(logits, labels, strict=True):
        plain.add(scores.argmax(0), truth)
    if not plain.counts.any():
        raise ValueError(f"labels must have a pixel that counts, got {ignore_index} (ignore_index) everywhere")
    start = Parameters(*(axis[0] for axis in axes))
    trials = [Trial(replace(start, bilateral_weight=0.0, spatial_weight=0.0), plain.mean_iou, 0)]
    store = None
    if table is not None:
        store = TrialTable(table, _fingerprint(images, logits, labels, f"{num_iterations} {method} {ignore_index}"))
        store.write(trials)
    known = {} if store is None else store.known
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
            new = [point for point in points if point not in known]
            matrices = [ConfusionMatrix(num_classes, ignore_index=ignore_index) for _ in new]
            for image, scores, truth in zip(images, logits, labels, strict=True) if new else ():
                there = scores.device if device is None else device
                refined = _refine(image.to(there), scores.to(there), new, num_iterations, method)
                for matrix, called in zip(matrices, refined, strict=True):
                    matrix.add(called.cpu(), truth.cpu())
            found = known | {point: matrix.mean_iou for point, matrix in zip(new, matrices, strict=True)}
            trials += [Trial(point, found[point], number) for point in points]
            if store is not None:
                store.write(trials)
        centre = max(trials[1:], key=lambda trial: trial.mean_iou).parameters
        steps = [ratio ** (0.5 ** (number + 1)) for ratio in ratios]
        axes = [
            (value,) if step == 1 else (value / step, value, value * step)
            for value, step in zip(astuple(centre), steps, strict=True)
        ]
    return Search(max(trials, key=lambda trial: trial.mean_iou), trials)  # the first of equals: no CRF before any


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


def _fingerprint(images: Sequence[Tensor], logits: Sequence[Tensor], labels: Sequence[Tensor], settings: str) -> str:
    """Of all that a score depends on but the parameters, 16 digits; values count, their dtypes and devices do not."""
    total = hashlib.blake2b(settings.encode(), digest_size=8)
    for group in zip(images, logits, labels, strict=True):
        for tensor, dtype in zip(group, (torch.float32, torch.float32, torch.int64), strict=True):
            total.update(str(tuple(tensor.shape)).encode())
            total.update(tensor.detach().to("cpu", dtype).contiguous().numpy().data)
    return total.hexdigest()


def _rounded(values: Iterable[float]) -> Parameters:
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
    for name, axis in zip(NAMES, axes, strict=True):
        if not axis or not all(0 < value < math.inf for value in axis):
            raise ValueError(f"{name} wants at least one positive value, and no other, got {axis}")
