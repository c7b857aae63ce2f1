"""FCN on NYUDv2 with 40 classes: colour, depth and HHA, fused early or late (arXiv:1411.4038, table 4).

    python recipes/nyud_fcn.py --root nyud --vgg16 VGG_ILSVRC_16_layers.caffemodel
    python recipes/nyud_fcn.py --root nyud --vgg16 VGG_ILSVRC_16_layers.caffemodel --rows colour hha colour-hha

Trained on the 795 images of train and val, scored on the 654 of test. Mean IoU of the paper's nets:

| row            | network                                                        | mean IoU |
| colour         | FCN-32s                                                        | 29.2     |
| colour-depth   | FCN-32s of four channels (early fusion), depth as its logarithm | 30.5    |
| hha            | FCN-32s of HHA: disparity, height above the floor, angle       | 24.2     |
| colour-hha     | FCN-32s, those of colour and HHA with their scores averaged    | 32.8     |
| colour-hha-16s | FCN-16s, likewise                                              | 34.0     |

The settings are those of the released solvers (shelhamer/fcn.berkeleyvision.org, nyud-fcn32s-*/solver.prototxt):

| setting       | here                                | the paper (section 4.3)      |
| batch         | 1 whole image                       | 20                           |
| loss          | sum over pixels                     | mean                         |
| momentum      | 0.99                                | 0.9                          |
| learning rate | 1e-10, colour-hha 1e-12             | 1e-4, a hundredth each stage |
| deconvolution | fixed                               | 2x ones learnt               |
| order         | each image once an epoch            | its code: with replacement   |

The 16s was never released. Nobody has run this recipe on NYUDv2 here yet: no scores of ours to print.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from crfnet import weights
from crfnet.data import (
    NYUD_CLASSES,
    Crop,
    Samples,
    nyud_files,
    nyud_labels,
    read_colour_depth,
    read_colour_hha,
    read_hha,
)
from crfnet.data.samples import ImageReader, read_rgb
from crfnet.evaluation import evaluate
from crfnet.losses import full_resolution
from crfnet.models import NYUD_COLOUR, NYUD_COLOUR_DEPTH, NYUD_HHA, FCN32s, LateFusionFCN, start_from
from crfnet.optim import fixed_policy, parameter_groups
from crfnet.processes import start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.training import Settings, train


class Row(NamedTuple):
    """A row of the table."""

    build: Callable[[], nn.Module]
    read_image: ImageReader
    also: tuple[str, ...]  # folders beside the images
    learning_rate: float
    starts_from: tuple[str, ...] = ()  # rows; VGG-16 where there are none


LATE = (read_colour_hha, ("hha",))
ROWS = {
    "colour": Row(partial(FCN32s, 40, convention=NYUD_COLOUR), read_rgb, (), 1e-10),
    "colour-depth": Row(partial(FCN32s, 40, convention=NYUD_COLOUR_DEPTH), read_colour_depth, ("depth",), 1e-10),
    "hha": Row(partial(FCN32s, 40, convention=NYUD_HHA), read_hha, ("hha",), 1e-10),
    "colour-hha": Row(partial(LateFusionFCN, 40), *LATE, 1e-12, ("colour", "hha")),
    # nothing is published: a hundredth of the stage before, as for VOC
    "colour-hha-16s": Row(partial(LateFusionFCN, 40, stride=16), *LATE, 1e-14, ("colour-hha",)),
}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/nyud"
    vgg16: str = "data/VGG_ILSVRC_16_layers.caffemodel"  # ImageNet's weights, Caffe's or torchvision's; "" for none
    out: str = "runs/nyud_fcn"
    rows: tuple[Literal["colour", "colour-depth", "hha", "colour-hha", "colour-hha-16s"], ...] = (
        "colour", "colour-depth", "hha", "colour-hha", "colour-hha-16s",
    )  # fmt: skip
    iterations: int = 300_000  # of each row, the solvers'
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 1337
    resume: bool = False
    checkpoint_every: int = 2000
    tensorboard: bool = False  # writes the log for TensorBoard too
    validate_every: int = 20_000


def initialise(network: nn.Module, row: str, config: Config) -> None:
    """Copies into a network what its row starts from: VGG-16, or the nets of other rows."""
    nets: dict[str, Any] = {name: ROWS[name].build() for name in ROWS[row].starts_from}
    for name, net in nets.items():
        weights.load(net, Path(config.out) / f"{name}.safetensors")
    if row == "colour-hha":
        both: Any = network
        for name, net in nets.items():
            both.preprocess[name].load_state_dict(net.preprocess.state_dict())
            both.trunk[name].load_state_dict(net.trunk.state_dict())
            both.head[name].score_fr.load_state_dict(net.head.score_fr.state_dict())
    elif nets:
        print("new:", ", ".join(start_from(network, nets["colour-hha"])))
    elif config.vgg16:
        print(weights.load(network, config.vgg16))


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains and scores the rows one after the other; returns their scores."""
    device = start(config.device)
    out = Path(config.out)
    if not config.rows:
        raise ValueError(f"rows must be at least one of {', '.join(ROWS)}, got none")
    files = {}  # of all rows: what is missing is said before the first is trained
    for place, row in enumerate(config.rows):
        files[row] = [nyud_files(config.root, split, also=ROWS[row].also) for split in ("trainval", "test")]
        for other in ROWS[row].starts_from:
            if other not in config.rows[:place] and not (out / f"{other}.safetensors").is_file():
                raise FileNotFoundError(
                    f"row {row!r} starts from {other!r}: put it before that in --rows, or {other}.safetensors in {out}"
                )
    begin(config, free=("rows",), stages=config.rows)
    pictures = Samples(nyud_files(config.root, "test"), 40, read_labels=nyud_labels)
    report = Report(out, pictures, names=NYUD_CLASSES, device=device)
    for row, (train_files, test_files) in files.items():
        read = partial(Samples, num_classes=40, read_image=ROWS[row].read_image, read_labels=nyud_labels)
        torch.manual_seed(config.seed)
        network = ROWS[row].build()
        initialise(network, row, config)
        network.to(device)
        groups = parameter_groups(network, ROWS[row].learning_rate, head_factor=1)  # lr_mult 1 / 2 everywhere
        train(
            network,
            read(train_files, transform=Crop(None, mirror=False)),
            partial(full_resolution, normalize=False),
            torch.optim.SGD(groups, momentum=0.99),
            fixed_policy(),
            Settings(
                config.iterations, seed=config.seed, workers=config.workers, checkpoint_every=config.checkpoint_every,
                tensorboard=config.tensorboard, validate_every=config.validate_every,
            ),
            folder=out / row, resume=config.resume, progress=bar(row),
            validate=partial(evaluate, samples=read(test_files), device=device),
        )  # fmt: skip
        weights.save(network, out / f"{row}.safetensors")
        report.add(row, network, read(test_files))
    report.write()
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"nyud_fcn.py: {error}")
