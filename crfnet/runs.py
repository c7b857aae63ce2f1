"""The folder of a run: the settings it was made with, which one that goes on must share.

A checkpoint knows its optimiser and its samples, but not the transform, weights or CRF that a recipe began with.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crfnet.images import atomic_write
from crfnet.processes import rank

# what changes nothing in the result of a stage: where it runs, what is written, how many stages there are
FREE = (
    "checkpoint_every", "device", "last", "out", "resume", "rows", "submission", "tensorboard", "threads", "workers",
)  # fmt: skip


def begin(config: Any) -> Path:
    """Makes the folder ``config.out``, writes config.json into it and prints the settings; returns the folder.

    Args:
        config: a recipe's dataclass with ``out`` and ``resume``. Of several processes the first writes.

    Raises:
        ValueError: ``resume`` with other settings than those in config.json; it names them.
    """
    folder = Path(config.out)
    if rank():
        return folder
    print(config, flush=True)
    now = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they will come back
    path = folder / "config.json"
    if config.resume and path.exists():
        try:
            then = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON, so what the run began with is not known: {error}") from error
        names = sorted((now.keys() | then.keys()) - set(FREE))
        differ = [
            f"{name} {then.get(name)} then and {now.get(name)} now" for name in names if then.get(name) != now.get(name)
        ]
        if differ:
            raise ValueError(f"resume wants the settings of {path}, got {'; '.join(differ)}")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write((json.dumps(now, indent=2) + "\n").encode())
    return folder
