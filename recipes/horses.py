"""Weizmann horses: a DCNN from scratch, a dense CRF fitted to it, both trained as one, and two ablations.

    python recipes/horses.py --root /data/horses --seed 0

209 photographs to train, 53 for the scores, horse or not. Choices (the CRF's parameters, which moment of a training to
keep) are made on images held out of train; `val` is scored once a stage. Writes results.json, search.json,
checkpoints of each stage and panel.png; a run that was stopped goes on with --resume. It has not been run whole yet.

| row         | what |
| dcnn        | the DCNN alone |
| piecewise   | the same DCNN under the CRF that DeepLab's search finds (arXiv:1412.7062, section 5): trained apart |
| joint       | both end to end from there, (L, L) weights and compatibilities (CRF-RNN, arXiv:1502.03240, section 6) |
| crops       | joint on crops of 96 pixels with the lattice, against ... |
| crops_exact | ... the same with the exact engine in training |
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crfnet import DenseCRF
from crfnet.data import Crop, Samples, pairs_files
from crfnet.evaluation import comparison, evaluate
from crfnet.images import atomic_write, write_image
from crfnet.losses import full_resolution, through_crf
from crfnet.models import SmallDeepLab, WithCRF
from crfnet.optim import parameter_groups, poly_policy
from crfnet.training import Settings, train
from crfnet.tuning import search


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/horses"  # with train.txt and val.txt
    out: str = "runs/horses"
    seed: int = 0
    threads: int = 0  # 0: as many as torch likes
    device: str = "cpu"
    resume: bool = False
    held_out: int = 40  # training images kept for every choice
    ablations: bool = True
    # the DCNN
    width: int = 24  # channels of its first stage
    iterations: int = 3200
    batch_size: int = 8
    crop: int = 160
    scale: tuple[float, float] = (0.7, 1.4)  # of the images, log-uniform
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    average: float = 0.995  # of the parameters, a step
    # the search; theta_alpha in pixels of these images, 250 on the longest side
    bilateral_weight: tuple[float, ...] = (3.0, 6.0, 12.0)
    theta_alpha: tuple[float, ...] = (15.0, 28.0, 50.0)
    theta_beta: tuple[float, ...] = (4.0, 8.0, 16.0)
    rounds: int = 2  # of refinement
    # joint training, whole images one by one
    joint_iterations: int = 676  # four times through
    joint_learning_rate: float = 1e-4  # of the DCNN
    crf_learning_rate: float = 1e-3
    joint_average: float = 0.98
    clip_crf: float = 1.0
    ablation_crop: int = 96


def bar(title: str, iterations: Iterator[int], count: int) -> Iterator[int]:
    """The iterations behind a bar, where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterations
    return iter(tqdm(iterations, title, count, leave=False, disable=None, mininterval=1))


def write_json(path: Path, value: Any) -> None:
    """One JSON file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, indent=2) + "\n").encode())


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs all stages and returns the scores that it writes."""
    print(config, flush=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    out, device = Path(config.out), torch.device(config.device)
    out.mkdir(parents=True, exist_ok=True)

    # data: a part of train is held out for every choice, val is for the scores alone
    files, val_files = pairs_files(config.root, "train"), pairs_files(config.root, "val")
    if not 1 <= config.held_out < len(files):
        raise ValueError(f"held_out must leave training images: wanted 1..{len(files) - 1}, got {config.held_out}")
    order = np.random.default_rng(config.seed).permutation(len(files))
    rest = [files[i] for i in order[config.held_out :]]
    samples = partial(Samples, num_classes=2, seed=config.seed, keep=True)
    held_out, val = samples([files[i] for i in order[: config.held_out]]), samples(val_files)
    scores: dict[str, dict[str, float]] = {}

    def judge(network: nn.Module) -> dict[str, float]:
        return {"mean_iou": evaluate(network, held_out, device=device)["mean_iou"]}

    def score(row: str, network: nn.Module) -> None:
        scores[row] = evaluate(network, val, device=device)
        write_json(out / "results.json", scores)
        print(row, {name: round(100 * value, 2) for name, value in scores[row].items()}, flush=True)

    # 1. the DCNN alone: AdamW, crops, mirrors, scales
    dcnn = SmallDeepLab(2, width=config.width).to(device)
    groups = parameter_groups(
        dcnn, config.learning_rate, weight_decay=config.weight_decay, bias_factor=1, head_factor=1
    )
    train(
        dcnn,
        samples(rest, transform=Crop((config.crop, config.crop), scale=config.scale)),
        full_resolution,
        torch.optim.AdamW(groups),
        poly_policy(config.iterations, warm_up=config.iterations // 20),
        Settings(
            config.iterations, config.batch_size, seed=config.seed, average=config.average, checkpoint_every=400,
            validate_every=config.iterations // 4,
        ),
        folder=out / "dcnn", resume=config.resume, validate=judge, progress=partial(bar, "DCNN"),
    )  # fmt: skip
    score("dcnn", dcnn)

    # 2. piecewise: DeepLab's search on the held-out images
    images = [held_out[index][0].to(device) for index in range(len(held_out))]
    with torch.no_grad():
        logits = [dcnn(image[None])[0] for image in images]
    found = search(
        images, logits, [held_out[index][1] for index in range(len(held_out))],
        bilateral_weight=config.bilateral_weight, theta_alpha=config.theta_alpha, theta_beta=config.theta_beta,
        spatial_weight=(1.0, 3.0), theta_gamma=(1.0,), rounds=config.rounds,
    )  # fmt: skip
    parameters = found.best.parameters
    if found.best == found.without_crf:
        parameters = replace(found.best_crf.parameters, bilateral_weight=0.0, spatial_weight=0.0)
    print(f"{len(found.table)} trials: {found.without_crf.mean_iou:.4f} → {found.best.mean_iou:.4f}, {parameters}")
    settings = {**asdict(parameters), "num_iterations": 5, "num_iterations_eval": 10}
    piecewise = WithCRF(copy.deepcopy(dcnn), DenseCRF(2, **settings, weights="scalar", compatibility="potts", learn=()))
    score("piecewise", piecewise.to(device).eval())

    # 3. joint, from there; and the ablation: the engine in training
    def judge_as_at_test(both: nn.Module) -> dict[str, float]:
        engine, both.crf.engine = both.crf.engine, "auto"  # type: ignore[union-attr]
        metrics = judge(both)
        both.crf.engine = engine  # type: ignore[union-attr]
        return metrics

    def joint(row: str, size: int | None, engine: str) -> WithCRF:
        torch.manual_seed(config.seed)
        both = WithCRF(copy.deepcopy(dcnn), DenseCRF(2, **settings, engine=engine)).to(device)  # type: ignore[arg-type]
        groups = parameter_groups(
            both, config.joint_learning_rate, weight_decay=config.weight_decay, bias_factor=1, head_factor=1,
            crf_weights=config.crf_learning_rate, crf_compatibility=config.crf_learning_rate,
        )  # fmt: skip
        train(
            both,
            samples(rest, transform=Crop(None if size is None else (size, size))),
            through_crf,
            torch.optim.AdamW(groups),
            poly_policy(config.joint_iterations, warm_up=config.joint_iterations // 20),
            Settings(
                config.joint_iterations, 1, seed=config.seed, average=config.joint_average, clip_crf=config.clip_crf,
                freeze_norm=True, checkpoint_every=100, validate_every=config.joint_iterations // 4, select="mean_iou",
            ),
            folder=out / row, resume=config.resume, validate=judge_as_at_test, progress=partial(bar, row),
        )  # fmt: skip
        both.crf.engine = "auto"
        score(row, both)
        return both

    networks = [dcnn, piecewise, joint("joint", None, "auto")]
    if config.ablations:
        joint("crops", config.ablation_crop, "lattice")
        joint("crops_exact", config.ablation_crop, "exact")

    write_json(out / "search.json", [{**asdict(t.parameters), "mean_iou": t.mean_iou} for t in found.table])
    write_image(out / "panel.png", comparison(val, networks, device=device))
    for row, values in scores.items():
        print(f"{row:12}" + "".join(f"  {name} {value:7.2%}" for name, value in values.items()))
    return scores


if __name__ == "__main__":
    chosen = Config()
    if len(sys.argv) > 1:
        import tyro

        chosen = tyro.cli(Config)
    try:
        main(chosen)
    except (ValueError, OSError) as error:  # what came with the data or the flags
        sys.exit(f"horses.py: {error}")
