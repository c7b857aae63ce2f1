"""The training loop of all recipes: SGD or any optimiser, some iterations, one loss, checkpoints to go on from.

    iteration = accumulate micro-batches → gradients averaged → clipped → one step → one step of the schedule

What an iteration sees depends on (seed, iteration) alone, and a checkpoint holds all else, so that a run which was
killed and resumed ends with the same bits on a CPU, and on a GPU as far as its kernels are deterministic
(``torch.use_deterministic_algorithms``). Under torchrun every process takes its part of each micro-batch, and gradients
are those of one process with all of it: losses are divided by the pixels of all processes, batch norm takes the
statistics of all, and dropout is each process's own.
"""

import csv
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crfnet import checkpoints
from crfnet.crf import DenseCRF
from crfnet.data import Samples
from crfnet.images import atomic_write
from crfnet.losses import Part
from crfnet.optim import Schedule, scheduler
from crfnet.order import loader
from crfnet.processes import add_up, gather, rank, world_size

Batch = Sequence[Tensor]  # images (B, G, H, W), labels (B, H, W) or (B, K, H, W), inside (B, H, W) bool
Loss = Callable[[nn.Module, Batch], list[Part]]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How long, how much at a time, and what is kept.

    Args:
        iterations: optimiser steps.
        batch_size: images of one forward pass, of all processes together.
        accumulate: forward passes a step, whose gradients are averaged (Caffe's ``iter_size``).
        seed: of the order of images; the crops' is that of the samples.
        workers: processes that read images.
        autocast: torch.bfloat16, or None for float32.
        clip_crf: largest norm of the gradient of all CRF parameters together; None does not clip.
        average: decay a step of an exponential moving average of the parameters; the averaged network is then the one
            that is validated and returned. 0 keeps none.
        freeze_norm: batch norm keeps its statistics, as for batches of one.
        checkpoint_every: iterations between checkpoints; 0 writes none.
        keep: checkpoints that stay.
        validate_every: iterations between rows of the log, each with a validation if there is one; 0 has one row, at
            the end.
        select: name of a metric, the higher the better: the network ends as it was at the best validation, the start's
            among them. "" takes the last.
        guard: name of a metric that must not fall below its value at the start, such as the mean IoU on training
            images: a validation where it does is not selected, and the log says so. If none is left, the network ends
            as it started. Needs ``select``.
        tensorboard: writes the log for TensorBoard as well.
    """

    iterations: int
    batch_size: int = 1
    accumulate: int = 1
    seed: int = 0
    workers: int = 0
    autocast: torch.dtype | None = None
    clip_crf: float | None = None
    average: float = 0.0
    freeze_norm: bool = False
    checkpoint_every: int = 0
    keep: int = 2
    validate_every: int = 0
    select: str = ""
    guard: str = ""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Checks."""
        if min(self.iterations, self.batch_size, self.accumulate, self.keep) < 1:
            raise ValueError(f"iterations, batch_size, accumulate and keep must be at least 1, got {self}")
        if min(self.checkpoint_every, self.validate_every, self.workers) < 0:
            raise ValueError(f"checkpoint_every, validate_every and workers must be 0 or more, got {self}")
        if self.clip_crf is not None and not self.clip_crf > 0:
            raise ValueError(f"clip_crf must be positive or None, got {self.clip_crf}")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be torch.bfloat16 or None, got {self.autocast}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must lie in [0, 1), got {self.average}")
        if self.guard and not self.select:
            raise ValueError(f"guard {self.guard!r} needs select: it says which validations may be chosen")


@dataclass
class Run:
    """What a training run came to.

    Attributes:
        history: the rows of its log; their learning rate is that of the optimiser's first group.
        best: with ``select``, the iteration, score and state dict (on the CPU) of the best validation.
        losses: of the iterations since the last row, which a checkpoint needs.
    """

    history: list[Metrics] = field(default_factory=list)
    best: dict[str, Any] | None = None
    losses: list[float] = field(default_factory=list)


def train(
    network: nn.Module,
    samples: Samples,
    loss: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    settings: Settings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    validate: Callable[[nn.Module], Metrics] | None = None,
    progress: Callable[[Iterator[int], int], Iterator[int]] | None = None,
    log: Callable[[str], None] = print,
) -> Run:
    """Trains ``network`` in place, and leaves it in evaluation mode.

    Args:
        network: on the device to train on.
        samples: what it learns from.
        loss: from the network (or its DistributedDataParallel) and a batch on its device to parts, each a sum and what
            it is divided by; :mod:`crfnet.losses` has the papers'.
        optimizer: over the network's parameters, with `crfnet.optim.parameter_groups`.
        schedule: iteration → factor of all learning rates.
        settings: the rest.
        folder: for checkpoints, log.csv and TensorBoard's files, the same for all processes; None writes no log.
        resume: go on from the newest checkpoint in ``folder``, if there is one. All settings on which results depend
            must be the same; ``iterations`` may be more, and how often what is written may differ.
        validate: metrics of a network in evaluation mode; called by every process.
        progress: wraps the iterations left, their number beside them, in a bar.
        log: takes a line of text a row of the log, and what else there is to say.

    Raises:
        ValueError: a loss or a parameter is not finite; the checkpoint before is still there. Or a checkpoint that does
            not fit, checkpoints in the folder of a run that does not resume, settings that contradict each other, a
            ``select`` or ``guard`` that ``validate`` does not measure, a guard that is NaN at the start.
        ImportError: ``settings.tensorboard`` without the package.
    """
    device = next(network.parameters()).device
    _check(samples, settings, folder, resume, validate is not None)
    if world_size() > 1 and not settings.freeze_norm:
        share_norm(network, device)
    steps = scheduler(optimizer, schedule)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.average)) if settings.average else None
    kept = {"network": network, "optimizer": optimizer, "scheduler": steps} | ({"average": average} if average else {})
    run, start, fixed = Run(), 0, _fixed(samples, optimizer, settings)
    if rank():
        torch.manual_seed(torch.initial_seed() + rank())  # or all processes would drop out the same features
        log, progress = _silent, None
    gather(None)  # the first process may still be writing the last checkpoint of a run before
    if resume and folder is not None and (state := checkpoints.newest(folder, device=device)) is not None:
        start = _restore(state, kept, fixed, schedule, settings, run)
        log(f"goes on from iteration {start}")
    if len(set(starts := gather(start))) > 1:
        raise ValueError(f"all processes must see the same checkpoints in {folder}, got those of iterations {starts}")
    board = _tensorboard(folder, start) if settings.tensorboard and folder is not None and not rank() else None
    crf = [p for module in network.modules() if isinstance(module, DenseCRF) for p in module.parameters()]
    model: nn.Module = network
    if world_size() > 1:
        model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    passes = settings.accumulate
    batches = iter(
        loader(
            samples, settings.batch_size, seed=settings.seed, start=start * passes, stop=settings.iterations * passes,
            workers=settings.workers, pin=device.type == "cuda",
        )
    )  # fmt: skip
    began = time.perf_counter() - (run.history[-1]["seconds"] if run.history else 0.0)
    iterations = iter(range(start, settings.iterations))

    def judge(done: int, row: Metrics) -> None:
        judged = (network if average is None else average.module).eval()
        # plain numbers, as a checkpoint of NumPy's would not load again
        metrics = {} if validate is None else {name: float(value) for name, value in validate(judged).items()}
        run.history.append({"iteration": done} | row | {"seconds": time.perf_counter() - began} | metrics)
        log(", ".join(f"{name} {value:.4g}" for name, value in run.history[-1].items()))
        _log(folder, run.history, board)
        if settings.select:
            _select(run, done, metrics, settings, judged, log)

    if settings.select and not run.history:
        judge(0, {})
    for iteration in iterations if progress is None else progress(iterations, settings.iterations - start):
        _train_mode(network, settings)
        done, rate = iteration + 1, float(steps.get_last_lr()[0])
        run.losses.append(_step(model, batches, loss, optimizer, settings, device, crf, done))
        steps.step()
        if average is not None:
            average.update_parameters(network)
        last = done == settings.iterations
        if last or (settings.validate_every and done % settings.validate_every == 0):
            row = {"loss": sum(run.losses) / len(run.losses), "learning_rate": rate}
            run.losses.clear()
            _want_finite(network, done)
            judge(done, row)
        if folder is not None and settings.checkpoint_every and (last or done % settings.checkpoint_every == 0):
            _write(folder, done, kept, fixed, settings, run)
    if board is not None:
        board.close()
    if run.best is not None:
        if not run.best["iteration"]:
            log(f"no validation was better than the start by {settings.select}: the network ends as it began")
        network.load_state_dict(run.best["network"])
    elif average is not None:
        network.load_state_dict(average.module.state_dict())
    network.eval()
    return run


def _step(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Loss,
    optimizer: Optimizer,
    settings: Settings,
    device: torch.device,
    crf: list[nn.Parameter],
    number: int,
) -> float:
    """One step of the optimiser; returns the loss of all processes."""
    optimizer.zero_grad()
    total = 0.0
    for micro in range(settings.accumulate):
        batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        waits = isinstance(model, DistributedDataParallel) and micro + 1 < settings.accumulate
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast is not None):
                parts = loss(model, batch)
            sums = torch.stack([value for value, _ in parts])
            counts = torch.stack([torch.as_tensor(count, device=device, dtype=torch.float32) for _, count in parts])
            add_up(counts)
            # the processes' gradients will be averaged, so each counts as all of them
            mean = (sums / counts.clamp_min(1)).sum() / settings.accumulate
            (mean * world_size()).backward()
        total += float(mean.detach())
    if world_size() > 1:
        total = float(add_up(torch.tensor(total, device=device)))
    if not math.isfinite(total):  # in all processes alike, before the parameters take it in
        raise ValueError(f"loss must be finite, got {total} at iteration {number}: a smaller learning rate?")
    if settings.clip_crf is not None and crf:
        nn.utils.clip_grad_norm_([p for p in crf if p.grad is not None], settings.clip_crf)
    optimizer.step()
    return total


def _train_mode(network: nn.Module, settings: Settings) -> None:
    network.train()
    if settings.freeze_norm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def share_norm(network: nn.Module, device: torch.device) -> None:
    """Batch norm over the batches of all processes, in place; a frozen one has nothing to share and stays."""
    for path, module in list(network.named_modules()):
        if not isinstance(module, _BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if device.type == "cpu" or not plain:  # torch would drop what a class of another library adds, such as a ReLU
            why = f"{type(module).__name__} is not torch's own" if not plain else "torch's SyncBatchNorm runs on no CPU"
            raise ValueError(
                f"batch norm must see the batches of all processes, but {why}: freeze_norm, or one process"
            )
        network.set_submodule(path, nn.SyncBatchNorm.convert_sync_batchnorm(module))


def _select(
    run: Run, done: int, metrics: Metrics, settings: Settings, judged: nn.Module, log: Callable[[str], None]
) -> None:
    """Keeps the network if it is the best so far, and no worse than the start by the guard."""
    for what, name in (("select", settings.select), ("guard", settings.guard)):
        if name and name not in metrics:
            raise ValueError(f"{what} must be one of the metrics {sorted(metrics)}, got {name!r}")
    floor = run.history[0][settings.guard] if settings.guard else -math.inf
    if math.isnan(floor):
        raise ValueError(f"guard must be a number at the start, {settings.guard} is NaN")
    if settings.guard and not metrics[settings.guard] >= floor:
        log(f"not to be selected: {settings.guard} {metrics[settings.guard]:.4f}, below {floor:.4f} at the start")
        return
    score = metrics[settings.select]
    if run.best is None or math.isnan(run.best["score"]) or score > run.best["score"]:
        copied = {key: value.detach().cpu().clone() for key, value in judged.state_dict().items()}
        run.best = {"iteration": done, "score": score, "network": copied}


def _log(folder: Path | None, history: list[Metrics], board: Any) -> None:
    if folder is None or rank():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in reversed(history) for name in row)))
    writer.writeheader()
    writer.writerows(history)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "log.csv") as stream:
        stream.write(text.getvalue().encode())
    if board is not None:
        for name, value in history[-1].items():
            board.add_scalar(name, value, int(history[-1]["iteration"]))
        board.flush()


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("settings.tensorboard needs TensorBoard: pip install crfnet[tensorboard]") from error
    return SummaryWriter(folder, purge_step=start + 1)  # what a killed run wrote beyond its last checkpoint goes


def _silent(text: str) -> None:
    """Says nothing: one process speaks for all."""


def _check(samples: Samples, settings: Settings, folder: Path | None, resume: bool, validates: bool) -> None:
    if not len(samples):
        raise ValueError("samples must be at least one, got none")
    if settings.batch_size % world_size():
        raise ValueError(f"batch_size must be a multiple of the {world_size()} processes, got {settings.batch_size}")
    if settings.select and not validates:
        raise ValueError(f"select {settings.select!r} needs validate")
    if folder is None and (resume or settings.checkpoint_every or settings.tensorboard):
        raise ValueError("resume, checkpoint_every and tensorboard need a folder")
    if folder is not None and not resume and (found := checkpoints.existing(folder)):
        raise ValueError(f"{found[-1]} is of a run before: resume goes on from it; or take another folder")


def _fixed(samples: Samples, optimizer: Optimizer, settings: Settings) -> dict[str, Any]:
    """What a run that goes on must share with the one that stopped, or it would be neither."""
    names = ("batch_size", "accumulate", "seed", "clip_crf", "average", "freeze_norm", "select", "guard")
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    fixed = {name: getattr(settings, name) for name in names} | {"autocast": str(settings.autocast)}
    listed = "\n".join(f"{Path(image).name} {Path(labels).name}" for image, labels in samples.files)
    digest = hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()
    fixed |= {"number of samples": len(samples), "seed of the samples": samples.seed, "their names' digest": digest}
    transform = samples.transform  # others than a dataclass print their place in memory
    fixed |= {"transform": str(transform) if is_dataclass(transform) else type(transform).__name__}
    return fixed | {"optimizer": type(optimizer).__name__, "optimizer's groups": groups}


def _want_finite(network: nn.Module, done: int) -> None:
    wrong = [name for name, p in network.named_parameters() if not p.isfinite().all()]
    if wrong:
        raise ValueError(f"parameters must be finite, got others at iteration {done}, in {', '.join(wrong[:4])}")


def _write(folder: Path, done: int, kept: dict[str, Any], fixed: dict[str, Any], settings: Settings, run: Run) -> None:
    _want_finite(kept["network"], done)
    random = gather(checkpoints.random_state())
    if rank():
        return
    states = {name: part.state_dict() for name, part in kept.items()}
    more = {"history": run.history, "best": run.best, "losses": run.losses, "random": random, "fixed": fixed}
    checkpoints.write(folder, done, states | more, keep=settings.keep)


def _restore(
    state: dict[str, Any],
    kept: dict[str, Any],
    fixed: dict[str, Any],
    schedule: Schedule,
    settings: Settings,
    run: Run,
) -> int:
    start, before = int(state["iteration"]), state["fixed"]
    differ = [
        f"{name} {before[name]} then and {now} now" for name, now in fixed.items() if before.get(name, now) != now
    ]
    factors = state["scheduler"]["_last_lr"][0], state["scheduler"]["base_lrs"][0] * float(schedule(start))
    if factors[0] != factors[1]:
        differ.append(f"learning rate {factors[0]:g} then and {factors[1]:g} by the schedule now, at iteration {start}")
    if start > settings.iterations:
        differ.append(f"iterations {start} done and {settings.iterations} wanted")
    if differ:
        raise ValueError(f"checkpoint must be of a run with the same settings, got {'; '.join(differ)}")
    for name, part in kept.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint must fit the {name}: {error}") from error
    run.history, run.best, run.losses = state["history"], state["best"], state["losses"]
    # another number of processes goes on as well, though not with the same dropout
    checkpoints.set_random_state(state["random"][rank() % len(state["random"])])
    return start
