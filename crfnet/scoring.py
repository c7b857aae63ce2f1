"""Label maps on disk against the truth, as files or as folders: what ``crfnet evaluate`` does.

pairs = match(Path("predictions"), Path("SegmentationClass"), split=Path("val.txt"))
scored = Scored(num_classes=21, widths=(1, 2, 3))
failures = [scored.add(*pair) for pair in pairs]       None, or what is wrong with which file
print(scored.everywhere.mean_iou)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crfnet.curves import TrimapCurve
from crfnet.data.lists import read_list
from crfnet.layouts import PLAIN, Layout
from crfnet.metrics import ConfusionMatrix
from crfnet.tables import class_names

Pair = tuple[Path, Path]  # prediction, truth
ALL_LABELS = 256  # what 8 bits hold
SHOWN = 5  # names in a message


def match(
    predictions: Path, truth: Path | None = None, *, split: Path | None = None, layout: Layout = PLAIN
) -> list[Pair]:
    """Prediction and truth of every image, by the name that they share.

    Args:
        predictions: a folder of label maps, one label map, or without ``truth`` a list of ``prediction truth`` lines,
            paths relative to the list's folder.
        truth: a folder, or one label map.
        split: a list of names, such as ``ImageSets/Segmentation/val.txt``: they alone count. Without it both folders
            must hold the same names.
        layout: which names files have, their stems unless given.

    Raises:
        FileNotFoundError: something named is missing.
        ValueError: a file with a folder, an empty folder or list, or a name that one folder lacks or has twice.
    """
    for path in (predictions, truth, split):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if split is not None and split.is_dir():
        raise ValueError(f"{split}: is a folder; wanted a list of names")
    if truth is None:
        if predictions.is_dir():
            raise ValueError(f"{predictions} is a folder, which wants the folder of the truth beside it")
        if split is not None:
            raise ValueError(f"{split}: a split chooses from folders, and {predictions} is a list already")
        return _listed(predictions)
    if predictions.is_dir() != truth.is_dir():
        kinds = ("a folder", "a file") if predictions.is_dir() else ("a file", "a folder")
        raise ValueError(f"{predictions} is {kinds[0]}, but {truth} is {kinds[1]}")
    if not predictions.is_dir():
        if split is not None:
            raise ValueError(f"{split}: a split chooses from folders, and {predictions} is a file")
        return [(predictions, truth)]
    called, true = layout.maps(predictions), layout.maps(truth)
    for folder, found in ((predictions, called), (truth, true)):
        if not found:
            raise ValueError(f"{folder}: no label map in this folder ({layout.wanted})")
    names = sorted(called.keys() | true.keys()) if split is None else _names(split, layout)
    for folder, found in ((predictions, called), (truth, true)):
        missing = [name for name in names if name not in found]
        if missing:
            whose = f"{len(names)} names of {split}" if split else f"{len(names)} names in both folders"
            hint = "" if split else "; --split LIST scores the names of a list alone"
            raise ValueError(f"{folder} has no label map for {len(missing)} of the {whose}: {some(missing)}{hint}")
    return [(called[name], true[name]) for name in names]


def _listed(listing: Path) -> list[Pair]:
    pairs, folder = [], listing.parent
    for where, words in read_list(listing, "one `prediction truth` pair"):
        if len(words) != 2:
            raise ValueError(f"{where}: wanted two paths `prediction truth`, got {' '.join(words)!r}")
        called, true = (folder / word for word in words)
        for path in (called, true):
            if not path.is_file():
                raise FileNotFoundError(f"{where}: {path} is missing")
        pairs.append((called, true))
    for kind, files in zip(("prediction", "truth"), zip(*pairs, strict=True), strict=True):
        twice = {str(file) for file in files if files.count(file) > 1} if len(set(files)) < len(files) else set()
        if twice:
            raise ValueError(f"{listing} names a {kind} more than once: {some(sorted(twice))}")
    return pairs


def _names(split: Path, layout: Layout) -> list[str]:
    names = [layout.listed(line.name) for line in read_list(split, "one image name")]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{split} has names more than once: {some(twice)}")
    return names


def some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def read_names(path: Path) -> list[str]:
    """Class names, one a line in the order of the labels; a name may hold spaces.

    Raises:
        OSError: missing, or a folder.
        ValueError: empty, no text, or a blank line between names.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; wanted a class name a line") from error
    if not names:
        raise ValueError(f"{path} is empty; wanted a class name a line")
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1} is blank; wanted a class name a line, label 0 first")
    if len(names) > ALL_LABELS:
        raise ValueError(f"{path} has {len(names)} names; labels of 8 bits are at most {ALL_LABELS}")
    return names


class Scored:
    """The scores of one method, over the files added.

    Args:
        num_classes: labels are 0..num_classes-1; None takes whatever occurs but ``ignore_label``.
        ignore_label: of void pixels in the truth.
        widths: of trimap bands; () for none.
        layout: how files are read.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        ignore_label: int = 255,
        widths: Sequence[int] = (),
        layout: Layout = PLAIN,
    ) -> None:
        self.layout, L = layout, num_classes or ALL_LABELS
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.everywhere = ConfusionMatrix(L, ignore_index=ignore_label)
        self.curve = TrimapCurve(L, widths=widths, ignore_index=ignore_label) if widths else None
        self.accuracy: dict[Pair, float] = {}  # of each image by itself: no score, but tells the bad ones

    def add(self, prediction: Path, truth: Path) -> str | None:
        """Adds one image; of a bad file nothing, and the return value says what is wrong, naming it."""
        maps = []
        for path in (prediction, truth):
            try:
                maps.append(torch.from_numpy(self.layout.read(path)).long())
            except (ValueError, OSError) as error:
                return str(error) if str(path) in str(error) else f"{path}: {error}"
        called, true = maps
        if called.shape != true.shape:
            return f"{prediction} is {_size(called)}, but {truth} is {_size(true)} pixels"
        counted = true != self.ignore_label
        for path, labels in ((prediction, called[counted]), (truth, true[counted])):
            wrong = labels >= self.num_classes if self.num_classes else labels == self.ignore_label
            if bool(wrong.any()):
                values = labels[wrong].unique().tolist()
                return f"{path}: {self._complaint(values, int(wrong.sum()))}"
        self.everywhere.add(called, true)
        self.accuracy[prediction, truth] = float((called == true)[counted].double().mean())  # NaN of void alone
        if self.curve is not None:
            self.curve.add(called, true)
        return None

    def _complaint(self, values: list[int], pixels: int) -> str:
        count = "1 pixel that counts has" if pixels == 1 else f"{pixels} pixels that count have"
        found = f"{count} the {self.layout.label}{'s' * (len(values) > 1)} {', '.join(map(str, values))}"
        if self.num_classes:
            return f"{found}, but num_classes (--num-classes) is {self.num_classes}"
        return f"{found}, which is the ignored one; --num-classes would make it a class, if it is one"

    def shrink(self, num_classes: int) -> None:
        """Keep the first ``num_classes`` labels alone, once it is known that no others occurred."""
        if num_classes < self.labels:
            raise ValueError(f"num_classes must be at least {self.labels}, as labels occurred, got {num_classes}")
        for holder in (self.everywhere, self.curve):
            if holder is not None:
                holder.num_classes, holder.counts = num_classes, holder.counts[..., :num_classes, :num_classes].clone()

    @property
    def labels(self) -> int:
        """One more than the largest label that occurred, in truth or prediction."""
        counts = self.everywhere.counts
        return int((counts.sum(0) + counts.sum(1)).nonzero().max()) + 1 if bool(counts.any()) else 0

    def report(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Everything as JSON takes it, scores as fractions, None where there is none."""
        matrix = self.everywhere
        iou, accuracy = matrix.per_class_iou().tolist(), matrix.per_class_accuracy().tolist()
        truth, called = matrix.counts.sum(1).tolist(), matrix.counts.sum(0).tolist()
        report: dict[str, Any] = {name: _plain(score) for name, score in matrix.scores().items()}
        report["classes"] = [
            {
                "label": label,
                "name": name,
                "iou": _plain(iou[label]),
                "accuracy": _plain(accuracy[label]),
                "pixels": truth[label],
                "called": called[label],
            }
            for label, name in enumerate(class_names(matrix, names))
        ]
        if self.curve is not None:
            report["trimap"] = {
                "widths": list(self.curve.widths),
                "mean_iou": list(map(_plain, self.curve.mean_iou())),
                "pixel_accuracy": list(map(_plain, self.curve.pixel_accuracy())),
            }
        report["confusion"] = matrix.counts.tolist()
        return report


def _plain(score: float) -> float | None:
    return None if math.isnan(score) else score


def _size(labels: torch.Tensor) -> str:
    return f"{labels.shape[1]} x {labels.shape[0]}"
