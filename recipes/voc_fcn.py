"""FCN on PASCAL VOC: 32s from VGG-16, 16s from 32s, 8s from 16s; or 8s at once (arXiv:1411.4038, table 2).

    python recipes/voc_fcn.py --voc VOCdevkit --sbd benchmark_RELEASE --vgg16 VGG_ILSVRC_16_layers.caffemodel
    python recipes/voc_fcn.py --voc VOCdevkit --sbd benchmark_RELEASE --vgg16 vgg16-397923af.pth --at-once

Trained on SBD's 8498 images, scored on the 736 of VOC 2011 val that are not among them (seg11valid). The settings are
those of the released solvers (shelhamer/fcn.berkeleyvision.org, voc-fcn*/solver.prototxt), where paper and code differ:

| setting       | here                          | the paper (section 4.3)       |
| batch         | 1 whole image                 | 20                            |
| loss          | sum over pixels               | mean                          |
| momentum      | 0.99                          | 0.9                           |
| learning rate | 1e-10, 1e-12, 1e-14           | 1e-4, a hundredth each stage  |
| deconvolution | fixed                         | 2x ones learnt                |
| order         | each image once an epoch      | its code: with replacement    |

No image is resized, cropped or mirrored. Mean IoU of the paper's nets: 59.4, 62.4, 62.7; of the released: 63.6, 65.0,
65.5, at once 65.4. Nobody has run this recipe on VOC here yet: no scores of ours to print.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from crfnet import weights
from crfnet.data import VOC_CLASSES, Crop, Samples, sbd_files, sbd_labels, seg11valid_files, voc_images
from crfnet.evaluation import evaluate
from crfnet.losses import full_resolution
from crfnet.models import FCN8s, FCN16s, FCN32s, start_from
from crfnet.optim import fixed_policy, parameter_groups
from crfnet.processes import start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.submission import check_voc_test, write_voc_test
from crfnet.training import Settings, train

STAGES = ["32s", "16s", "8s"]
NETS: dict[str, Callable[[int], nn.Module]] = {
    "32s": FCN32s, "16s": FCN16s, "8s": FCN8s, "8s-atonce": partial(FCN8s, at_once=True),
}  # fmt: skip
RATES = {"32s": 1e-10, "16s": 1e-12, "8s": 1e-14, "8s-atonce": 1e-10}
ITERATIONS = {"32s": 100_000, "16s": 100_000, "8s": 100_000, "8s-atonce": 300_000}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    voc: str = "data/VOCdevkit"  # with VOC 2011
    sbd: str = "data/benchmark_RELEASE"
    vgg16: str = "data/VGG_ILSVRC_16_layers.caffemodel"  # ImageNet's weights, Caffe's or torchvision's; "" for none
    out: str = "runs/voc_fcn"
    submission: str = ""  # folder for the last net's label maps of VOC 2011's test images
    last: Literal["32s", "16s", "8s"] = "8s"  # the net to end with
    at_once: bool = False  # 8s in one go
    iterations: int = 0  # of each stage; 0: the solvers'
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 1337
    resume: bool = False
    checkpoint_every: int = 2000
    tensorboard: bool = False  # writes the log for TensorBoard too
    validate_every: int = 20_000


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains the nets one after the other; returns the scores of each."""
    device = start(config.device)
    out = begin(config, free=("last",))
    torch.manual_seed(config.seed)
    test = voc_images(config.voc, "test", year=2011) if config.submission else []
    if test:
        check_voc_test(test, config.submission, year=2011)
    read = partial(Samples, num_classes=21)
    train_set = read(sbd_files(config.sbd, "train"), read_labels=sbd_labels, transform=Crop(None, mirror=False))
    val = read(seg11valid_files(config.voc, config.sbd))
    report = Report(out, val, names=VOC_CLASSES, device=device)
    network: nn.Module | None = None
    for stage in ["8s-atonce"] if config.at_once else STAGES[: STAGES.index(config.last) + 1]:
        finer = NETS[stage](21)
        if network is None and config.vgg16:
            print(weights.load(finer, config.vgg16))
        elif network is not None:
            print("new:", ", ".join(start_from(finer, network)))
        network = finer.to(device)
        groups = parameter_groups(network, RATES[stage], head_factor=1)  # lr_mult 1 / 2 everywhere
        iterations = config.iterations or ITERATIONS[stage]
        train(
            network,
            train_set,
            partial(full_resolution, normalize=False),
            torch.optim.SGD(groups, momentum=0.99),
            fixed_policy(),
            Settings(
                iterations, seed=config.seed, workers=config.workers, checkpoint_every=config.checkpoint_every,
                tensorboard=config.tensorboard, validate_every=config.validate_every,
            ),
            folder=out / stage, resume=config.resume, progress=bar(f"FCN-{stage}"),
            validate=partial(evaluate, samples=val, device=device),
        )  # fmt: skip
        weights.save(network, out / f"fcn{stage}.safetensors")
        report.add(stage, network)
    report.write()
    if test and network is not None:
        write_voc_test(network, test, config.submission, year=2011, device=device)
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"voc_fcn.py: {error}")
