"""Many pictures: which files belong together, and processes that refine them, whatever becomes of a single one.

From Python:

    for job, result, reason in run(plan(Path("photos"), Path("labels"), ...), workers=4):
        print(job["image"], result or reason)
"""

import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from crfnet.refine import Refined, check_outputs, refine_file

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
LABEL_MAPS = (".png", ".bmp", ".tif", ".tiff", ".gif")

Job = dict[str, Any]  # the arguments of refine_file for one picture
Outcome = tuple[Job, Refined | None, str]  # the result, or None and the reason


def plan(
    image: Path,
    source: Path,
    *,
    probabilities: bool,
    output: Path,
    panel: Path | None = None,
    save_probs: Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """The files of each job: one for a picture; for a folder one for each picture, with the source of the same stem.

    A picture without a source gets a job that will say so. Output folders are made once all is checked.

    Raises:
        ValueError: files mixed with folders, an empty folder, two files of one stem, or unusable names of outputs.
        OSError: ``image`` or ``source`` is missing, an output exists (see `crfnet.refine.check_outputs`).
    """
    outputs = {"output": (output, ".png"), "panel": (panel, ".png"), "save_probs": (save_probs, ".npy")}
    many = image.is_dir()
    for path in (image, source):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    for path in (source, *(path for path, _ in outputs.values() if path is not None and path.exists())):
        if path.is_dir() != many:
            kinds = ("a folder", "a file") if many else ("a file", "a folder")
            raise ValueError(f"{image} is {kinds[0]}, but {path} is {kinds[1]}")

    suffixes, kind = ((".npy",), "probs") if probabilities else (LABEL_MAPS, "labels")
    if many:
        pictures, sources = by_stem(image, PICTURES), by_stem(source, suffixes)
        if not pictures:
            raise ValueError(f"{image}: no picture in this folder ({' '.join(PICTURES)})")
        jobs: list[Job] = []
        for stem, path in pictures.items():  # a source that is not there will be named when it is read
            jobs.append({"image": path, kind: sources.get(stem, source / f"{stem}{suffixes[0]}")})
    else:
        jobs = [{"image": image, kind: source}]
    inputs = [path for job in jobs for path in (job["image"], job[kind])]
    for name, (place, suffix) in outputs.items():
        if place is not None:
            for job in jobs:
                job[name] = place / f"{job['image'].stem}{suffix}" if many else place
    check_outputs([job.get(name) for job in jobs for name in ("output", "panel")], inputs, ".png", overwrite)
    check_outputs([job.get("save_probs") for job in jobs], inputs, ".npy", overwrite)
    for place, _ in outputs.values():
        if place is not None and many:
            place.mkdir(parents=True, exist_ok=True)
        elif place is not None and not place.absolute().parent.is_dir():
            raise FileNotFoundError(f"{place}: there is no folder {place.parent}")
    return [{**job, "overwrite": overwrite} for job in jobs]


def by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The visible files of some suffixes in a folder, in order of their names, by stem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path.name} have one stem: which is meant?")
            found[path.stem] = path
    return found


def run(jobs: list[Job], *, workers: int = 1, threads: int | None = None) -> Generator[Outcome, None, None]:
    """Refine every job, in this process or in ``workers`` others, and yield the outcomes as they come.

    Args:
        jobs: arguments of `crfnet.refine.refine_file`.
        workers: processes; with more than one the order of the outcomes is open.
        threads: torch threads of each process; by default torch's choice for one process, 1 for several.

    Closing the iterator, or an interrupt, lets the pictures in hand finish and drops the rest.
    """
    if workers == 1 or len(jobs) == 1:
        if threads is not None:
            torch.set_num_threads(threads)
        for job in jobs:
            yield (job, *_attempt(job))
        return
    # spawn: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads or 1,)
    )
    try:
        with _deaf():
            futures = {pool.submit(_attempt, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                yield (job, *future.result())
            except BrokenProcessPool:
                yield job, None, f"{job['image']}: a worker process died, perhaps for lack of memory; try fewer workers"
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignore interrupts; processes started meanwhile do so for life. Only a main thread may set this; others pass."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _attempt(job: Job) -> tuple[Refined | None, str]:
    try:
        return refine_file(**job), ""
    except (ValueError, OSError) as error:
        named = any(isinstance(value, Path) and str(value) in str(error) for value in job.values())
        return None, str(error) if named else f"{job['image']}: {error}"
    except Exception as error:  # the others must still be done, and this one named
        return None, f"{job['image']}: {type(error).__name__}: {error}"
