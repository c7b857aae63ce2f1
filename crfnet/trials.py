"""Trials of a parameter search, and the CSV file that keeps them: a record, and what a stopped search goes on from.

The first line of the file is a comment with two checksums. They tell apart tables of other data, and damaged ones;
``pandas.read_csv(path, comment="#")`` reads the rest.
"""

import csv
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from crfnet.images import PathLike, atomic_write


@dataclass(frozen=True)
class Parameters:
    """Parameters of a dense CRF, named as in `crfnet.DenseCRF`; ``DenseCRF(L, **asdict(parameters))`` takes them."""

    bilateral_weight: float
    theta_alpha: float
    theta_beta: float
    spatial_weight: float
    theta_gamma: float


NAMES = tuple(field.name for field in fields(Parameters))


@dataclass(frozen=True)
class Trial:
    """One row of the table: parameters, mean IoU on the held-out images (0..1), and the round that tried them."""

    parameters: Parameters
    mean_iou: float
    round: int


class TrialTable:
    """The CSV file of a search: a comment with two checksums, the names of the columns, a row a trial.

    Args:
        path: of the file, which need not be there yet.
        data: 16 hexadecimal digits that tell what was searched on, and how, from all else.

    Raises:
        ValueError: the file is damaged, no such table, or one of other data.
        OSError: it cannot be read.

    Attributes:
        known: mean IoU of the points that the file held.
    """

    TITLE = re.compile(rb"# crfnet\.tuning\.search, data ([0-9a-f]{16}), rows ([0-9a-f]{8})")

    def __init__(self, path: PathLike, data: str) -> None:
        self.path, self.data = path, data
        self.held: list[Trial] = []  # without "no CRF", which costs nothing
        try:
            with open(path, "rb") as stream:
                title, _, rows = stream.read().partition(b"\n")
        except FileNotFoundError:
            title = rows = b""
        else:
            self.held = self._trials(title, rows)[1:]
        self.known = {trial.parameters: trial.mean_iou for trial in self.held}

    def _trials(self, title: bytes, rows: bytes) -> list[Trial]:
        found = self.TITLE.fullmatch(title)
        if found is None:
            raise ValueError(f"{self.path}: not a table of crfnet.tuning.search; delete it or name another file")
        data, check = (part.decode() for part in found.groups())
        if check != _checksum(rows):
            raise ValueError(
                f"{self.path}: damaged or edited, its rows do not have its checksum; delete it or name another"
            )
        if data != self.data:
            settings = "images, logits, labels, num_iterations, method or ignore_index"
            raise ValueError(f"{self.path}: holds the trials of other {settings}; delete it or name another file")
        try:
            header, *lines = csv.reader(io.StringIO(rows.decode()))
            if header != [*NAMES, "mean_iou", "round"]:
                raise ValueError(f"columns {header}")
            return [Trial(Parameters(*map(float, line[:5])), float(line[5]), int(line[6])) for line in lines]
        except (ValueError, IndexError, csv.Error) as error:  # another version's
            raise ValueError(f"{self.path}: cannot be read: {error}; delete it or name another file") from error

    def write(self, trials: Sequence[Trial]) -> None:
        """The trials so far, then what the file held beyond them."""
        tried = {trial.parameters for trial in trials}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*NAMES, "mean_iou", "round"])
        for trial in (*trials, *(trial for trial in self.held if trial.parameters not in tried)):
            writer.writerow([*map(repr, astuple(trial.parameters)), repr(trial.mean_iou), trial.round])  # exact floats
        rows = text.getvalue().encode()
        with atomic_write(self.path) as stream:
            stream.write(f"# crfnet.tuning.search, data {self.data}, rows {_checksum(rows)}\n".encode() + rows)


def _checksum(rows: bytes) -> str:
    return f"{zlib.crc32(rows):08x}"
