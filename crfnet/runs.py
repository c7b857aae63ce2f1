"""The folder of a run, and the settings in it, which a run that goes on must share.

A checkpoint knows its optimiser and its samples, but not the transform, weights or CRF that a recipe began with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crfnet.images import atomic_write
from crfnet.processes import rank
from crfnet.weights import want_safetensors

# may differ when a run goes on: where it runs, though other threads and devices have other last bits; what is written
FREE = ("checkpoint_every", "device", "out", "resume", "submission", "tensorboard", "threads", "workers")


def begin(config: Any, *, free: Sequence[str] = (), networks: bool = True) -> Path:
    """Makes the folder ``config.out``, writes config.json into it and prints the settings; returns the folder.

    What would end the run hours later is said now, and nothing of an earlier run is touched.

    Args:
        config: a recipe's dataclass with ``out`` and ``resume``. Of several processes the first writes.
        free: further settings that may differ when a run goes on, as how many stages there are.
        networks: whether they will be saved, as safetensors.

    Raises:
        ValueError: ``resume`` with other settings than those in config.json, which it names, or without it checkpoints
            of an earlier run.
        ImportError: ``networks`` without the library safetensors.
    """
    folder = Path(config.out)
    if networks:
        want_safetensors()
    if rank():
        return folder
    if not config.resume and (found := sorted(folder.glob("*/iteration-*.pt"))):
        raise ValueError(f"{found[-1]} is of a run before: resume goes on from it; or take another out")
    print(config, flush=True)
    now = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they will come back
    path = folder / "config.json"
    if config.resume and path.exists():
        try:
            then = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON, so what the run began with is not known: {error}") from error
        names = sorted((now.keys() | then.keys()) - {*FREE, *free})
        differ = [
            f"{name} {then.get(name)} then and {now.get(name)} now" for name in names if then.get(name) != now.get(name)
        ]
        if differ:
            raise ValueError(f"resume wants the settings of {path}, got {'; '.join(differ)}")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write((json.dumps(now, indent=2) + "\n").encode())
    return folder
