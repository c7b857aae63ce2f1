"""Folders and list files of data sets, read so that whatever is missing or wrong is named.

A list holds a sample a line. Blank lines, Windows line endings and a byte order mark pass; a path that leads out of its
folder (``../``) does not.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from crfnet.images import PathLike

_ENDINGS = (".jpg", ".jpeg", ".png", ".mat")


class Line(NamedTuple):
    """One line of a list that is not blank."""

    where: str  # the file and the line's number, for messages
    words: list[str]

    @property
    def name(self) -> str:
        """The sample's name: the first word without folder and ending, as lists give either."""
        last = PurePosixPath(self.words[0].replace("\\", "/"))
        if ".." in last.parts or not last.name:
            raise ValueError(f"{self.where}: {self.words[0]!r} is no name; wanted one without '..'")
        return last.stem if last.suffix.lower() in _ENDINGS else last.name


def find_folder(root: PathLike, holds: str, below: Sequence[str], what: str) -> Path:
    """The folder that holds the file or folder ``holds``: ``root`` itself or one of those ``below`` it.

    Raises:
        FileNotFoundError: none does; says where it looked.
    """
    root = Path(root)
    candidates = [root, *(root / name for name in below)]
    for folder in candidates:
        if (folder / holds).exists():
            return folder
    looked = ", ".join(str(folder / holds) for folder in candidates)
    raise FileNotFoundError(f"root {str(root)!r} is no {what} folder: looked for {looked}")


def read_list(listing: Path, wanted: str, hint: str = "") -> list[Line]:
    """The lines of a list, named after its split.

    Raises:
        FileNotFoundError: there is no such list; names those that are there.
        ValueError: it is empty or no text.
    """
    if not listing.is_file():
        there = sorted(path.stem for path in listing.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"split {listing.stem!r} wants the list {listing} of {wanted}, which is missing{hint}; lists there: {there}"
        )
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing} is no text in UTF-8; wanted {wanted} a line") from error
    words = [line.split() for line in text.splitlines()]
    lines = [Line(f"{listing}, line {number}", found) for number, found in enumerate(words, 1) if found]
    if not lines:
        raise ValueError(f"{listing} is empty; wanted {wanted} a line")
    return lines


def path_below(folder: Path, name: str, where: str) -> Path:
    """``folder / name``, ``name`` as a list gives it: relative, or absolute within the data set (``/JPEGImages/...``).

    Raises:
        ValueError: it leads out of the folder.
    """
    parts = name.replace("\\", "/").lstrip("/").split("/")
    path = folder.joinpath(*parts)
    if ".." in parts or not path.is_relative_to(folder):  # on Windows, joining an absolute path forgets the folder
        raise ValueError(f"{where}: {name!r} leads out of the folder; wanted a path below {folder}")
    return path


def want_file(path: Path, what: str) -> Path:
    """``path``, if it is a file; ``what`` begins the message where it is not: who names it, and as what.

    Raises:
        FileNotFoundError: it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} is missing")
    return path


def want_pair(line: Line, image: Path, label: Path) -> tuple[Path, Path]:
    """Both files of the sample that ``line`` names.

    Raises:
        FileNotFoundError: one is missing.
    """
    for path, what in ((image, "image"), (label, "label")):
        want_file(path, f"{line.where} names {line.name!r}, but its {what}")
    return image, label
