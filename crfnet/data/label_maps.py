"""Label maps out of MATLAB's values, and the change from a data set's numbers to classes from 0 with 255 for void.

A value is nested as it was saved: a structure is a list of one dict, a list of them has more, an empty one is an empty
array, and a cell around any of them is another list.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crfnet.images import MAX_PIXELS, Uint8


def records(value: Any) -> list[Any]:
    """The structures in a list of them, through any cells around them; MATLAB's [] holds none."""
    if isinstance(value, list):
        return [record for item in value for record in records(item)]
    return [] if isinstance(value, np.ndarray) and value.size == 0 else [value]


def field(value: Any, name: str, path: Path) -> Any:
    """The field of one structure, out of whatever it is nested in.

    Raises:
        ValueError: not one structure, or one without this field; names the file.
    """
    found = records(value)
    if len(found) != 1 or not isinstance(found[0], dict) or name not in found[0]:
        raise ValueError(f"{path}: wanted one structure with the field {name!r}, got {_describe(found)}")
    return found[0][name]


def text(value: Any) -> str:
    """A string, out of whatever it is nested in."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return str(value)


def label_map(value: Any, what: str, path: Path) -> np.ndarray:
    """Whole numbers (H, W), signed.

    Raises:
        ValueError: anything else, or more than the limit of pixels; names the file.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.size == 0:
        raise ValueError(f"{path}: {what} must be numbers (H, W), got {_describe(records(value))}")
    if value.size > MAX_PIXELS:
        raise ValueError(f"{path}: {what} has {value.size} pixels, more than {MAX_PIXELS}")
    if value.dtype.kind == "f" and not (np.abs(value) < 2**31).all():  # NaN neither
        raise ValueError(f"{path}: {what} must be finite and whole, got {value.min()} to {value.max()}")
    whole = value.astype(np.int64)
    if (whole != value).any():
        raise ValueError(f"{path}: {what} must be whole numbers, got {value[whole != value][0]}")
    return whole


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


def _describe(found: list[Any]) -> str:
    """What came in place of a structure or of numbers, in words."""
    if len(found) != 1:
        return f"{len(found)} structures"
    if isinstance(found[0], dict):
        return f"a structure with the fields {list(found[0])}"
    if isinstance(found[0], np.ndarray):
        return f"{found[0].dtype} of shape {found[0].shape}"
    return f"the text {found[0]!r}" if isinstance(found[0], str) else "a value of another kind"
