"""DeepLab with a dense CRF on PASCAL VOC 2012: the DCNN alone, the CRF fitted to it, both trained as one.

    python recipes/voc_deeplab.py                                        # procedural scenes in VOC's layout, minutes
    python recipes/voc_deeplab.py --root /data/VOCdevkit                 # the real ones
    python recipes/voc_deeplab.py --dataset pairs --root /data/horses --num-classes 2

Stage 1 trains an atrous DCNN of output stride 8. Stage 2 (piecewise, DeepLab) freezes it and searches the CRF's
parameters coarse to fine on a held-out part of *train*. Stage 3 (joint, CRF-RNN) starts from both and trains them end
to end through five mean-field iterations, ten at test, each with its own learning rate; the epoch that scores best on
the held-out images is kept, the start among them. The scores are those of `val`, which no choice has seen.

Writes results.json (the scores), details.json (settings, losses, the table of the search), checkpoint.pt and panel.png.
"""

import copy
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from crfnet import DenseCRF
from crfnet.data import Crop, Samples, image_sizes, pairs_files, voc_files, write_voc
from crfnet.evaluation import comparison, evaluate
from crfnet.images import atomic_write, write_image
from crfnet.losses import cross_entropy
from crfnet.models import SmallDeepLab, WithCRF
from crfnet.tuning import Search, search

try:
    from tqdm import tqdm
except ImportError:  # bars are a comfort, not a need
    tqdm = None

START = time.perf_counter()


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    dataset: Literal["auto", "synthetic", "voc", "pairs"] = "auto"  # auto: voc where a root is given, else synthetic
    root: str = ""  # folder of the data; the scenes of synthetic are drawn below out
    num_classes: int = 21
    ignore_index: int = 255  # label of pixels without a class
    out: str = "runs/voc_deeplab"
    seed: int = 0
    threads: int = 0  # 0: as many as torch likes
    device: str = "cpu"
    workers: int = 0  # processes that read images
    scenes: int = 300  # training images of "synthetic"; val has a fifth of it
    held_out: int = 40  # training images kept for the search and for choosing the epoch
    crop: int = 160  # pixels, no more than the images have
    # the DCNN
    width: int = 16  # channels of its first stage
    epochs: int = 50
    batch_size: int = 8
    learning_rate: float = 3e-3
    # the search: coarse grids; theta_alpha is for images of 500 pixels and scaled to the longest side of these
    bilateral_weight: tuple[float, ...] = (3.0, 6.0, 12.0)
    theta_alpha: tuple[float, ...] = (30.0, 55.0, 100.0)
    theta_beta: tuple[float, ...] = (4.0, 8.0, 16.0)
    spatial_weight: tuple[float, ...] = (3.0,)
    theta_gamma: tuple[float, ...] = (1.0,)
    rounds: int = 1  # of refinement around the best point
    search_images: int = 20  # of the held-out ones
    # joint training
    joint_epochs: int = 3
    joint_learning_rate: float = 1e-4  # of the DCNN
    joint_average: float = 0.98  # of the moving average of the parameters, a step
    crf_learning_rate: float = 1e-3  # of weights and compatibilities
    num_iterations: int = 5
    num_iterations_eval: int = 10


def train_dcnn(dcnn: nn.Module, samples: Samples, config: Config) -> list[float]:
    """Stage 1: the DCNN alone, with the cross-entropy at full resolution; returns the loss of each epoch."""
    loader = batches(samples, config.batch_size, config)
    optimizer = torch.optim.AdamW(dcnn.parameters(), config.learning_rate, weight_decay=1e-2)
    schedule = poly_decay(optimizer, config.epochs * len(loader))
    history = []
    for epoch in progress(range(config.epochs), "DCNN"):
        samples.set_epoch(epoch)
        dcnn.train()
        losses = []
        for image, labels, _ in loader:
            loss = cross_entropy(dcnn(image.to(config.device)), labels.to(config.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        history.append(float(np.mean(losses)))
        if epoch % 10 == 9 or epoch + 1 == config.epochs:
            log(f"epoch {epoch + 1} of {config.epochs}: loss {history[-1]:.3f}")
    dcnn.eval()
    return history


def search_crf(dcnn: nn.Module, held_out: Samples, config: Config, longest_side: float) -> Search:
    """Stage 2: DeepLab's search on held-out images, the DCNN frozen."""
    samples = [held_out[index] for index in range(min(config.search_images, len(held_out)))]
    images = [image.to(config.device) for image, _, _ in samples]
    with torch.no_grad():
        logits = [dcnn(image[None])[0] for image in images]
    return search(
        images,
        logits,
        [labels for _, labels, _ in samples],
        bilateral_weight=config.bilateral_weight,
        theta_alpha=[value * longest_side / 500 for value in config.theta_alpha],
        theta_beta=config.theta_beta,
        spatial_weight=config.spatial_weight,
        theta_gamma=config.theta_gamma,
        rounds=config.rounds,
        num_iterations=config.num_iterations_eval,
        progress=lambda groups: progress(groups, "search"),
    )


def train_joint(joint: WithCRF, samples: Samples, held_out: Samples, config: Config) -> list[dict[str, float]]:
    """Stage 3: both, end to end; leaves them as they were at their best epoch and returns the history.

    One whole image a step, as CRF-RNN does: crops have other borders and another context than the images of the test.
    What is scored and kept is the moving average of all parameters: single steps swing by a point of mean IoU.
    """
    loader = batches(samples, 1, config)
    groups = [
        {"params": joint.network.parameters(), "lr": config.joint_learning_rate, "weight_decay": 1e-2},
        {"params": joint.crf.parameters(), "lr": config.crf_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = poly_decay(optimizer, config.joint_epochs * len(loader))
    average = AveragedModel(joint, multi_avg_fn=get_ema_multi_avg_fn(config.joint_average))
    history: list[dict[str, float]] = []
    states = []
    for epoch in range(config.joint_epochs + 1):  # epoch 0 only looks at the start
        samples.set_epoch(config.epochs + epoch)
        joint.train()
        for module in joint.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # keeps the statistics of stage 1: one image has poor ones
        losses = []
        for image, labels, _ in progress(loader if epoch else [], f"joint {epoch}"):
            loss = cross_entropy(joint(image.to(config.device)), labels.to(config.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(joint)
            losses.append(float(loss.detach()))
        score = evaluate(average.eval(), held_out, device=config.device)["mean_iou"]
        history.append({"epoch": epoch, "held_out_mean_iou": score})
        if epoch:
            history[-1]["loss"] = float(np.mean(losses))
        states.append(copy.deepcopy(average.module.state_dict()))
        log(f"epoch {epoch}: held-out mean IoU {score:.4f}" + (f", loss {history[-1]['loss']:.3f}" if epoch else ""))
    best = int(np.argmax([row["held_out_mean_iou"] for row in history]))
    log(f"kept epoch {best}")
    joint.load_state_dict(states[best])
    joint.eval()
    return history


def poly_decay(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """DeepLab's schedule (1 - step / total)^0.9, after a linear warm-up over the first twentieth."""
    warm_up = max(1, total // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1) * max(0, 1 - step / max(total, 1)) ** 0.9
    )


def batches(samples: Samples, batch_size: int, config: Config) -> DataLoader[Any]:
    """Shuffled batches whose order depends on the seed alone."""
    order = torch.Generator().manual_seed(config.seed)
    size = min(batch_size, len(samples))  # the last, smaller batch is left out: it would disturb the batch norm
    return DataLoader(samples, size, shuffle=True, drop_last=True, generator=order, num_workers=config.workers)


def progress(steps: Iterable[Any], title: str) -> Iterable[Any]:
    """The same steps behind a bar, where tqdm is installed and somebody watches."""
    return steps if tqdm is None else tqdm(steps, desc=title, leave=False, disable=None, mininterval=1)


def log(line: str) -> None:
    """One line with the minutes since the start."""
    print(f"[{(time.perf_counter() - START) / 60:5.2f} min] {line}", flush=True)


def write_json(path: Path, value: Any) -> None:
    """One JSON file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, indent=2) + "\n").encode())


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs the three stages and returns the scores that it writes."""
    log(str(config))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    out, device = Path(config.out), config.device
    out.mkdir(parents=True, exist_ok=True)

    # data: a part of train is held out for every choice, val is for the scores alone
    root: str | Path = config.root
    dataset = ("voc" if root else "synthetic") if config.dataset == "auto" else config.dataset
    if (dataset == "synthetic") == bool(root):
        wanted = "no root: scenes are drawn below --out" if root else "the folder of its files: --root DIR"
        raise ValueError(f"dataset {dataset!r} wants {wanted}, got {str(root)!r}")
    if dataset == "synthetic":
        root = write_voc(out / f"scenes-{config.scenes}", num_train=config.scenes, num_val=max(1, config.scenes // 5))
    log(f"data set {dataset}: {root}")
    listing = pairs_files if dataset == "pairs" else voc_files
    files, val_files = listing(root, "train"), listing(root, "val")
    if not 1 <= config.held_out < len(files):
        raise ValueError(f"held_out must leave training images: wanted 1..{len(files) - 1}, got {config.held_out}")
    order = np.random.default_rng(config.seed).permutation(len(files))
    sizes = image_sizes(files)  # (n, 2): heights and widths
    crop = Crop((min(config.crop, int(sizes[:, 0].max())), min(config.crop, int(sizes[:, 1].max()))))

    def read(part: list[tuple[Path, Path]], transform: Crop | None = None) -> Samples:
        return Samples(
            part, config.num_classes, ignore_index=config.ignore_index, transform=transform, seed=config.seed,
            keep=dataset != "voc",  # small enough for the memory
        )  # fmt: skip

    train = read([files[i] for i in order[config.held_out :]], crop)
    held_out, val = read([files[i] for i in order[: config.held_out]]), read(val_files)
    log(f"{len(train)} images to train on, {len(held_out)} held out of train, {len(val)} for the scores")

    # 1. the DCNN alone
    dcnn = SmallDeepLab(config.num_classes, width=config.width).to(device)
    losses = train_dcnn(dcnn, train, config)
    scores = {"dcnn": evaluate(dcnn, val, device=device)}
    log("DCNN: mean IoU {mean_iou:.4f}".format(**scores["dcnn"]))

    # 2. piecewise
    found = search_crf(dcnn, held_out, config, float(sizes.max(1).mean()))
    log(f"{len(found.table)} trials, held-out mean IoU {found.without_crf.mean_iou:.4f} → {found.best.mean_iou:.4f}")
    parameters = found.best.parameters
    if found.best == found.without_crf:  # weights 0, from which the joint training may still leave
        log("no CRF helps on the held-out images")
        parameters = replace(found.best_crf.parameters, bilateral_weight=0.0, spatial_weight=0.0)
    log(str(parameters))
    iterations = {"num_iterations": config.num_iterations, "num_iterations_eval": config.num_iterations_eval}
    fitted = {**asdict(parameters), **iterations, "weights": "scalar", "compatibility": "potts", "learn": ()}
    piecewise = WithCRF(copy.deepcopy(dcnn), DenseCRF(config.num_classes, **fitted)).to(device).eval()
    scores["piecewise"] = evaluate(piecewise, val, device=device)
    log("piecewise: mean IoU {mean_iou:.4f}".format(**scores["piecewise"]))

    # 3. joint
    learned = {**fitted, "weights": "full", "compatibility": "full", "learn": ("weights", "compatibility")}
    joint = WithCRF(copy.deepcopy(dcnn), DenseCRF(config.num_classes, **learned)).to(device)
    whole = read([files[i] for i in order[config.held_out :]], Crop(None))
    history = train_joint(joint, whole, held_out, config)
    scores["joint"] = evaluate(joint, val, device=device)

    with atomic_write(out / "checkpoint.pt") as stream:
        states = {"dcnn": dcnn, "joint_dcnn": joint.network, "joint_crf": joint.crf}
        settings = {"config": asdict(config), "piecewise_crf_settings": fitted, "joint_crf_settings": learned}
        torch.save({**settings, **{name: module.state_dict() for name, module in states.items()}}, stream)
    table = [{**asdict(trial.parameters), "mean_iou": trial.mean_iou, "round": trial.round} for trial in found.table]
    write_json(out / "details.json", {"config": asdict(config), "losses": losses, "search": table, "joint": history})
    write_image(out / "panel.png", comparison(val, [dcnn, piecewise, joint], device=device))
    write_json(out / "results.json", scores)
    print(f"\n{'':10} {'mean IoU':>9} {'pixel acc.':>11} {'trimap 3 px':>12}")
    for stage, score in scores.items():
        print(f"{stage:10} {score['mean_iou']:>9.2%} {score['pixel_accuracy']:>11.2%} {score['trimap_iou_3px']:>12.2%}")
    log(f"wrote {out}/results.json, details.json, checkpoint.pt and panel.png")
    return scores


if __name__ == "__main__":
    settings = Config()
    if len(sys.argv) > 1:  # without flags it needs nothing beyond crfnet
        import tyro

        settings = tyro.cli(Config)
    try:
        main(settings)
    except (ValueError, OSError) as error:  # what came with the data or the flags
        sys.exit(f"voc_deeplab.py: {error}")
