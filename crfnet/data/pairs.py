"""Any folder with ``train.txt`` and ``val.txt`` of ``image label`` lines, paths relative to the folder.

The list format of SegNet's CamVid. Label files are 8-bit PNGs of class indices, grey or with a palette.
"""

import os
from pathlib import Path


def pairs_files(root: str | os.PathLike[str], split: str) -> list[tuple[Path, Path]]:
    """Lists the image and label file of every line of ``root/<split>.txt``, in order.

    Raises:
        FileNotFoundError: the folder, the list, or a file that it names is missing.
        ValueError: the list is empty, or a line does not hold two paths; names file and line.
    """
    root = Path(root)
    listing = root / f"{split}.txt"
    if not root.is_dir():
        raise FileNotFoundError(f"root {str(root)!r} is no folder; wanted one that holds train.txt and val.txt")
    if not listing.is_file():
        raise FileNotFoundError(f"split {split!r} wants the list {listing} of `image label` lines, which is missing")
    files = []
    for number, line in enumerate(listing.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{listing}, line {number}: wanted two paths `image label`, got {line!r}")
        image, label = (root / word.lstrip("/") for word in words)
        for path, what in ((image, "image"), (label, "label")):
            if not path.is_file():
                raise FileNotFoundError(f"{listing}, line {number}: the {what} {path} is missing")
        files.append((image, label))
    if not files:
        raise ValueError(f"{listing} is empty; wanted one `image label` pair a line")
    return files
