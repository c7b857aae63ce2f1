"""DeepLab v2 on PASCAL-Person-Part: six parts of persons, background, then its dense CRF (arXiv:1606.00915, table 7).

    python recipes/person_part.py --root PASCAL-Part --voc VOCdevkit --weights FILE ...

| row of table 7 | flags beside these | FILE, of |
| ResNet-101, LargeFOV, ASPP | `--model resnet-plain`, `resnet-largefov`, `resnet-aspp` | ResNet-101, ImageNet |
| MSC, Aug | `--multi-scale`, `--augment` | |
| COCO | | ResNet-101, on COCO as well: deeplabv1_resnet101-coco.pth |
| + CRF | row "piecewise" of every run, "dcnn" is without | |

Trained on the 1716 images of train with persons, scored on the 1817 of val. Lists: DeepLab's folder
pascal_person_part_trainval_list beside Annotations_Part, or those that crfnet.data.write_person_part_lists writes once.
For --resume, torchrun and what else is not as in the paper see voc_deeplab_v2.py.

| setting | here | the paper |
| parameters of the CRF | best on 100 images held out of train, and so not trained on | best on 100 of val, for VOC |
| crop, rate, batch, iterations | as for VOC | not said |

Nobody has run this recipe on PASCAL-Person-Part here yet: no scores of ours to print.
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
    PERSON_PART_CLASSES,
    Crop,
    Samples,
    hold_out,
    person_part_files,
    person_part_labels,
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

L = len(PERSON_PART_CLASSES)


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/PASCAL-Part"  # with Annotations_Part and the lists
    voc: str = ""  # VOC 2010; "" where it lies in root
    weights: str = "data/deeplabv1_resnet101-coco.pth"  # to start from: Caffe's, torchvision's, ours; "" for none
    keep: tuple[str, ...] = ()  # parameters that start anew all the same: head.* for weights of other classes
    out: str = "runs/person_part"
    model: Literal["resnet-plain", "resnet-largefov", "resnet-aspp"] = "resnet-plain"
    stride_on: Literal["reduce", "conv3x3"] = "reduce"  # conv3x3 for torchvision's weights
    multi_scale: bool = False  # the network on the image at 1, 0.75 and 0.5, the largest of the scores
    augment: bool = False  # crops of images at a scale by chance, 0.5 to 1.5
    learning_rate: float = 2.5e-4  # VOC's, as nothing is published for PASCAL-Person-Part
    batch_size: int = 1  # VOC's
    accumulate: int = 10  # batches a step; VOC's
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
    device = start(config.device)
    out = begin(config, free=("average",))
    torch.manual_seed(config.seed)

    # data; 10 is DeepLab's seed
    files, val_files = (person_part_files(config.root, split, voc=config.voc or None) for split in ("train", "val"))
    kept, rest = hold_out(files, config.held_out, seed=10)
    read = partial(Samples, num_classes=L, read_labels=person_part_labels, seed=config.seed)
    held_out, val = read(kept), read(val_files)
    crop = Crop((config.crop, config.crop), scales=DEEPLAB_SCALES if config.augment else ())

    # 1. the DCNN; the rates of biases and scores are 2, 10 and 20 times the trunk's, decay is 5e-4
    network = deeplab_v2(config.model, L, stride_on=config.stride_on).to(device)
    if config.weights:
        loaded = weights.load(network, config.weights, keep=config.keep)
        if not rank():
            print(loaded, flush=True)
    dcnn = MultiScale(network) if config.multi_scale else network
    train(
        dcnn,
        read(rest, transform=crop),
        multi_scale if config.multi_scale else at_scores,
        torch.optim.SGD(parameter_groups(dcnn, config.learning_rate), momentum=0.9),
        poly_policy(config.iterations),
        Settings(
            config.iterations, config.batch_size, config.accumulate, seed=config.seed,
            workers=config.workers, autocast=torch.bfloat16 if config.autocast else None, freeze_norm=True,
            checkpoint_every=config.checkpoint_every, validate_every=config.validate_every,
            tensorboard=config.tensorboard,
        ),
        folder=out / "dcnn", resume=config.resume, progress=bar("DCNN"),
        validate=partial(evaluate, samples=held_out, device=device) if kept else None,
    )  # fmt: skip
    report = Report(out, val, names=PERSON_PART_CLASSES, device=device)
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
        sys.exit(f"person_part.py: {error}")
