"""FCN on SIFT Flow: 33 semantic and 3 geometric labels by one network (arXiv:1411.4038, table 5).

    python recipes/siftflow_fcn.py --root siftflow --vgg16 VGG_ILSVRC_16_layers.caffemodel --last 16s

32s from VGG-16, 16s from 32s, 8s from 16s, trained on the 2486 images of trainval.txt that are annotated, scored on the
200 of test.txt. Means run over the classes that occur there, which cow, desert and moon do not. The settings are those
of the released solvers (shelhamer/fcn.berkeleyvision.org, siftflow-fcn*/solver.prototxt):

| setting       | here                  | the paper (section 4.3)                    |
| batch         | 1 whole image         | 20                                         |
| loss          | sum, of both tasks    | mean                                       |
| momentum      | 0.99                  | 0.9                                        |
| learning rate | 1e-10, 1e-12, 1e-12   | 1e-4, a hundredth each stage               |
| deconvolution | fixed                 | 2x ones learnt                             |
| order         | each image once an epoch | its code: with replacement                 |
| last net      | 8s                    | 16s; 8s in the journal's version           |

| published | semantic pixel accuracy | mean accuracy | mean IoU | frequency-weighted IoU | geometric pixel accuracy |
| FCN-16s   | 85.2                    | 51.7          | 39.5     | 76.1                   | 94.3                     |

Nobody has run this recipe on SIFT Flow here yet: no scores of ours to print.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from crfnet import weights
from crfnet.data import SIFTFLOW_CLASSES, SIFTFLOW_GEOMETRIC, Crop, Samples, siftflow_files, siftflow_labels
from crfnet.evaluation import evaluate
from crfnet.images import Uint8
from crfnet.losses import both_labellings
from crfnet.models import SiftFlowFCN, start_from
from crfnet.optim import fixed_policy, parameter_groups
from crfnet.processes import start
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.training import Settings, train

RATES = {"32s": 1e-10, "16s": 1e-12, "8s": 1e-12}  # VOC's 8s has 1e-14
STRIDES = {"32s": 32, "16s": 16, "8s": 8}
TASKS = {"semantic": SIFTFLOW_CLASSES, "geometric": SIFTFLOW_GEOMETRIC}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/siftflow"
    vgg16: str = "data/VGG_ILSVRC_16_layers.caffemodel"  # ImageNet's weights, Caffe's or torchvision's; "" for none
    out: str = "runs/siftflow_fcn"
    last: Literal["32s", "16s", "8s"] = "8s"  # the net to end with
    iterations: int = 300_000  # of each stage, the solvers'
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    seed: int = 1337
    resume: bool = False
    checkpoint_every: int = 2000
    tensorboard: bool = False  # writes the log for TensorBoard too
    validate_every: int = 20_000


class Task(nn.Module):
    """The logits of one task."""

    def __init__(self, network: nn.Module, task: str) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, image: Tensor) -> Tensor:
        """``(B, 33, H, W)`` or ``(B, 3, H, W)``."""
        logits: Tensor = getattr(self.network(image), self.task)
        return logits


def labels_of(path: Path, task: str) -> Uint8:
    """One of the two labellings, (H, W)."""
    return siftflow_labels(path)[list(TASKS).index(task)]


def main(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """Trains the nets one after the other; returns the scores of each task and net."""
    device = start(config.device)
    out = begin(config, free=("last",))
    torch.manual_seed(config.seed)
    train_files, test_files = siftflow_files(config.root, "trainval"), siftflow_files(config.root, "test")
    train_set = Samples(train_files, 33, read_labels=siftflow_labels, transform=Crop(None, mirror=False))
    test = {task: Samples(test_files, len(TASKS[task]), read_labels=partial(labels_of, task=task)) for task in TASKS}
    reports = {task: Report(out / task, test[task], names=TASKS[task], device=device) for task in TASKS}

    def judge(network: nn.Module) -> dict[str, float]:
        found = {task: evaluate(Task(network, task), test[task], device=device) for task in TASKS}
        return {f"{task} {name}": value for task, values in found.items() for name, value in values.items()}

    network: SiftFlowFCN | None = None
    for stage in list(STRIDES)[: list(STRIDES).index(config.last) + 1]:
        finer = SiftFlowFCN(stride=STRIDES[stage])
        if network is None and config.vgg16:
            print(weights.load(finer, config.vgg16))
        elif network is not None:
            print("new:", ", ".join(start_from(finer, network)))
        network = finer.to(device)
        groups = parameter_groups(network, RATES[stage], head_factor=1)  # lr_mult 1 / 2 everywhere
        train(
            network,
            train_set,
            partial(both_labellings, normalize=False),
            torch.optim.SGD(groups, momentum=0.99),
            fixed_policy(),
            Settings(
                config.iterations, seed=config.seed, workers=config.workers, checkpoint_every=config.checkpoint_every,
                tensorboard=config.tensorboard, validate_every=config.validate_every,
            ),
            folder=out / stage, resume=config.resume, validate=judge, progress=bar(f"FCN-{stage}"),
        )  # fmt: skip
        weights.save(network, out / f"siftflow-fcn{stage}.safetensors")
        for task, report in reports.items():
            report.add(f"{task} {stage}", Task(network, task))
    for report in reports.values():
        report.write()
    return {task: report.scores for task, report in reports.items()}


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"siftflow_fcn.py: {error}")
