"""The processes of torchrun: how they meet, which one this is, how many there are, and what all have, added or listed.

A script that begins with ``device = start("cuda")`` runs alone, and on several GPUs under
``torchrun --nproc-per-node 8 script.py``.
"""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # the others wait while the first searches or writes; of one that dies torchrun ends all


def start(device: str | torch.device) -> torch.device:
    """Joins the processes of torchrun, if it started this one, and returns the device to work on.

    "cuda" is then the GPU of this process's number on its machine, and the backend NCCL, otherwise gloo. Without
    torchrun, which sets WORLD_SIZE and more, nothing is joined, and "cuda" is the first GPU.

    Raises:
        ValueError: there is no such device, or the variables of torchrun are not all set.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, got {device!r}: {error}") from None
    several = "WORLD_SIZE" in os.environ and distributed.is_available()
    if device.type == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0)) if several else device.index or 0
        device = torch.device("cuda", number)  # with its number, which set_device insists on
        if number >= torch.cuda.device_count():
            raise ValueError(f"device must be there, got {device} of {torch.cuda.device_count()} GPUs that torch sees")
        torch.cuda.set_device(device)
    if several and not distributed.is_initialized():
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
        )
        atexit.register(_leave)
    return device


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def add_up(tensor: Tensor) -> Tensor:
    """The tensor, in place the sum of all processes' own: on a device that their backend serves."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def on_first(call: Callable[[], T]) -> T:
    """What ``call`` returns on the first process, which alone makes it; the others wait, and raise what it raised."""
    if world_size() == 1:
        return call()
    returned: Any = None
    raised: Exception | None = None
    if not rank():
        try:
            returned = call()
        except Exception as error:  # the others would wait for what never comes
            raised = error
    returned, raised = gather((returned, raised))[0]
    if raised is not None:
        raise raised
    return returned


def gather(thing: Any) -> list[Any]:
    """What every process has, in their order; each waits for all others."""
    things = [thing] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(things, thing)
    return things
