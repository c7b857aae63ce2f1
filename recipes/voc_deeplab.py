r"""DeepLab v1 with a dense CRF on PASCAL VOC 2012: the DCNN alone, the CRF fitted to it, both trained as one.

    python recipes/voc_deeplab.py                                    # procedural scenes in VOC's layout, minutes
    python recipes/voc_deeplab.py --root VOCdevkit                   # the real ones, under the same small DCNN
    python recipes/voc_deeplab.py --dataset pairs --root /data/horses --num-classes 2
    python recipes/voc_deeplab.py --root VOCdevkit --sbd benchmark_RELEASE --device cuda --out runs/largefov \
        --network largefov --weights VGG_ILSVRC_16_layers.caffemodel --checkpoint-every 500

The last is a row of arXiv:1412.7062's tables 1 and 2; `--network deeplab`, `7x7`, `4x4`, `largefov` are those of
table 2, `msc` and `largefov-msc` of table 1, from the dcnn.safetensors that `deeplab` or `largefov` left.

1. dcnn: an atrous DCNN of output stride 8. `small` learns from scratch, the others from VGG-16.
2. piecewise (DeepLab): the CRF's parameters are searched coarse to fine on images held out of *train*.
3. joint (CRF-RNN): from both, end to end through five mean-field iterations, ten at test, each with its own learning
   rate. The moment that scores best on the held-out images is kept, the start among them, as long as the score on the
   training images is no worse than at the start.

The scores are those of `val`, which no choice has seen. Writes results.json, report.md, trimap.png, panel.png,
search.csv, search.png, networks.pt, the logs of both trainings and, of v1's networks, dcnn.safetensors.

| setting of v1       | here                                  | the paper; its code, where that says otherwise |
| batch               | 20, 30 for LargeFOV                   | 20; as here                                    |
| loss                | mean over labelled positions          | sum; as here                                   |
| CRF's parameters    | best on images held out of train      | best on 100 images of val                      |
| fc6, fc7 of LargeFOV| every fourth channel                  | 1024 by chance                                 |
| joint               | AdamW, 1e-6 and, the CRF, 1e-3        | not in the paper                               |

Nobody has run the networks of v1 on VOC here yet; the scores of the small one are in recipes/README.md.
"""

import copy
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from crfnet import DenseCRF, weights
from crfnet.data import (
    VOC_CLASSES,
    Crop,
    Samples,
    hold_out,
    image_sizes,
    pairs_files,
    voc_files,
    voc_images,
    write_scenes,
    write_train_aug,
)
from crfnet.evaluation import evaluate
from crfnet.images import atomic_write
from crfnet.inputs import whole_number
from crfnet.losses import at_scores, full_resolution, through_crf
from crfnet.models import DeepLabV1, DeepLabV1MSc, SmallDeepLab, WithCRF
from crfnet.optim import Schedule, parameter_groups, poly_policy, step_policy
from crfnet.piecewise import fit
from crfnet.processes import on_first, rank, start, world_size
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.submission import check_voc_test, write_voc_test
from crfnet.training import Loss, Settings, train
from crfnet.tuning import DEEPLAB_V1_GRID, Grid

START = time.perf_counter()
Network = Literal["small", "deeplab", "7x7", "4x4", "largefov", "msc", "largefov-msc"]


class Plan(NamedTuple):
    """How a network is trained alone, its learning rate in joint training, and how its CRF is searched."""

    iterations: int
    batch_size: int
    crop: int  # pixels
    learning_rate: float
    joint_learning_rate: float  # of the DCNN
    held_out: int  # images of train, for every choice
    search_images: int  # of these


SMALL = Plan(
    iterations=800, batch_size=8, crop=160, learning_rate=3e-3, joint_learning_rate=1e-4, held_out=40, search_images=14
)
# arXiv:1412.7062, section 5: 1e-3, a tenth every 2000 iterations; crops, 6000 iterations and the batch of LargeFOV are
# those of the released prototxts
V1 = Plan(
    iterations=6000, batch_size=20, crop=306, learning_rate=1e-3, joint_learning_rate=1e-6, held_out=100,
    search_images=100,
)  # fmt: skip
PLANS: dict[Network, Plan] = {
    "small": SMALL, "deeplab": V1, "7x7": V1, "4x4": V1, "largefov": V1._replace(batch_size=30, crop=321),
    "msc": V1._replace(crop=321), "largefov-msc": V1._replace(batch_size=30, crop=321),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    dataset: Literal["auto", "synthetic", "voc", "pairs"] = "auto"  # auto: voc where a root is given, else synthetic
    root: str = ""  # folder of the data; the scenes of synthetic are drawn below out
    sbd: str = ""  # benchmark_RELEASE: trains on train_aug, which is added to the folder of VOC
    num_classes: int = 21
    ignore_index: int = 255  # label of pixels without a class
    out: str = "runs/voc_deeplab"
    submission: str = ""  # folder for the label maps of VOC's test images
    seed: int = 0
    threads: int = 0  # 0: as many as torch likes
    device: str = "cpu"
    workers: int = 0  # processes that read images
    checkpoint_every: int = 0  # iterations between checkpoints, for --resume
    tensorboard: bool = False  # writes the log for TensorBoard too
    resume: bool = False
    scenes: int = 240  # training images of "synthetic"; val has a fifth of it
    # 0: by network, see PLANS
    held_out: int = 0  # training images kept for the search and for choosing a moment of the joint training
    search_images: int = 0  # of these
    network: Network = "small"
    weights: str = ""  # to start from: VGG-16's, or for MSc those of the DCNN below it
    width: int = 16  # of "small": channels of its first stage
    iterations: int = 0
    batch_size: int = 0
    crop: int = 0  # pixels, no more than the images have
    learning_rate: float = 0.0
    average: float = 0.99  # of the parameters, a step, of "small"
    # the search; theta_alpha is for images of 500 pixels and scaled to the longest side of these
    grid: Grid = Grid((3.0, 6.0, 12.0), (30.0, 55.0, 100.0), (4.0, 8.0, 16.0), (3.0,), (1.0,), rounds=1)  # of "small"
    v1_grid: Grid = DEEPLAB_V1_GRID  # of the others
    # joint training, whole images, one a step and process
    joint_iterations: int = 400
    joint_learning_rate: float = 0.0  # of the DCNN
    joint_average: float = 0.98  # of the parameters, a step
    crf_learning_rate: float = 1e-3  # of weights and compatibilities
    guard_images: int = 14  # training images on which it must not lose
    num_iterations: int = 5
    num_iterations_eval: int = 10


def log(line: str) -> None:
    """One line with the minutes since the start."""
    if not rank():
        print(f"[{(time.perf_counter() - START) / 60:5.2f} min] {line}", flush=True)


def build(config: Config, plan: Plan, device: torch.device) -> tuple[nn.Module, Loss, torch.optim.Optimizer, Schedule]:
    """The DCNN with the weights it starts from, and its loss, optimiser and schedule."""
    if config.network == "small":
        small = SmallDeepLab(config.num_classes, width=config.width).to(device)
        groups = parameter_groups(small, plan.learning_rate, weight_decay=1e-2, bias_factor=1, head_factor=1)
        return small, full_resolution, torch.optim.AdamW(groups), poly_policy(plan.iterations, warm_up=40)
    network: Any
    if config.network.endswith("msc"):
        network = DeepLabV1MSc(config.num_classes, variant="deeplab" if config.network == "msc" else "largefov")
        whole, head_factor = network.base.requires_grad_(False), 1.0  # the branches alone learn
    else:
        whole = network = DeepLabV1(config.num_classes, variant=config.network)  # type: ignore[arg-type]
        head_factor = 10.0
    if config.weights:
        log(str(weights.load(whole, config.weights)))
    network = network.to(device)
    groups = parameter_groups(network, plan.learning_rate, weight_decay=5e-4, head_factor=head_factor)
    return network, at_scores, torch.optim.SGD(groups, momentum=0.9), step_policy(2000)


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs the three stages and returns the scores that it writes."""
    device = start(config.device)
    for name in ("guard_images", "joint_iterations"):
        whole_number(name, getattr(config, name), 1)
    if config.resume and not config.checkpoint_every:
        raise ValueError("resume wants checkpoint_every, got 0: the run before wrote no checkpoints without it")
    out = begin(config, networks=config.network != "small")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    chosen = {
        name: value
        for name in ("iterations", "batch_size", "crop", "learning_rate", "held_out", "search_images")
        if (value := getattr(config, name))
    }
    plan = PLANS[config.network]._replace(**chosen)

    settings = Settings(
        plan.iterations, plan.batch_size, seed=config.seed, workers=config.workers,
        checkpoint_every=config.checkpoint_every, tensorboard=config.tensorboard, validate_every=plan.iterations // 4,
        average=config.average if config.network == "small" else 0.0,
    )  # fmt: skip
    finer = replace(  # one image a step and process
        settings, iterations=config.joint_iterations, batch_size=world_size(), average=config.joint_average,
        clip_crf=1.0, freeze_norm=True, validate_every=config.joint_iterations // 2, select="mean_iou",
        guard="train_iou",
    )  # fmt: skip

    # data: a part of train is held out for every choice, val is for the scores alone
    root: str | Path = config.root
    dataset = ("voc" if root else "synthetic") if config.dataset == "auto" else config.dataset
    if (dataset == "synthetic") == bool(root):
        wanted = "no root: scenes are drawn below --out" if root else "the folder of its files: --root DIR"
        raise ValueError(f"dataset {dataset!r} wants {wanted}, got {str(root)!r}")
    if dataset == "synthetic":
        num_val = max(1, config.scenes // 5)
        root = on_first(lambda: write_scenes(out / f"scenes-{config.scenes}", num_train=config.scenes, num_val=num_val))
    if config.sbd and dataset != "voc":
        raise ValueError(f"sbd adds to VOC, got data set {dataset!r}")
    if config.submission and dataset != "voc":
        raise ValueError(f"submission is of VOC's test images, got data set {dataset!r}")
    if config.sbd:
        on_first(lambda: write_train_aug(root, config.sbd))
    log(f"data set {dataset}: {root}")
    listing = pairs_files if dataset == "pairs" else voc_files
    test = voc_images(root, "test") if config.submission else []
    if test:
        on_first(lambda: check_voc_test(test, config.submission))
    own, val_files = listing(root, "train"), listing(root, "val")  # held out are VOC's own: its masks are finer
    files = voc_files(root, "train_aug") if config.sbd else own
    kept, rest = hold_out(own, plan.held_out, seed=config.seed, least=1)
    if config.sbd:
        names = {image.stem for image, _ in kept}
        rest = [pair for pair in files if pair[0].stem not in names]
    sizes = image_sizes(own)  # (n, 2): heights and widths
    crop = (plan.crop, plan.crop)
    if config.network == "small":
        crop = (min(plan.crop, int(sizes[:, 0].max())), min(plan.crop, int(sizes[:, 1].max())))
    read = partial(
        Samples, num_classes=config.num_classes, ignore_index=config.ignore_index, seed=config.seed,
        keep=dataset != "voc",  # small enough for the memory
    )  # fmt: skip
    held_out, guards, val = read(kept), read(rest[: config.guard_images]), read(val_files)
    log(f"{len(rest)} images to train on, {len(kept)} held out of train, {len(val)} for the scores")
    report = Report(out, val, names=None if dataset == "pairs" else VOC_CLASSES, device=device)

    # 1. the DCNN alone
    dcnn, loss, optimizer, schedule = build(config, plan, device)
    samples = read(rest, transform=Crop(crop))
    train(
        dcnn, samples, loss, optimizer, schedule, settings,
        folder=out / "dcnn", resume=config.resume, progress=bar("DCNN"), log=log,
    )  # fmt: skip
    report.add("dcnn", dcnn)
    if config.network != "small" and not rank():
        weights.save(dcnn, out / "dcnn.safetensors")

    # 2. piecewise
    longest, grid = float(sizes.max(1).mean()), config.grid if config.network == "small" else config.v1_grid
    grid = replace(grid, theta_alpha=tuple(value * longest / 500 for value in grid.theta_alpha))
    piecewise, found = fit(
        dcnn, held_out, grid, out, count=plan.search_images, device=device, resume=config.resume
    )  # fmt: skip
    log("searched")
    report.add("piecewise", piecewise)

    # 3. joint
    def judge(network: nn.Module) -> dict[str, float]:
        sets = {"mean_iou": held_out, "train_iou": guards}
        return {name: evaluate(network, part, device=device)["mean_iou"] for name, part in sets.items()}

    crf = DenseCRF(
        config.num_classes, **asdict(found.parameters), num_iterations=config.num_iterations,
        num_iterations_eval=config.num_iterations_eval,
    )  # fmt: skip
    joint = WithCRF(copy.deepcopy(dcnn).requires_grad_(True), crf).to(device)
    rate = config.joint_learning_rate or plan.joint_learning_rate
    groups = parameter_groups(
        joint, rate, weight_decay=1e-2, bias_factor=1, head_factor=1, crf_weights=config.crf_learning_rate,
        crf_compatibility=config.crf_learning_rate,
    )  # fmt: skip
    train(
        joint, read(rest, transform=Crop(None)), through_crf, torch.optim.AdamW(groups),
        poly_policy(config.joint_iterations, warm_up=config.joint_iterations // 20), finer,
        folder=out / "joint", resume=config.resume, validate=judge, progress=bar("joint"), log=log,
    )  # fmt: skip
    report.add("joint", joint)
    if not rank():
        with atomic_write(out / "networks.pt") as stream:
            states = {"dcnn": dcnn, "piecewise_crf": piecewise.crf, "joint_dcnn": joint.network, "joint_crf": joint.crf}
            torch.save({"config": asdict(config)} | {name: part.state_dict() for name, part in states.items()}, stream)
    report.write()
    if test and not rank():
        write_voc_test(joint, test, config.submission, device=device)
    log(f"wrote {out}")
    return report.scores


if __name__ == "__main__":
    settings = Config()
    if len(sys.argv) > 1:  # without flags it needs nothing beyond crfnet
        import tyro

        settings = tyro.cli(Config)
    try:
        main(settings)
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"voc_deeplab.py: {error}")
