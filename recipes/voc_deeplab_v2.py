"""DeepLab v2 on PASCAL VOC 2012: a DCNN on train_aug, then its dense CRF (arXiv:1606.00915, section 4.1).

    python recipes/voc_deeplab_v2.py --voc VOCdevkit --sbd benchmark_RELEASE --weights FILE ...

| table | flags beside these | FILE, of |
| 2 | `--model vgg-largefov`; `--policy step`, `--batch-size 30`, `--iterations 6000` by row | VGG-16, ImageNet |
| 3 | `--model vgg-largefov`, `vgg-aspp-s`, `vgg-aspp-l` | VGG-16, ImageNet |
| 4 | `--model resnet-plain`, `resnet-largefov`, `resnet-aspp` | ResNet-101, ImageNet |
| 4 | with `--multi-scale` (MSC), with `--augment` (Aug) | with COCO: deeplabv1_resnet101-coco.pth |

Every run scores val before and after the CRF: rows "dcnn" and "piecewise" of results.json and report.md. A run that was
stopped goes on with --resume. Under torchrun a batch is shared: a ResNet on 2 GPUs, `--batch-size 2 --accumulate 5`.

| setting | here | the paper; its code, where that says otherwise |
| parameters of the CRF | best on 100 images held out of train, and so not trained on | best on 100 images of val |
| Aug | one of the scales 0.5, 0.75, 1, 1.25, 1.5 | "from 0.5 to 1.5"; as here |
| loss | mean over labelled pixels; MSC adds four | sum; as here |
| channels of VGG-16's fc6, fc7 | every fourth | 1024 by chance |
| image at test | whole, padded to 8 k + 1 pixels, MSC to 32 k + 1 | not said; padded to 513 |

Nobody has run this recipe on VOC here yet: no scores of ours to print.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from crfnet import weights
from crfnet.data import DEEPLAB_SCALES, VOC_CLASSES, Crop, Samples, hold_out, voc_files, voc_images, write_train_aug
from crfnet.evaluation import evaluate
from crfnet.losses import at_scores, multi_scale
from crfnet.models import Averaged, DeepLabV2Name, MultiScale, deeplab_v2
from crfnet.optim import parameter_groups, poly_policy, step_policy
from crfnet.piecewise import fit
from crfnet.processes import on_first, rank, start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.submission import check_voc_test, write_voc_test
from crfnet.training import Settings, train
from crfnet.tuning import DEEPLAB_V2_GRID, Grid

L = len(VOC_CLASSES)
RATES = {"vgg": 1e-3, "resnet": 2.5e-4}  # arXiv:1606.00915, sections 4.1.1 and 4.1.2
BATCHES = {"vgg": (10, 1), "resnet": (1, 10)}  # images a pass, passes a step: table 2; the released solver


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    voc: str = "data/VOCdevkit"
    sbd: str = ""  # benchmark_RELEASE: adds train_aug to the folder of VOC first; "" where it has it
    weights: str = "data/deeplabv1_resnet101-coco.pth"  # to start from: Caffe's, torchvision's, ours; "" for none
    keep: tuple[str, ...] = ()  # parameters that start anew all the same: head.* for weights of other classes
    out: str = "runs/voc_deeplab_v2"
    submission: str = ""  # folder for the label maps of the test images
    model: DeepLabV2Name = "resnet-aspp"
    stride_on: Literal["reduce", "conv3x3"] = "reduce"  # of ResNet-101: conv3x3 for torchvision's weights
    multi_scale: bool = False  # the network on the image at 1, 0.75 and 0.5, the largest of the scores
    augment: bool = False  # crops of images at a scale by chance, 0.5 to 1.5
    policy: Literal["poly", "step"] = "poly"  # power 0.9; a tenth every 2000 iterations
    learning_rate: float = 0.0  # 0: 1e-3 for VGG-16, 2.5e-4 for ResNet-101
    batch_size: int = 0  # 0: 10 for VGG-16, 1 for ResNet-101
    accumulate: int = 0  # batches a step; 0: 1 and 10
    iterations: int = 20_000
    crop: int = 321  # the released prototxts
    average: bool = False  # scores, and submits, the mean over five scales and mirror images too
    held_out: int = 100  # images of train for the CRF; 0: trains on all and has no CRF
    grid: Grid = DEEPLAB_V2_GRID
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
    if config.sbd:
        on_first(lambda: write_train_aug(config.voc, config.sbd))

    # data: held out are images of VOC's own, whose masks are finer than SBD's; 10 is DeepLab's seed
    files, test = voc_files(config.voc, "train_aug"), voc_images(config.voc, "test") if config.submission else []
    if test:
        on_first(lambda: check_voc_test(test, config.submission))
    kept, _ = hold_out(voc_files(config.voc, "train"), config.held_out, seed=10)
    names = {image.stem for image, _ in kept}
    rest = [pair for pair in files if pair[0].stem not in names]
    read = partial(Samples, num_classes=L, seed=config.seed)
    held_out, val = read(kept), read(voc_files(config.voc, "val"))
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
        poly_policy(config.iterations) if config.policy == "poly" else step_policy(2000),
        Settings(
            config.iterations, config.batch_size or images, config.accumulate or passes, seed=config.seed,
            workers=config.workers, autocast=torch.bfloat16 if config.autocast else None, freeze_norm=True,
            checkpoint_every=config.checkpoint_every, validate_every=config.validate_every,
            tensorboard=config.tensorboard,
        ),
        folder=out / "dcnn", resume=config.resume, progress=bar("DCNN"),
        validate=partial(evaluate, samples=held_out, device=device) if kept else None,
    )  # fmt: skip
    report = Report(out, val, names=VOC_CLASSES, device=device)
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
    if test and not rank():
        write_voc_test(best, test, config.submission, device=device)
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"voc_deeplab_v2.py: {error}")
