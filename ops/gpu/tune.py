"""Which block sizes a kernel runs with: a fixed default, or on request the fastest of a few, measured here and kept.

    with autotuning(): ...        or the environment variable CRFNET_AUTOTUNE=1 before the start

Another block size adds up in another order, so that results differ in their last bits: under
``torch.use_deterministic_algorithms(True)`` the defaults are used, always. What was measured is kept in
``$XDG_CACHE_HOME/crfnet/autotune.json`` (``~/.cache`` by default), by device and versions.
"""

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import on_device_of

Config = dict[str, int]
Run = Callable[[Config], object]

BUDGET = 5.0  # seconds for a key, compilers included: after it no candidate is begun and no round of measuring
ROUNDS = 7  # times that each candidate is measured
MARGIN = 0.02  # by this fraction a candidate must beat the default; less is noise
HEAD_START = 10**6  # cycles, about half a millisecond, that the device idles while the launch catches up with it

_on = os.environ.get("CRFNET_AUTOTUNE") == "1"
_chosen: dict[str, dict[str, Config]] = {}  # of each device, by kernel and key; what the file holds and what is new


@contextmanager
def autotuning(on: bool = True) -> Iterator[None]:
    """Within it, kernels measure their configurations the first time they meet a shape; for the whole process."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def pick(name: str, key: tuple[object, ...], candidates: Sequence[Config], run: Run, tensor: Tensor) -> Config:
    """The configuration to launch a kernel with.

    Args:
        name: of the kernel.
        key: all that the best choice may depend on, such as the sizes; few different ones should occur.
        candidates: the default, then others.
        run: launches the kernel with a candidate. It may run any number of times, and must leave the same results.
        tensor: one of the kernel's tensors; its device is what counts.

    Returns:
        the default unless tuning is on; then what was measured to be fastest, now or earlier. Nothing is measured
        while a CUDA graph is captured or a compiler traces.

    Raises:
        RuntimeError: not one candidate could be launched.
    """
    if not _on or len(candidates) == 1 or not _may_choose(tensor):
        return candidates[0]
    device, entry = _device(tensor), f"{name} {key!r}"
    known = _known(device).get(entry)
    if known is not None and known in candidates:  # a file of other times may name what no longer ships
        return known
    if _busy():
        return candidates[0]
    with on_device_of(tensor):
        best = _fastest(name, key, candidates, run)
    _known(device)[entry] = best
    _write(device)
    return best


def _may_choose(tensor: Tensor) -> bool:
    return tensor.is_cuda and not torch.are_deterministic_algorithms_enabled()


def _busy() -> bool:
    """Whether launching and waiting would disturb what is going on."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _fastest(name: str, key: tuple[object, ...], candidates: Sequence[Config], run: Run) -> Config:
    """The candidate of least median time, measured in rounds so that a change of clocks hits all alike."""
    from triton.errors import TritonError  # of the compiler and of resources; a fault of the device is none of these

    begun, failures = _now(), []
    times: list[tuple[Config, list[float]]] = []
    for config in candidates:
        if times and _now() - begun > BUDGET:
            break
        try:
            run(config)
        except TritonError as failure:
            failures.append(f"{config}: {failure}")
        else:
            times.append((config, []))
    if not times:
        raise RuntimeError(f"kernel {name} for {key} cannot be launched in any configuration: " + "; ".join(failures))
    for _ in range(ROUNDS):
        for config, seconds in times:
            seconds.append(_seconds(run, config))
        if _now() - begun > BUDGET:
            break

    def cost(measured: tuple[Config, list[float]]) -> float:
        config, seconds = measured
        return statistics.median(seconds) * (1.0 if config is candidates[0] else 1.0 + MARGIN)

    return min(times, key=cost)[0]


_now = time.perf_counter


def _seconds(run: Run, config: Config) -> float:
    """Of one run on the device."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)  # without it a short kernel would be timed by how slowly Python launches it
    start.record()
    run(config)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _device(tensor: Tensor) -> str:
    return _name(tensor.device.index or 0)


@cache
def _name(index: int) -> str:
    """The device and all that makes the code which runs on it."""
    import triton

    from crfnet import __version__  # not at the top: crfnet itself imports ops

    properties = torch.cuda.get_device_properties(index)
    capability = getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}")
    return f"{properties.name}, {capability}, triton {triton.__version__}, crfnet {__version__}"


def _known(device: str) -> dict[str, Config]:
    if device not in _chosen:
        _chosen[device] = _read().get(device, {})
    return _chosen[device]


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crfnet" / "autotune.json"


def _read() -> dict[str, dict[str, Config]]:
    """What the file holds, of all devices; nothing, with a warning, if it is damaged."""
    try:
        held = json.loads(_path().read_text(encoding="utf-8"))
        return {device: {entry: dict(config) for entry, config in found.items()} for device, found in held.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"measured block sizes are not read: {_path()}: {error}", stacklevel=2)
        return {}


def _write(device: str) -> None:
    """Add what is known of the device to the file, whole or not at all; without the file the process goes on."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held: dict[str, Any] = _read()  # again: another process may have added to it
        held[device] = held.get(device, {}) | _chosen[device]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as new:
            json.dump(held, new, indent=1, sort_keys=True)
        os.replace(new.name, path)
    except OSError as error:
        warnings.warn(f"measured block sizes are not kept: {path}: {error}", stacklevel=2)
