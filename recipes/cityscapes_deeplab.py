"""DeepLab v2 on Cityscapes: 19 classes at full resolution, then its dense CRF (arXiv:1606.00915, table 9).

    python recipes/cityscapes_deeplab.py --root cityscapes --weights FILE ... [--submission FOLDER]

| row of table 9 | flags beside these | FILE, of |
| VGG-16 LargeFOV, full resolution | `--model vgg-largefov` | VGG-16, ImageNet |
| ResNet-101, LargeFOV, ASPP | `--model resnet-plain`, `resnet-largefov`, `resnet-aspp` | ResNet-101, ImageNet |
| Aug | `--augment` | |
| + CRF | row "piecewise" of every run, "dcnn" is without | |

Trained on the 2975 images of train, scored on the 500 of val; --submission writes the 1525 of test, as labelIds for the
server. No three scales, COCO or coarse labels, as in the paper; its half resolution is not here. For --resume, torchrun
and what else is not as in the paper see voc_deeplab_v2.py.

| setting | here | the paper |
| parameters of the CRF | best on 100 images held out of train, and so not trained on | best on 100 of val, for VOC |
| crop | 513 | not said |
| rates, batch, iterations | as for VOC | not said |
| image at test | whole; --tile: in overlapping tiles, a quarter shared | overlapping tiles; sizes not said |

Nobody has run this recipe on Cityscapes here yet: no scores of ours to print.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from crfnet import weights
from crfnet.data import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    DEEPLAB_SCALES,
    Crop,
    Samples,
    cityscapes_files,
    cityscapes_images,
    cityscapes_labels,
    hold_out,
)
from crfnet.evaluation import evaluate
from crfnet.inputs import whole_number
from crfnet.losses import at_scores
from crfnet.models import Averaged, Tiled, WithCRF, deeplab_v2
from crfnet.optim import parameter_groups, poly_policy
from crfnet.piecewise import fit
from crfnet.processes import on_first, rank, start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.submission import check_cityscapes_test, write_cityscapes_test
from crfnet.training import Settings, train
from crfnet.tuning import DEEPLAB_V2_GRID, Grid

L = len(CITYSCAPES_CLASSES)
RATES = {"vgg": 1e-3, "resnet": 2.5e-4}  # unpublished for Cityscapes, as is all below that names VOC
BATCHES = {"vgg": (10, 1), "resnet": (1, 10)}  # images a pass, passes a step


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/cityscapes"  # with leftImg8bit and gtFine
    weights: str = "data/ResNet-101-model.caffemodel"  # to start from: Caffe's, torchvision's, ours; "" for none
    keep: tuple[str, ...] = ()  # parameters that start anew all the same: head.* for weights of other classes
    out: str = "runs/cityscapes_deeplab"
    submission: str = ""  # folder for the label maps of the test images
    model: Literal["vgg-largefov", "resnet-plain", "resnet-largefov", "resnet-aspp"] = "resnet-aspp"
    stride_on: Literal["reduce", "conv3x3"] = "reduce"  # of ResNet-101: conv3x3 for torchvision's weights
    augment: bool = False  # crops of images at a scale by chance, 0.5 to 1.5
    learning_rate: float = 0.0  # 0: VOC's, 1e-3 for VGG-16, 2.5e-4 for ResNet-101
    batch_size: int = 0  # 0: VOC's, 10 for VGG-16, 1 for ResNet-101
    accumulate: int = 0  # batches a step; 0: VOC's, 1 and 10
    iterations: int = 20_000  # VOC's
    crop: int = 513  # ours: half the height, a quarter of the width
    tile: int = 0  # height and width of the tiles at test; 0: the whole image at once
    average: bool = False  # scores, and submits, the mean over five scales and mirror images too
    held_out: int = 100  # images of train for the CRF, 190 MB each in memory; 0: trains on all and has no CRF
    # VOC's, with sigma_alpha for images four times as wide; not published
    grid: Grid = replace(DEEPLAB_V2_GRID, theta_alpha=(30.0, 110.0, 400.0))
    autocast: bool = False  # training in bfloat16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 4
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 1000
    tensorboard: bool = False  # writes the log for TensorBoard too
    validate_every: int = 5000


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains the DCNN and fits its CRF; returns the scores of both."""
    device, kind = start(config.device), config.model.split("-")[0]
    whole_number("tile", config.tile, 0)
    out = begin(config, free=("average",))
    torch.manual_seed(config.seed)

    # data; 10 is DeepLab's seed
    files = cityscapes_files(config.root, "train")
    test = cityscapes_images(config.root, "test") if config.submission else []
    if test:
        on_first(lambda: check_cityscapes_test(test, config.submission))
    kept, rest = hold_out(files, config.held_out, seed=10)
    read = partial(Samples, num_classes=L, read_labels=cityscapes_labels, seed=config.seed)
    held_out, val = read(kept), read(cityscapes_files(config.root, "val"))
    crop = Crop((config.crop, config.crop), scales=DEEPLAB_SCALES if config.augment else ())

    def tiled(network: nn.Module) -> nn.Module:
        return Tiled(network, config.tile) if config.tile else network

    # 1. the DCNN; the rates of biases and scores are 2, 10 and 20 times the trunk's, decay is 5e-4
    dcnn = deeplab_v2(config.model, L, stride_on=config.stride_on).to(device)
    if config.weights:
        loaded = weights.load(dcnn, config.weights, keep=config.keep)
        if not rank():
            print(loaded, flush=True)
    images, passes = BATCHES[kind]
    train(
        dcnn,
        read(rest, transform=crop),
        at_scores,
        torch.optim.SGD(parameter_groups(dcnn, config.learning_rate or RATES[kind]), momentum=0.9),
        poly_policy(config.iterations),
        Settings(
            config.iterations, config.batch_size or images, config.accumulate or passes, seed=config.seed,
            workers=config.workers, autocast=torch.bfloat16 if config.autocast else None, freeze_norm=True,
            checkpoint_every=config.checkpoint_every, validate_every=config.validate_every,
            tensorboard=config.tensorboard,
        ),
        folder=out / "dcnn", resume=config.resume, progress=bar("DCNN"),
        validate=(lambda judged: evaluate(tiled(judged), held_out, device=device)) if kept else None,
    )  # fmt: skip
    report = Report(out, val, names=CITYSCAPES_CLASSES, palette=CITYSCAPES_PALETTE, device=device)
    report.add("dcnn", tiled(dcnn))
    if not rank():
        weights.save(dcnn, out / "dcnn.safetensors")

    # 2. piecewise: the CRF that does best on the held-out images
    best = tiled(dcnn)
    if kept:
        best, _ = fit(best, held_out, config.grid, out, count=len(held_out), device=device, resume=config.resume)
        report.add("piecewise", best)
        if not rank():
            weights.save(WithCRF(dcnn, best.crf), out / "piecewise.safetensors")  # tiles are no part of a network
    if config.average:
        best = Averaged(best)
        report.add("averaged", best)
    report.write()
    if test and not rank():
        write_cityscapes_test(best, test, config.submission, device=device)
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"cityscapes_deeplab.py: {error}")
