"""Variables of MATLAB's files, read by scipy, as plain lists and dicts.

| in MATLAB | in scipy | here |
| --- | --- | --- |
| cell | array of objects | list, by columns |
| structure | array of records, (1, 1) for one alone | list of dicts, by columns; [] for one without fields |
| text | array of str | str |
| numbers, logical | array | the same array |

A value is nested as it was saved, each cell around it another list, through which ``records``, ``field_of``, ``text``
and ``label_map`` look. MATLAB's [] is an empty array.
"""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from crfnet.images import MAX_PIXELS


def read_mat(path: Path, key: str) -> Any:
    """The variable ``key`` of a .mat file of version 4 to 7.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: damaged, truncated, of version 7.3, or without the key; names the file.
    """
    with open(path, "rb") as stream:
        try:
            variables = scipy.io.loadmat(stream)
        except Exception as error:  # scipy's readers raise what they like on damaged files
            raise ValueError(f"{path}: cannot be read as a MATLAB file: {type(error).__name__}: {error}") from None
    if key not in variables:
        names = sorted(name for name in variables if not name.startswith("__"))
        raise ValueError(f"{path}: no variable {key!r}, got {names}")
    return _plain(variables[key])


def _plain(value: Any) -> Any:
    if getattr(value, "dtype", None) is None:
        return [] if value is None else value
    if value.dtype.names:
        return [{name: _plain(record[name]) for name in value.dtype.names} for record in value.ravel("F")]
    if value.dtype == object:
        return [_plain(item) for item in value.ravel("F")]
    return "".join(value.ravel()) if value.dtype.kind == "U" else value


def records(value: Any) -> list[Any]:
    """The structures in a list of them, through any cells around them; MATLAB's [] holds none."""
    if isinstance(value, list):
        return [record for item in value for record in records(item)]
    return [] if isinstance(value, np.ndarray) and value.size == 0 else [value]


def field_of(value: Any, name: str, path: Path) -> Any:
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


def _describe(found: list[Any]) -> str:
    """What came in place of a structure or of numbers, in words."""
    if len(found) != 1:
        return f"{len(found)} structures"
    if isinstance(found[0], dict):
        return f"a structure with the fields {list(found[0])}"
    if isinstance(found[0], np.ndarray):
        return f"{found[0].dtype} of shape {found[0].shape}"
    return f"the text {found[0]!r}" if isinstance(found[0], str) else "a value of another kind"
