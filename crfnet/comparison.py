"""One or several methods scored on the same files: the work of ``crfnet evaluate``, and what it prints and writes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crfnet.curves import WIDTHS, trimap_plot
from crfnet.images import atomic_write, read_image, write_image
from crfnet.layouts import PLAIN, Layout
from crfnet.panels import comparison_picture
from crfnet.refine import check_outputs
from crfnet.scoring import Pair, Scored, match, read_names, some
from crfnet.tables import class_table, gain_table, score_table, trimap_table

Named = tuple[str, Path]
MOST = 1000  # widths, each of which has a confusion matrix


def named(text: str) -> Named:
    """``NAME=PATH``, or a path, which is then named after its last part."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        if not name or not path:
            raise ValueError(f"wanted NAME=PATH, got {text!r}")
        return name, Path(path)
    whole = Path(text)
    return (whole.resolve().name or text) if whole.is_dir() else whole.stem, whole


def widths(text: str) -> tuple[int, ...]:
    """``1,2,5`` and ``1-40``, mixed, as ascending whole numbers."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"wanted widths such as 1,2,5 or 1-40, got {text!r}")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last <= MOST:
            raise ValueError(f"widths must be ascending and lie in 1..{MOST}, got {part.strip()!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


class Comparison:
    """The first method's scores, and who gains and who pays in each of the others.

    Args:
        methods: name and predictions of each, as `crfnet.scoring.match` takes them.
        truth: None where the predictions are lists.
        split: list of the names that count.
        layout: how the files of the data set are called, and what they hold.
        num_classes: labels are 0..num_classes-1; by default as many as there are names, or as occur.
        ignore_label: void in the truth.
        names: file of class names.
        widths: of trimap bands to tabulate.
        curve: plot to write; it has widths 1..40 whatever ``widths`` says.
        json: file to write.
        panels: folder to write pictures into, of the images on which the first method is worst.
        photos: folder of photos by the names of the predictions, to show in the panels.
        most: how many panels.
        overwrite: replace outputs that exist.

    Raises:
        OSError, ValueError: files, folders and options that do not belong together; nothing has been read or written.
    """

    def __init__(
        self,
        methods: Sequence[Named],
        truth: Path | None,
        *,
        split: Path | None = None,
        layout: Layout = PLAIN,
        num_classes: int | None = None,
        ignore_label: int = 255,
        names: Path | None = None,
        widths: Sequence[int] = (),
        curve: Path | None = None,
        json: Path | None = None,
        panels: Path | None = None,
        photos: Path | None = None,
        most: int = 20,
        overwrite: bool = False,
    ) -> None:
        called = [name for name, _ in methods]
        if twice := sorted({name for name in called if called.count(name) > 1}):
            raise ValueError(f"two methods are called {', '.join(twice)}; NAME=PATH gives each a name of its own")
        self.layout = layout
        self.names: Sequence[str] | None = layout.names or None if names is None else read_names(names)
        if self.names is not None and num_classes not in (None, len(self.names)):
            raise ValueError(
                f"{names or 'the data set'} names {len(self.names)} classes, "
                f"but num_classes (--num-classes) is {num_classes}"
            )
        self.num_classes = num_classes or (len(self.names) if self.names is not None else None)
        self.ignore_label, self.truth, self.asked = ignore_label, truth, tuple(widths)
        self.files = {name: match(path, truth, split=split, layout=layout) for name, path in methods}
        self._want_one_truth()
        self.curve, self.json, self.panels, self.most = curve, json, panels, most
        self.photos = self._matched_photos(photos)
        self._want_outputs(overwrite, [path for path in (truth, split, names) if path is not None])
        bands = sorted({*widths, *(WIDTHS if curve is not None else ())})
        self.scored = {
            method: Scored(self.num_classes, ignore_label=ignore_label, widths=bands, layout=layout)
            for method in self.files
        }

    def _want_one_truth(self) -> None:
        (first, pairs), *others = self.files.items()
        truths = {truth.resolve() for _, truth in pairs}
        for name, other in others:
            if strange := truths ^ {truth.resolve() for _, truth in other}:
                raise ValueError(f"{first} and {name} must have the same truth; only one of them has {min(strange)}")

    def _want_outputs(self, overwrite: bool, inputs: Sequence[Path]) -> None:
        used = [
            *inputs,
            *self.photos.values(),
            *(path for pairs in self.files.values() for pair in pairs for path in pair),
        ]
        for path, suffix in ((self.curve, ".png"), (self.json, ".json")):
            if path is not None:
                check_outputs([path], used, suffix, overwrite)
                if path.is_dir():
                    raise IsADirectoryError(f"{path}: is a folder; wanted the name of a file")
                if not path.absolute().parent.is_dir():
                    raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
        if self.panels is not None and self.panels.exists():
            if not self.panels.is_dir():
                raise NotADirectoryError(f"{self.panels}: is a file; panels want a folder")
            if any(self.panels.iterdir()) and not overwrite:
                raise FileExistsError(f"{self.panels}: is not empty; overwrite (--overwrite) would add to it")
            if self.panels.resolve() in {path.resolve().parent for path in used}:
                raise FileExistsError(f"{self.panels}: holds inputs, which are never replaced; choose another folder")

    def _matched_photos(self, folder: Path | None) -> dict[str, Path]:
        if folder is None:
            return {}
        if self.panels is None:
            raise ValueError(f"{folder}: photos (--images) are for panels (--panels), which are not asked for")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        found = self.layout.photos(folder)
        names = [self.layout.name_of(prediction) for prediction, _ in next(iter(self.files.values()))]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{folder} has no photo for {len(missing)} of {len(names)} predictions: {some(missing)}")
        return found

    @property
    def total(self) -> int:
        """How many predictions there are to read."""
        return sum(map(len, self.files.values()))

    def run(self) -> Iterator[tuple[Path, str | None]]:
        """Scores one prediction after another; yields each, with None or what is wrong with which file."""
        for name, pairs in self.files.items():
            for pair in pairs:
                yield pair[0], self.scored[name].add(*pair)
        if self.num_classes is None:
            most = max(1, *(scored.labels for scored in self.scored.values()))
            for scored in self.scored.values():
                scored.shrink(most)

    def write(self) -> None:
        """Writes what was asked for.

        Raises:
            ValueError: not a single pixel counted, so that there are no scores.
            OSError: the disk refuses.
        """
        first = next(iter(self.scored.values()))
        if not bool(first.everywhere.counts.any()):
            raise ValueError(f"no scores, as every pixel of the truth has the ignored label {self.ignore_label}")
        if self.curve is not None:
            curves = {name: scored.curve for name, scored in self.scored.items() if scored.curve is not None}
            if not bool(next(iter(curves.values())).counts.any()):
                raise ValueError(f"{self.curve}: no curve, as the truth has no boundary within {WIDTHS[-1]} pixels")
            write_image(self.curve, trimap_plot(curves))
        if self.panels is not None:
            self._write_panels(self.panels, first.accuracy)
        if self.json is not None:
            with atomic_write(self.json) as stream:
                stream.write(json.dumps(self.report(), indent=None, allow_nan=False).encode() + b"\n")

    def _write_panels(self, folder: Path, accuracy: dict[Pair, float]) -> None:
        by_truth = {name: {truth.resolve(): path for path, truth in pairs} for name, pairs in self.files.items()}
        scored = [pair for pair in accuracy if accuracy[pair] == accuracy[pair]]  # NaN where all is void
        worst = sorted(scored, key=lambda pair: (accuracy[pair], pair))[: self.most]
        folder.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(worst)))
        for rank, (prediction, truth) in enumerate(worst, 1):
            called = {name: self.layout.read(paths[truth.resolve()]) for name, paths in by_truth.items()}
            shown = self.layout.name_of(prediction)
            photo = read_image(self.photos[shown]) if self.photos else None
            try:
                picture = comparison_picture(
                    self.layout.read(truth), called, photo=photo, ignore_label=self.ignore_label,
                    palette=self.layout.palette,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{self.photos.get(shown, prediction)}: {error}") from error
            write_image(folder / f"{rank:0{digits}}_{shown}.png", picture)

    def report(self) -> dict[str, Any]:
        """As JSON takes it: the scores of the first method, and under ``compared`` those of the others by name."""
        (first, scored), *others = self.scored.items()
        report = {"name": first, "images": self._images, "ignore_label": self.ignore_label, **scored.report(self.names)}
        if others:
            report["compared"] = {name: other.report(self.names) for name, other in others}
        return report

    def text(self, *, markdown: bool = False) -> str:
        """Tables of the scores, of the first method's classes, of gains over it, and of trimap bands."""
        matrices = {name: scored.everywhere for name, scored in self.scored.items()}
        (first, before), *others = matrices.items()
        images = "1 image" if self._images == 1 else f"{self._images} images"
        pixels = int(before.counts.sum())
        parts = [
            f"{images}, labels 0..{before.num_classes - 1}, {pixels} pixels, ignored label {self.ignore_label}",
            score_table(matrices, markdown=markdown),
            class_table(before, self.names, markdown=markdown),
        ]
        for name, after in others:
            parts += [f"{name} against {first}", gain_table(before, after, self.names, markdown=markdown)]
        curves = {name: scored.curve for name, scored in self.scored.items() if scored.curve is not None}
        if self.asked:
            parts.append(trimap_table(curves, self.asked, markdown=markdown))
        return "\n\n".join(parts)

    @property
    def _images(self) -> int:
        return len(next(iter(self.files.values())))
