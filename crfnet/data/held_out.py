"""A part of a data set that is kept out of training, for choices."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from crfnet.inputs import whole_number

File = TypeVar("File")


def hold_out(files: Sequence[File], count: int, *, seed: int, least: int = 0) -> tuple[list[File], list[File]]:
    """``count`` files drawn by chance and all others, both in the order of the draw.

    Args:
        files: of a training set.
        count: how many to hold out; at least one other stays.
        seed: of the draw, NumPy's.
        least: the smallest ``count`` that makes sense.

    Raises:
        ValueError: ``count`` below ``least``, or nothing left to train on.
    """
    whole_number("seed", seed, 0)
    if not least <= count < len(files):
        raise ValueError(f"held_out: count must be {least}..{len(files) - 1} of {len(files)} files, got {count}")
    order = [files[index] for index in np.random.default_rng(seed).permutation(len(files))]
    return order[:count], order[count:]
