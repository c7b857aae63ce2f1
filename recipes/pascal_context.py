"""DeepLab v2 on PASCAL-Context: 59 classes and background, then its dense CRF (arXiv:1606.00915, table 6).

    python recipes/pascal_context.py --root PASCAL-Context --voc VOCdevkit --weights FILE ...
    python recipes/pascal_context.py --root PASCAL-Context --voc VOCdevkit --weights FILE --classes 33_labels.txt ...

| row of table 6 | flags beside these | FILE, of |
| VGG-16 LargeFOV | `--model vgg-largefov` | VGG-16, ImageNet |
| ResNet-101, LargeFOV, ASPP | `--model resnet-plain`, `resnet-largefov`, `resnet-aspp` | ResNet-101, ImageNet |
| MSC, Aug | `--multi-scale`, `--augment` | |
| COCO | | ResNet-101, on COCO as well: deeplabv1_resnet101-coco.pth |
| + CRF | row "piecewise" of every run, "dcnn" is without | |

Trained on the 4998 images of train, scored on the 5105 of val. Whatever is none of the classes is background, which is
trained and scored as a class. --classes takes a file of other names, lines `index: name`, such as the data set's 33.
For --resume, torchrun and what else is not as in the paper see voc_deeplab_v2.py.

| setting | here | the paper |
| parameters of the CRF | best on 100 images held out of train, and so not trained on | best on 100 of val, for VOC |
| crop, rates, batch, iterations | as for VOC | not said |

Nobody has run this recipe on PASCAL-Context here yet: no scores of ours to print.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from crfnet import weights
from crfnet.data import (
    DEEPLAB_SCALES,
    Crop,
    Samples,
    hold_out,
    pascal_context_classes,
    pascal_context_files,
    pascal_context_labels,
)
from crfnet.evaluation import evaluate
from crfnet.losses import at_scores, multi_scale
from crfnet.models import Averaged, MultiScale, deeplab_v2
from crfnet.optim import parameter_groups, poly_policy
from crfnet.piecewise import fit
from crfnet.processes import rank, start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.training import Settings, train
from crfnet.tuning import DEEPLAB_V2_GRID, Grid

RATES = {"vgg": 1e-3, "resnet": 2.5e-4}  # unpublished for PASCAL-Context, as is all below that names VOC
BATCHES = {"vgg": (10, 1), "resnet": (1, 10)}  # images a pass, passes a step


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/PASCAL-Context"  # with trainval and labels.txt
    voc: str = ""  # VOC 2010; "" where it lies in root
    classes: str = ""  # file of names; "" for the 59
    weights: str = "data/deeplabv1_resnet101-coco.pth"  # to start from: Caffe's, torchvision's, ours; "" for none
    keep: tuple[str, ...] = ()  # parameters that start anew all the same: head.* for weights of other classes
    out: str = "runs/pascal_context"
    model: Literal["vgg-largefov", "resnet-plain", "resnet-largefov", "resnet-aspp"] = "resnet-aspp"
    stride_on: Literal["reduce", "conv3x3"] = "reduce"  # of ResNet-101: conv3x3 for torchvision's weights
    multi_scale: bool = False  # the network on the image at 1, 0.75 and 0.5, the largest of the scores
    augment: bool = False  # crops of images at a scale by chance, 0.5 to 1.5
    learning_rate: float = 0.0  # 0: VOC's, 1e-3 for VGG-16, 2.5e-4 for ResNet-101
    batch_size: int = 0  # 0: VOC's, 10 for VGG-16, 1 for ResNet-101
    accumulate: int = 0  # batches a step; 0: VOC's, 1 and 10
    iterations: int = 20_000  # VOC's
    crop: int = 321  # VOC's
    average: bool = False  # scores the mean over five scales and mirror images too
    held_out: int = 100  # images of train for the CRF; 0: trains on all and has no CRF
    grid: Grid = DEEPLAB_V2_GRID  # VOC's
    autocast: bool = False  # training in bfloat16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 1000
    tensorboard: bool = False  # writes the log for TensorBoard too
    validate_every: int = 2000


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains the DCNN and fits its CRF; returns the scores of both."""
    device, kind = start(config.device), config.model.split("-")[0]
    out = begin(config, free=("average",))
    torch.manual_seed(config.seed)

    # data; 10 is DeepLab's seed
    names = pascal_context_classes(config.classes or None)
    L = len(names)
    files, val_files = (pascal_context_files(config.root, split, voc=config.voc or None) for split in ("train", "val"))
    kept, rest = hold_out(files, config.held_out, seed=10)
    read_labels = partial(pascal_context_labels, classes=config.classes or None)
    read = partial(Samples, num_classes=L, read_labels=read_labels, seed=config.seed)
    held_out, val = read(kept), read(val_files)
    crop = Crop((config.crop, config.crop), scales=DEEPLAB_SCALES if config.augment else ())

    # 1. the DCNN; the rates of biases and scores are 2, 10 and 20 times the trunk's, decay is 5e-4
    network = deeplab_v2(config.model, L, stride_on=config.stride_on).to(device)
    if config.weights:
        loaded = weights.load(network, config.weights, keep=config.keep)
        if not rank():
            print(loaded, flush=True)
    dcnn = MultiScale(network) if config.multi_scale else network
    images, passes = BATCHES[kind]
    train(
        dcnn,
        read(rest, transform=crop),
        multi_scale if config.multi_scale else at_scores,
        torch.optim.SGD(parameter_groups(dcnn, config.learning_rate or RATES[kind]), momentum=0.9),
        poly_policy(config.iterations),
        Settings(
            config.iterations, config.batch_size or images, config.accumulate or passes, seed=config.seed,
            workers=config.workers, autocast=torch.bfloat16 if config.autocast else None, freeze_norm=True,
            checkpoint_every=config.checkpoint_every, validate_every=config.validate_every,
            tensorboard=config.tensorboard,
        ),
        folder=out / "dcnn", resume=config.resume, progress=bar("DCNN"),
        validate=partial(evaluate, samples=held_out, device=device) if kept else None,
    )  # fmt: skip
    report = Report(out, val, names=names, device=device)
    report.add("dcnn", dcnn)
    if not rank():
        weights.save(network, out / "dcnn.safetensors")

    # 2. piecewise: the CRF that does best on the held-out images
    best: nn.Module = dcnn
    if kept:
        best, _ = fit(dcnn, held_out, config.grid, out, count=len(held_out), device=device, resume=config.resume)
        report.add("piecewise", best)
        if not rank():
            weights.save(best, out / "piecewise.safetensors")
    if config.average:
        best = Averaged(best)
        report.add("averaged", best)
    report.write()
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"pascal_context.py: {error}")
