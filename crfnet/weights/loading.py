"""Weights into a network by name and shape, all or none, with a report of what was and was not used."""

import fnmatch
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crfnet import __version__
from crfnet.images import PathLike
from crfnet.models.preprocess import Preprocess
from crfnet.weights.files import read, read_metadata
from crfnet.weights.files import save as save_tensors
from crfnet.weights.names import is_head, is_score, is_spare, layers
from crfnet.weights.origins import Plan, brief, convention, guess, plan
from crfnet.weights.structure import differences, structure

EVERY = {7: (0, 1, 2, 3, 4, 5, 6), 4: (0, 2, 4, 6), 3: (0, 3, 6)}  # rows and columns of fc6's 7x7 that are kept


@dataclass
class Report:
    """What `load` did."""

    origin: str
    used: dict[str, str] = field(default_factory=dict)  # parameter of the network → its name in the file
    adapted: dict[str, str] = field(default_factory=dict)  # parameter → what was done to the file's values
    kept: list[str] = field(default_factory=list)  # parameters that stay as they were
    unused: list[str] = field(default_factory=list)  # names of the file that nothing took
    inputs: list[str] = field(default_factory=list)  # what the network now makes of an image

    def __str__(self) -> str:
        """A few lines for a log."""
        lines = [f"{self.origin}: {len(self.used)} tensors used, {len(self.kept)} of the network kept as they were"]
        lines += [f"  adapted {name}: {what}" for name, what in sorted(self.adapted.items())]
        lines += [f"  kept {brief(self.kept)}"] if self.kept else []
        lines += [f"  unused {brief(self.unused)}"] if self.unused else []
        lines += [f"  input {text}" for text in self.inputs]
        return "\n".join(lines)


@torch.no_grad()
def load(
    network: nn.Module, source: PathLike | Mapping[str, Tensor], *, origin: str | None = None, keep: Sequence[str] = ()
) -> Report:
    """Fills a network with the weights of a file, and sets its input to the channel order and mean they were made with.

    Weights of an ImageNet network fill the trunk, fc6 and fc7: its linear layers become convolutions, DeepLab's smaller
    fc6 and fc7 take every second or third row and column and every fourth channel, ASPP's branches all begin with the
    same, a fourth input channel with the mean of the three. The scores are then kept as they are; where a Caffe file
    has neither scores nor ImageNet's classifier, as one that was cut short there, a warning says so. Of any other file
    nothing may be missing or left over.

    Args:
        network: one of `crfnet.models`, also within `MultiScale` or `WithCRF`.
        source: a file that `read` reads, or tensors by name.
        origin: where the weights come from; told by the names unless given. See :mod:`crfnet.weights.origins`;
            "vgg16_from_caffe" must be given, as its names are torchvision's.
        keep: patterns (``"head.score_*"``) of parameters of the network to leave as they are, whatever the file has, as
            for other classes than its own. Each must fit a parameter.

    Raises:
        OSError, ImportError: as `read`.
        TypeError: networks with names of their own take this library's files alone.
        ValueError: the file cannot be read, is of another network, or lacks something; lists the names. Or it is one of
            ours, of a network with other holes, strides or pools. The network is then as it was.
    """
    network = bare(network)
    label = "source" if isinstance(source, Mapping) else str(source)
    tensors = source if isinstance(source, Mapping) else read(source)
    if not tensors:
        raise ValueError(f"{label}: must have tensors, got none")
    state = network.state_dict()
    keep = [keep] if isinstance(keep, str) else keep
    try:
        if idle := [pattern for pattern in keep if not any(_matches(name, [pattern]) for name in state)]:
            raise ValueError(f"keep must be patterns of parameters such as {brief(state, 10)}, got {idle}")
        origin = origin or ("crfnet" if set(tensors) == set(state) else guess(tensors))
        entries = plan(origin, network, tensors)
        inputs = {module: convention(origin, module) for module in network.modules() if isinstance(module, Preprocess)}
    except ValueError as error:
        raise ValueError(f"{label}: {error}; the file has {brief(tensors)}") from None
    planned, entries = entries, _without_absent_head(origin, network, entries, tensors)
    wanted = {name: entry for name, entry in entries.items() if not _matches(name, keep)}
    scored = any(is_score(key) for entry in wanted.values() for key in entry.sources)
    report = Report(origin)
    values, faults = {}, _Faults()
    for name, entry in wanted.items():
        missing = [key for key in entry.sources if key not in tensors]
        if missing:
            if not name.endswith("num_batches_tracked"):  # files of before torch 0.4.1 have none
                faults.missing += missing
            continue
        value = entry.convert(*(tensors[key] for key in entry.sources))
        fitted, note = fit(name, value, state[name].shape, reduce=not scored and origin != "crfnet")
        if fitted is None:
            faults.shaped.append(f"{', '.join(entry.sources)} {tuple(value.shape)}, wanted {tuple(state[name].shape)}")
            continue
        fitted = fitted.to(state[name].dtype)
        if fitted.is_floating_point() and not bool(fitted.isfinite().all()):
            faults.infinite.append(entry.sources[0])
        else:
            values[name], report.used[name] = fitted, ", ".join(entry.sources)
            if done := ", ".join(text for text in (entry.note, note) if text):
                report.adapted[name] = done
    taken = {key for entry in wanted.values() for key in entry.sources}
    report.unused = sorted(key for key in set(tensors) - taken if not key.endswith("num_batches_tracked"))
    faults.lost = _lost(origin, report.unused, wanted, entries, keep)
    faults.complain(label, origin, network, tensors)
    if origin == "crfnet" and not isinstance(source, Mapping):
        _check_structure(source, network, keep)
    if len(entries) < len(planned) and origin in ("caffe", "kazuto1011") and not any(map(is_spare, tensors)):
        text = (
            f"{label}: has neither scores nor a classifier: taken for an ImageNet trunk, the network's scores are kept"
        )
        warnings.warn(text, stacklevel=2)
    for name, value in values.items():
        state[name].copy_(value)
    for module, its in inputs.items():
        if its is not None:
            module.become(its)
        report.inputs.append(
            f"channels {module.order.tolist()} of the image (RGB is 0, 1, 2), less {module.mean.tolist()}, "
            f"over {module.std.tolist()}"
        )
    internal = re.compile(r"(^|\.)(num_batches_tracked|preprocess\.(\w+\.)?(order|mean|std))$")
    report.kept = [name for name in state if name not in values and not internal.search(name)]
    return report


def save(network: nn.Module, path: PathLike) -> None:
    """Writes everything that a network holds, its input's channel order and mean included, as safetensors.

    Raises:
        OSError, ImportError, ValueError: as :func:`crfnet.weights.files.save`.
    """
    network = bare(network)
    metadata = {"format": "crfnet", "network": type(network).__name__, "version": __version__}
    metadata["structure"] = json.dumps(structure(network))
    save_tensors(network.state_dict(), path, metadata)


def bare(network: nn.Module) -> nn.Module:
    """The network within DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, DistributedDataParallel | nn.DataParallel):
            inner = network.module
        if inner is None:
            return network
        network = inner


def _check_structure(path: PathLike, network: nn.Module, keep: Sequence[str]) -> None:
    """Refuses a file of ours whose network has the same parameters but other holes, strides or pools."""
    try:
        known = json.loads(read_metadata(path).get("structure", "null"))
    except ValueError:  # a state dict in another kind of file
        return
    if known is None:
        return
    theirs, ours = (
        {name: part for name, part in one.items() if not _matches(f"{name}.weight", keep)}
        for one in (known, structure(network))
    )
    if texts := differences(theirs, ours):
        raise ValueError(
            f"{path}: the network's layers must be set as the file's, got {'; '.join(texts)} (tensors from "
            "crfnet.weights.read are taken without this check)"
        )


class _Faults:
    """What is wrong with a file, all of it before anything is done."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.shaped: list[str] = []
        self.infinite: list[str] = []
        self.lost: list[str] = []

    def complain(self, label: str, origin: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        texts = []
        if self.missing:
            texts.append(f"missing {brief(set(self.missing))}")
        if self.shaped:
            texts.append(f"of another shape {brief(self.shaped)}")
        if self.infinite:
            texts.append(f"not finite {brief(self.infinite)}")
        if self.lost:
            texts.append(f"without a place in the network {brief(self.lost)}")
        if texts:
            others = f"; keep=[...] leaves parameters as they are; the file has {brief(tensors)}"
            raise ValueError(f"{label}: as {origin} not for {type(network).__name__}: {'; '.join(texts)}{others}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _without_absent_head(origin: str, network: nn.Module, planned: Plan, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan less the scores, where the file has a trunk and no more than a classifier beside it: one of ImageNet."""
    if origin in ("crfnet", "wkentaro", "sadeepj"):  # their files have scores
        return planned
    paths = {path for layer, path in layers(network).items() if is_head(layer)}
    trunk = {name: entry for name, entry in planned.items() if name.rsplit(".", 1)[0] not in paths}
    known = {key for entry in trunk.values() for key in entry.sources}
    return trunk if all(key in known or is_spare(key) for key in tensors) else planned


def _lost(origin: str, unused: Sequence[str], wanted: Plan, planned: Plan, keep: Sequence[str]) -> list[str]:
    """Unused tensors without which the network is not the file's: a bias, further layers, further scores."""
    spared = {key for entry in planned.values() for key in entry.sources}  # by `keep`
    used = {key for entry in wanted.values() for key in entry.sources}
    if "inference1.2" in used:
        spared |= {f"inference1.{index}" for index in range(3, 7)}  # of terms that caffe-tvg knows and CRF-RNN has not
    if origin == "crfnet":
        return [key for key in unused if key not in spared and not _matches(key, keep)]
    scored = any(map(is_score, used))
    return [key for key in unused if key not in spared and not is_spare(key) and (scored or not is_score(key))]


def fit(name: str, value: Tensor, shape: torch.Size, *, reduce: bool = True) -> tuple[Tensor | None, str]:
    """The values in the shape that a parameter has, and what was done to them; None where they do not fit.

    ``reduce`` lets fc6 and fc7 become smaller, after which no scores of the file's would fit them.
    """
    if value.shape == shape:
        return value, ""
    plain = value.reshape([n for n in value.shape if n != 1] or [1])  # old Caffe files: (1, 1, O, I), (1, 1, 1, O)
    rows = len(shape) > 1 and plain.ndim == 2 and len(plain) == shape[0]
    if value.numel() == shape.numel() and (rows or _squeezed(value.shape) == _squeezed(shape)):
        return value.reshape(shape), f"{tuple(value.shape)} read as {tuple(shape)}"
    if name.endswith("conv1_1.weight") and value.ndim == 4 and shape[1] == value.shape[1] + 1:
        return torch.cat([value, value.mean(1, keepdim=True)], 1), "fourth channel: the mean of the three"
    if reduce and (".fc6.0." in f".{name}" or ".fc7.0." in f".{name}"):
        return _reduced(plain, shape)
    return None, ""


def _squeezed(shape: torch.Size) -> list[int]:
    return [n for n in shape if n != 1]


def _reduced(plain: Tensor, shape: torch.Size) -> tuple[Tensor | None, str]:
    """fc6 and fc7 of 4096 channels and 7x7 → fewer of both, taken in a grid.

    arXiv:1412.7062, section 3.2, subsamples; arXiv:1606.00915, section 4.1.1, draws the channels at random, where the
    files that others derived take every fourth.
    """
    if plain.shape[0] != 4096 or 4096 % shape[0]:
        return None, ""
    every = 4096 // shape[0]
    channels = f"every {every}th channel" if every > 1 else "all channels"
    if len(shape) == 1:
        return (plain[::every].clone(), channels) if plain.ndim == 1 else (None, "")
    if plain.numel() == 4096 * 512 * 49 and shape[1] == 512 and shape[2] in EVERY:
        picked, taps = plain.reshape(4096, 512, 7, 7)[::every], list(EVERY[int(shape[2])])
        return picked[:, :, taps][..., taps], f"rows and columns {taps} of 7x7, {channels}"
    if plain.numel() == 4096 * 4096 and shape[1] == shape[0]:
        return plain.reshape(4096, 4096)[::every, ::every].reshape(shape), channels
    return None, ""
