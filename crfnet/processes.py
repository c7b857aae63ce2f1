"""The processes of torchrun: which one this is, how many there are, and what all of them have, added or listed."""

from typing import Any

from torch import Tensor, distributed


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


def gather(thing: Any) -> list[Any]:
    """What every process has, in their order; each waits for all others."""
    things = [thing] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(things, thing)
    return things
