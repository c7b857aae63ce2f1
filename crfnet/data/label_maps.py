"""A data set's numbers as classes from 0, with 255 for void."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crfnet.images import Uint8


def relabel(labels: np.ndarray, classes: Mapping[int, int], path: Path, wanted: str) -> Uint8:
    """The class of each label, 0..255.

    Raises:
        ValueError: labels that ``classes`` does not know; names file and labels, and says what was ``wanted``.
    """
    low, high = min(classes), max(classes)
    table = np.full(high - low + 1, -1, np.int16)
    table[[label - low for label in classes]] = list(classes.values())
    index = labels.astype(np.int64) - low
    known = (index >= 0) & (index < len(table))
    found = table[np.where(known, index, 0)]
    wrong = ~known | (found < 0)
    if wrong.any():
        raise ValueError(f"{path} holds the labels {np.unique(labels[wrong]).tolist()}; wanted {wanted}")
    return found.astype(np.uint8)
