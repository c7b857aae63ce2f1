"""Any folder with ``train.txt`` and ``val.txt`` of ``image label`` lines, paths relative to the folder.

The list format of SegNet's CamVid. Label files are 8-bit PNGs of class indices, grey or with a palette.
"""

from pathlib import Path

from crfnet.data.lists import path_below, read_list, want_file
from crfnet.images import PathLike


def pairs_files(root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists the image and label file of every line of ``root/<split>.txt``, in order.

    Raises:
        FileNotFoundError: the folder, the list, or a file that it names is missing.
        ValueError: the list is empty, a line does not hold two paths, or one leads out of the folder; names the line.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root {str(root)!r} is no folder; wanted one that holds train.txt and val.txt")
    files = []
    for where, words in read_list(root / f"{split}.txt", "one `image label` pair"):
        if len(words) != 2:
            raise ValueError(f"{where}: wanted two paths `image label`, got {' '.join(words)!r}")
        image, label = (path_below(root, word, where) for word in words)
        files.append((want_file(image, f"{where}: the image"), want_file(label, f"{where}: the label")))
    return files
