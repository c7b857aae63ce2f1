"""NYUDv2 with 40 classes in FCN's layout, with depth and HHA: 381 train, 414 val, 654 test.

``<root>/{data/images, data/depth, data/hha}/img_<n>.png``, ``<root>/segmentation/img_<n>.mat`` (key ``segmentation``: 0
void, 1 to 40 the classes) and lists ``<root>/<split>.txt`` of numbers n. HHA is depth as three channels in 0..255:
disparity, height above the floor, angle to gravity. Source: FCN's nyud_layers.py.

| reader | channels | network (crfnet.models) |
| --- | --- | --- |
| the default | RGB | FCN32s(40, convention=NYUD_COLOUR) |
| ``read_hha`` | HHA | FCN32s(40, convention=NYUD_HHA) |
| ``read_colour_hha`` | RGB, HHA | LateFusionFCN |
| ``read_colour_depth`` | RGB, depth in the unit of its PNG | FCN32s(40, convention=NYUD_COLOUR_DEPTH) |
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, read_list, want_file, want_pair
from crfnet.data.matlab import label_map, read_mat
from crfnet.data.samples import VOID
from crfnet.images import MAX_PIXELS, PathLike, Uint8, load_pixels, opened, read_image

NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)  # fmt: skip
_CLASSES = {0: VOID} | {label: label - 1 for label in range(1, 41)}


def nyud_files(root: PathLike, split: str, *, also: Sequence[str] = ()) -> list[tuple[Path, Path]]:
    """Lists colour image and .mat of a split; read the labels with ``nyud_labels``.

    Args:
        root: the folder that holds data and segmentation, or the one above it if this is called nyud.
        split: train, val, test, or trainval: train, then val, unless there is a list of that name.
        also: further folders of ``data`` in which every image must be: depth, hha.

    Raises:
        FileNotFoundError: the folder, the list, an image or a label is missing.
        ValueError: the list is empty, or a name leads out of the folder.
    """
    folder = find_folder(root, "segmentation", ("nyud", "NYUDv2"), "NYUDv2")
    whole = split != "trainval" or (folder / "trainval.txt").is_file()
    files = []
    for part in (split,) if whole else ("train", "val"):
        for line in read_list(folder / f"{part}.txt", "one image number"):
            name = f"img_{line.name.removeprefix('img_')}"
            image = folder / "data" / "images" / f"{name}.png"
            files.append(want_pair(line, image, folder / "segmentation" / f"{name}.mat"))
            for kind in also:
                want_file(_sibling(image, kind), f"{line.where} names {line.name!r}, but its {kind}")
    return files


def nyud_labels(path: Path) -> Uint8:
    """The labels of a file in ``segmentation``, (H, W) of 0..39 and 255.

    Raises:
        ValueError: damaged, another key, or an unknown label; names the file.
    """
    labels = label_map(read_mat(path, "segmentation"), "segmentation", path)
    return relabel(labels, _CLASSES, path, "0 for void and 1..40")


def read_hha(image_file: Path) -> np.ndarray:
    """HHA of a colour image's name, (3, H, W) float32."""
    return _channels(read_image(_sibling(image_file, "hha")))


def read_colour_hha(image_file: Path) -> np.ndarray:
    """Colour and HHA, (6, H, W) float32.

    Raises:
        ValueError: sizes differ; names both files.
    """
    return _together(image_file, "hha", read_hha(image_file))


def read_colour_depth(image_file: Path) -> np.ndarray:
    """Colour and depth, (4, H, W) float32, depth in the unit of its PNG.

    Raises:
        ValueError: sizes differ, or a depth is not positive (its logarithm is taken); names the file.
    """
    path = _sibling(image_file, "depth")
    with opened(path, MAX_PIXELS) as picture:  # the limit on pixels and the messages are those of other pictures
        load_pixels(picture, MAX_PIXELS)
        if picture.mode not in ("L", "I", "I;16", "I;16B", "I;16L"):
            raise ValueError(f"pixels of type {picture.mode}; depth is a grey PNG of 8 or 16 bits")
        depth = np.array(picture, np.float32)
        if depth.min() <= 0:
            raise ValueError(f"{(depth <= 0).sum()} depths are not positive; wanted all, their logarithm is taken")
    return _together(image_file, "depth", depth[None])


def _sibling(image_file: Path, kind: str) -> Path:
    """The file of that kind: data/images/img_1.png → data/hha/img_1.png."""
    return Path(image_file).parents[1] / kind / Path(image_file).name


def _channels(picture: Uint8) -> np.ndarray:
    return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)


def _together(image_file: Path, kind: str, more: np.ndarray) -> np.ndarray:
    colour = _channels(read_image(image_file))
    if colour.shape[1:] != more.shape[1:]:
        raise ValueError(
            f"{_sibling(image_file, kind)} is {more.shape[2]}x{more.shape[1]} pixels, "
            f"its image {image_file} {colour.shape[2]}x{colour.shape[1]}; wanted the same size"
        )
    return np.concatenate([colour, more])
