"""Checkpoints of a training run: a folder of files, one an interval, each whole or absent, the newest few kept.

A file holds everything that the next iteration depends on, so that a run which is resumed goes on as if it had never
stopped. A run that is killed while it writes leaves the file before, and a part of the new one that the next write
removes.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from crfnet.images import PathLike, atomic_write
from crfnet.inputs import whole_number

NAME = re.compile(r"iteration-(\d+)\.pt")
UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of atomic_write


def write(folder: PathLike, iteration: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes ``state`` as the checkpoint of an iteration, and removes all but the newest ``keep`` up to it.

    Args:
        folder: is made where it is missing.
        iteration: how many are done.
        state: state dicts, tensors, numbers and texts; see `random_state`.
        keep: 1 or more.

    Raises:
        OSError: the disk refuses; older checkpoints are still there.
        ValueError: the state holds something else, a number of NumPy's say, and would not load.
    """
    whole_number("keep", keep, 1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in [path for path in folder.iterdir() if UNFINISHED.fullmatch(path.name)]:
        left.unlink(missing_ok=True)
    path = folder / f"iteration-{iteration:08d}.pt"
    with atomic_write(path) as stream:
        try:
            torch.save({"iteration": iteration, **state}, stream)
        except RuntimeError as error:  # torch speaks of positions in its archive, and hides why they are wrong
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensor
    except pickle.UnpicklingError as error:
        path.unlink()
        text = str(error).replace("\n", " ")
        raise ValueError(f"state must hold state dicts, tensors, numbers and texts alone: {text}") from error
    # later ones were damaged and passed over, or this would not be written: they are no reason to remove a whole one
    for old in [path for path in existing(folder) if _number(path) <= iteration][:-keep]:
        old.unlink(missing_ok=True)
    return path


def existing(folder: PathLike) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])  # type: ignore[index]


def newest(folder: PathLike, *, device: str | torch.device = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that can be read, with its "iteration"; None where there is none.

    A damaged one (a disk that was full, a file cut short by hand) is passed over with a warning.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    paths = existing(folder)
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state
        except Exception as error:  # torch raises what it likes on a damaged file
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"{path}: cannot be read and is passed over: {reason}", stacklevel=2)
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints can be read")
    return None


def random_state() -> dict[str, Any]:
    """States of torch's generators, of the CPU and of every GPU."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Brings back what `random_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
