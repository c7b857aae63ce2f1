"""CamVid, 11 classes of street scenes: a DCNN from scratch, a dense CRF fitted to it, and both trained as one.

    python recipes/camvid.py --root /data/CamVid --seed 0

367 frames to train, 101 for the scores, 480x360, SegNet's split. The hard case for a CRF: a DCNN that is unsure of
poles, signs and people, whom a dense CRF with hand-picked parameters swallows. Whatever is chosen (the CRF's
parameters, which moment of a training to keep) is chosen on stretches of the three training drives that are held out
whole, since frames beside a training frame look like it; `val` is only scored. It is one such stretch itself, seven
seconds of the third drive with training frames on either side: scores on it say little of other streets.

| row       | what |
| dcnn      | the DCNN alone: cross-entropy, no class weights |
| hand      | the same DCNN under the hand-picked values of pydensecrf's example, as orientation |
| piecewise | under the CRF that DeepLab's search finds, "no CRF" among its candidates (arXiv:1412.7062, section 5) |
| gradient  | under a CRF learnt by gradient on the frozen DCNN: one weight a pair of labels and kernel |
| tuned     | the DCNN alone, trained on as long as the joint one: what the longer training is worth |
| joint     | both end to end from the gradient's CRF (CRF-RNN, arXiv:1502.03240, section 6) |

Writes results.json, report.md (classes: who gains, who pays), trimap.png, panel.png, search.csv, search.png, the
network of each row but hand, and the checkpoints of each stage; a run that was stopped goes on with --resume.
"""

import copy
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crfnet import DenseCRF, weights
from crfnet.data import CAMVID_CLASSES, CAMVID_PALETTE, Crop, Samples, camvid_files, camvid_labels
from crfnet.evaluation import evaluate
from crfnet.inputs import whole_number
from crfnet.losses import full_resolution, through_crf
from crfnet.models import SmallDeepLab, WithCRF
from crfnet.optim import parameter_groups, poly_policy
from crfnet.piecewise import fit
from crfnet.processes import rank, start, world_size
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.training import Settings, train
from crfnet.trials import Parameters
from crfnet.tuning import Grid

File = tuple[Path, Path]
# the example of pydensecrf's README
HAND = Parameters(bilateral_weight=10.0, theta_alpha=80.0, theta_beta=13.0, spatial_weight=3.0, theta_gamma=3.0)


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/CamVid"  # with train.txt and val.txt
    out: str = "runs/camvid"
    seed: int = 0
    threads: int = 0  # 0: as many as torch likes
    device: str = "cpu"
    workers: int = 0  # processes that read images
    resume: bool = False
    tensorboard: bool = False  # writes the logs for TensorBoard too
    held_out: float = 0.11  # of each drive's training frames, for every choice
    # the DCNN
    width: int = 24  # channels of its first stage
    iterations: int = 5000
    batch_size: int = 4
    crop: tuple[int, int] = (288, 384)
    scale: tuple[float, float] = (0.7, 1.5)  # of the images, log-uniform
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    average: float = 0.998  # of the parameters, a step
    # the search, in pixels of these frames
    grid: Grid = Grid((1.0, 3.0), (15.0, 45.0), (4.0, 12.0), (1.0,), (1.0,), rounds=2)
    search_images: int = 10  # of the held-out ones
    # fine-tuning, crop by crop
    joint_iterations: int = 800
    joint_crop: tuple[int, int] = (240, 320)
    joint_learning_rate: float = 1e-4  # of the DCNN
    crf_learning_rate: float = 1e-2
    joint_average: float = 0.99
    clip_crf: float = 1.0
    guard_images: int = 20  # training images on which fine-tuning must not lose


def hold_out_stretches(files: list[File], fraction: float, seed: int) -> tuple[list[File], list[File]]:
    """One stretch of neighbouring frames of each drive, its place drawn from the seed, and the rest."""
    rng = np.random.default_rng(seed)
    held_out, rest = [], []
    for drive in dict.fromkeys(image.name[:6] for image, _ in files):  # 0001TP, 0006R0, 0016E5
        frames = sorted(pair for pair in files if pair[0].name.startswith(drive))
        count = max(1, round(fraction * len(frames)))
        first = int(rng.integers(len(frames) - count + 1))
        held_out += frames[first : first + count]
        rest += frames[:first] + frames[first + count :]
    return held_out, rest


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs all stages and returns the scores that it writes."""
    device = start(config.device)
    for name in ("guard_images", "joint_iterations"):
        whole_number(name, getattr(config, name), 1)
    out, L = begin(config), len(CAMVID_CLASSES)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    alone = Settings(
        config.iterations, config.batch_size, seed=config.seed, workers=config.workers, average=config.average,
        tensorboard=config.tensorboard, checkpoint_every=250, validate_every=config.iterations // 5,
    )  # fmt: skip
    finer = Settings(  # one image a step and process
        config.joint_iterations, world_size(), seed=config.seed, workers=config.workers, average=config.joint_average,
        clip_crf=config.clip_crf, freeze_norm=True, tensorboard=config.tensorboard, checkpoint_every=100,
        validate_every=config.joint_iterations // 2, select="mean_iou", guard="train_iou",
    )  # fmt: skip
    kept, files = hold_out_stretches(camvid_files(config.root, "train"), config.held_out, config.seed)
    read = partial(Samples, num_classes=L, read_labels=camvid_labels, seed=config.seed, keep=True)
    held_out, val = read(kept), read(camvid_files(config.root, "val"))
    report = Report(out, val, names=CAMVID_CLASSES, palette=CAMVID_PALETTE, device=device)
    spread = np.linspace(0, len(files) - 1, min(config.guard_images, len(files))).round().astype(int)
    guards = read([files[index] for index in spread])

    def judge(network: nn.Module) -> dict[str, float]:
        return {"mean_iou": evaluate(network, held_out, device=device)["mean_iou"]}

    def add(row: str, network: nn.Module) -> None:
        report.add(row, network)
        if not rank():
            weights.save(network, out / f"{row}.safetensors")

    # 1. the DCNN alone: AdamW, crops, mirrors, scales
    dcnn = SmallDeepLab(L, width=config.width).to(device)
    groups = partial(parameter_groups, weight_decay=config.weight_decay, bias_factor=1, head_factor=1)
    train(
        dcnn,
        read(files, transform=Crop(config.crop, scale=config.scale)),
        full_resolution,
        torch.optim.AdamW(groups(dcnn, config.learning_rate)),
        poly_policy(config.iterations, warm_up=config.iterations // 20),
        alone,
        folder=out / "dcnn", resume=config.resume, validate=judge, progress=bar("DCNN"),
    )  # fmt: skip
    add("dcnn", dcnn)
    fixed: Any = asdict(HAND) | {"weights": "scalar", "compatibility": "potts", "learn": ()}
    hand = DenseCRF(L, **fixed, normalization="symmetric")  # as pydensecrf normalises
    report.add("hand", WithCRF(dcnn, hand.to(device)))

    # 2. piecewise: DeepLab's search on the held-out frames
    piecewise, found = fit(
        dcnn, held_out, config.grid, out, count=config.search_images, device=device, resume=config.resume
    )
    add("piecewise", piecewise)

    # 3. by gradient, with one recipe for every row: the CRF alone, the DCNN alone, or both
    def fine_tune(folder: str, network: nn.Module) -> float:  # its score on the held-out frames
        torch.manual_seed(config.seed)
        run = train(
            network,
            read(files, transform=Crop(config.joint_crop)),
            through_crf if isinstance(network, WithCRF) else full_resolution,
            torch.optim.AdamW(
                groups(
                    network, config.joint_learning_rate, crf_weights=config.crf_learning_rate,
                    crf_compatibility=config.crf_learning_rate,
                )
            ),
            poly_policy(config.joint_iterations, warm_up=config.joint_iterations // 20),
            finer,
            folder=out / folder, resume=config.resume, progress=bar(folder),
            validate=lambda judged: judge(judged) | {"train_iou": evaluate(judged, guards, device=device)["mean_iou"]},
        )  # fmt: skip
        assert run.best is not None  # `finer` selects
        return float(run.best["score"])

    # from the CRF that the search prefers, and from none at the middle of its grid, since here the search
    # likes narrow kernels, from which little is learnt; joint goes on from the better of the two
    learnt = []
    for folder, parameters in {"gradient": found.parameters, "gradient_from_none": found.middle}.items():
        if folder == "gradient" or parameters != found.parameters:
            crf = DenseCRF(L, **asdict(parameters), num_iterations=5, num_iterations_eval=10).to(device)
            network = WithCRF(copy.deepcopy(dcnn), crf, frozen=True)
            learnt.append((fine_tune(folder, network), network))
    _, gradient = max(learnt, key=lambda one: one[0])
    add("gradient", gradient)
    tuned, joint = copy.deepcopy(dcnn), WithCRF(copy.deepcopy(dcnn), copy.deepcopy(gradient.crf))
    fine_tune("tuned", tuned)
    add("tuned", tuned)
    fine_tune("joint", joint)
    add("joint", joint)
    report.write()
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"camvid.py: {error}")
