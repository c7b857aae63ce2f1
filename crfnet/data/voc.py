"""PASCAL VOC 2012 from its own folders.

``VOCdevkit/VOC2012/{JPEGImages/<id>.jpg, SegmentationClass/<id>.png, ImageSets/Segmentation/<split>.txt}``; labels are
indexed PNGs: 0 background, 1 to 20 the classes, 255 void.
"""

import os
from pathlib import Path

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc_folder(root: str | os.PathLike[str]) -> Path:
    """Finds the folder VOC2012 from itself, from VOCdevkit or from the folder that holds VOCdevkit.

    Raises:
        FileNotFoundError: none of the three holds ``ImageSets/Segmentation``; says where it looked.
    """
    root = Path(root)
    candidates = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
    for folder in candidates:
        if (folder / "ImageSets" / "Segmentation").is_dir():
            return folder
    looked = ", ".join(str(folder / "ImageSets" / "Segmentation") for folder in candidates)
    raise FileNotFoundError(f"root {str(root)!r} is no PASCAL VOC 2012 folder: looked for {looked}")


def voc_files(
    root: str | os.PathLike[str], split: str, *, labels: str = "SegmentationClass"
) -> list[tuple[Path, Path]]:
    """Lists the image and label file of every member of a split, in the order of its list.

    Args:
        root: the folder VOC2012, VOCdevkit or the one that holds VOCdevkit.
        split: name of a list in ``ImageSets/Segmentation``: train, val, trainval.
        labels: folder of the label images; ``SegmentationClassAug`` for the augmented set.

    Raises:
        FileNotFoundError: the folder, the list, an image or a label is missing.
        ValueError: the list is empty.
    """
    folder = voc_folder(root)
    names_file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not names_file.is_file():
        there = sorted(path.stem for path in names_file.parent.glob("*.txt"))
        raise FileNotFoundError(f"split {split!r} wants the list {names_file}, which is missing; lists there: {there}")
    names = [line.split()[0] for line in names_file.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{names_file} is empty; wanted one image name a line")
    files = [(folder / "JPEGImages" / f"{name}.jpg", folder / labels / f"{name}.png") for name in names]
    for image, label in files:
        for path, what in ((image, "image"), (label, "label")):
            if not path.is_file():
                raise FileNotFoundError(f"{names_file} names {image.stem!r}, but its {what} {path} is missing")
    return files
