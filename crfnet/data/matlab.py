"""Variables of MATLAB's files, read by scipy, as plain lists and dicts.

| in MATLAB | in scipy | here |
| --- | --- | --- |
| cell | array of objects | list, by columns |
| structure | array of records, (1, 1) for one alone | list of dicts, by columns; [] for one without fields |
| text | array of str | str |
| numbers, logical | array | the same array |
"""

from pathlib import Path
from typing import Any

import scipy.io


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
