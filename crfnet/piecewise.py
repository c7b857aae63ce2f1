"""Piecewise training, DeepLab's way: the DCNN is done, and a CRF is fitted to what it says on held-out images.

    both, found = fit(dcnn, held_out, DEEPLAB_V1_GRID, Path("runs/x"))      by search: writes search.csv and search.png
    joint = WithCRF(dcnn, DenseCRF(21, **asdict(found.parameters)))         to train on from there

By gradient, where one weight a kernel is not enough: ``WithCRF(dcnn, crf, frozen=True)`` in `crfnet.training.train`.

Source: arXiv:1412.7062, section 5; arXiv:1606.00915, section 4.1.1.
"""

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from crfnet.crf import DenseCRF
from crfnet.data import Samples
from crfnet.images import write_image
from crfnet.models import WithCRF
from crfnet.processes import on_first
from crfnet.progress import bar
from crfnet.surface import surface_plot
from crfnet.tuning import Grid, Search, search, unaries


def fit(
    network: nn.Module,
    samples: Samples,
    grid: Grid,
    folder: Path,
    *,
    count: int = 100,
    seed: int = 10,
    device: str | torch.device = "cpu",
    resume: bool = False,
) -> tuple[WithCRF, Search]:
    """Searches the CRF of a network; of several processes the first searches and the others wait for what it finds.

    Args:
        network: from images (1, 3, H, W) to logits (1, L, h, w), on ``device``; not changed.
        samples: held out of training, and not those that are reported.
        grid: what to try.
        folder: for search.csv and search.png.
        count: images to search on, chosen by ``seed`` as `crfnet.tuning.unaries` does.
        seed: of that choice.
        device: of the network.
        resume: goes on from the search.csv of a search that was stopped; otherwise it is written anew.

    Returns:
        A copy of the network under the CRF found, which does not learn (with weights 0 where no CRF helped), and the
        search.

    Raises:
        ValueError: what `crfnet.tuning.search` raises; search.csv is of another search.
        TypeError: the network returns something else than one tensor (1, L, h, w).
        OSError: the folder cannot be written.
    """

    def searched() -> Search:
        images, logits, labels = unaries(network, samples, count=count, seed=seed, device=device)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            (folder / "search.csv").unlink(missing_ok=True)
        found = search(
            images, logits, labels, **asdict(grid), device=device, table=folder / "search.csv", progress=bar("search")
        )  # fmt: skip
        write_image(folder / "search.png", surface_plot(found))
        change = f"held-out mean IoU {found.without_crf.mean_iou:.4f} → {found.best.mean_iou:.4f}"
        print(f"{len(found.table)} trials, {change}: {found.parameters}", flush=True)
        return found

    found = on_first(searched)
    crf = DenseCRF(
        samples.num_classes, **asdict(found.parameters), num_iterations=grid.num_iterations,
        num_iterations_eval=grid.num_iterations, weights="scalar", compatibility="potts", learn=(),
    )  # fmt: skip
    return WithCRF(copy.deepcopy(network), crf).to(device).eval(), found
