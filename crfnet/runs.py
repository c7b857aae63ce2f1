"""The folder of a run, and the settings in it, which a run that goes on must share.

A checkpoint knows its optimiser, its samples and their transform, but not the weights or CRF that a recipe began with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crfnet.images import atomic_write
from crfnet.processes import on_first
from crfnet.weights import want_safetensors

# may differ when a run goes on: what is written, where files lie (a checkpoint knows their names) and where it runs,
# though other threads and devices have other last bits
FREE = (
    "checkpoint_every", "device", "out", "resume", "root", "sbd", "submission", "tensorboard", "threads", "voc",
    "workers",
)  # fmt: skip


def begin(config: Any, *, free: Sequence[str] = (), stages: Sequence[str] = ("*",), networks: bool = True) -> Path:
    """Makes the folder ``config.out``, writes config.json into it and prints the settings; returns the folder.

    Args:
        config: a recipe's dataclass with ``out`` and ``resume``. Of several processes the first writes.
        free: further settings that may differ when a run goes on, as how many stages there are.
        stages: folders of the run, where another run's checkpoints are in the way; patterns.
        networks: whether they will be saved, as safetensors.

    Raises:
        ValueError: ``resume`` with other settings than those in config.json, which it names, or without it checkpoints
            of an earlier run, which then stays as it is.
        ImportError: ``networks`` without the library safetensors.
    """
    if networks:
        want_safetensors()
    return on_first(lambda: _begin(config, Path(config.out), {*FREE, *free}, stages))


def _begin(config: Any, folder: Path, free: set[str], stages: Sequence[str]) -> Path:
    found = sorted(path for stage in stages for path in folder.glob(f"{stage}/iteration-*.pt"))
    if found and not config.resume:
        raise ValueError(f"{found[-1]} is of a run before: resume goes on from it; or take another out")
    print(config, flush=True)
    now = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they will come back
    path = folder / "config.json"
    if config.resume and path.exists():
        try:
            then = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON, so what the run began with is not known: {error}") from error
        names = sorted((now.keys() | then.keys()) - free)
        differ = [
            f"{name} {then.get(name)} then and {now.get(name)} now" for name in names if then.get(name) != now.get(name)
        ]
        if differ:
            raise ValueError(f"resume wants the settings of {path}, got {'; '.join(differ)}")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write((json.dumps(now, indent=2) + "\n").encode())
    return folder
