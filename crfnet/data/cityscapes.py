"""Cityscapes: 19 classes as trainIds, and back to labelIds for its evaluation server.

``<root>/leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png`` with
``<root>/gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png``, 2048x1024; 2975 train, 500 val, 1525 test,
the labels of test without content. Source: cityscapesScripts, helpers/labels.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, want_file
from crfnet.data.samples import VOID, image_sizes
from crfnet.images import PathLike, Uint8, atomic_write, label_picture, read_labels

# class, in the order of the trainIds: labelId, colour
_TABLE = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
CITYSCAPES_CLASSES = tuple(_TABLE)
CITYSCAPES_LABEL_IDS = tuple(label for label, _ in _TABLE.values())  # labelId of each trainId
CITYSCAPES_PALETTE = np.zeros((256, 3), np.uint8)  # of trainIds, for pictures; void is black
CITYSCAPES_PALETTE[: len(_TABLE)] = [colour for _, colour in _TABLE.values()]
# labelIds run from 0 to 33; -1, the licence plate, is 255 in 8 bits
_TRAIN_IDS = {label: VOID for label in (*range(34), 255)} | {
    label: class_ for class_, label in enumerate(CITYSCAPES_LABEL_IDS)
}
CITYSCAPES_ENDINGS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_labelIds.png"
_IMAGE_ENDING, _LABEL_ENDING, _RESULT_ENDING = CITYSCAPES_ENDINGS


def cityscapes_files(root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists image and labelIds of a split, by city and name; read the labels with ``cityscapes_labels``.

    Args:
        root: the folder that holds leftImg8bit and gtFine, or the one above it if this is called cityscapes.
        split: train, val or test.

    Raises:
        FileNotFoundError: the folder, the split, its images or a label is missing.
        ValueError: an image is not named ``<city>_<seq>_<frame>_leftImg8bit.png`` after its city.
    """
    folder, files = _folder(root), []
    for image in cityscapes_images(root, split):
        label = folder / "gtFine" / split / image.parent.name / f"{_frame(image)}{_LABEL_ENDING}"
        files.append((image, want_file(label, f"{image} is there, but its label")))
    return files


def cityscapes_images(root: PathLike, split: str = "test") -> list[Path]:
    """Lists the images of a split, by city and name; needs no labels.

    Raises:
        FileNotFoundError: the folder, the split or its images are missing.
        ValueError: an image is not named ``<city>_<seq>_<frame>_leftImg8bit.png`` after its city.
    """
    folder = _folder(root) / "leftImg8bit" / split
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise FileNotFoundError(f"split {split!r} wants the folder {folder}, which is missing; splits there: {there}")
    images = sorted(folder.glob("*/*.png"))
    for image in images:
        city = image.parent.name
        if not _frame(image).startswith(f"{city}_"):
            raise ValueError(f"{image} lies in the folder of {city!r}; wanted a name that begins with it")
    if not images:
        raise FileNotFoundError(f"{folder} holds no <city>/<city>_<seq>_<frame>{_IMAGE_ENDING}")
    return images


def _folder(root: PathLike) -> Path:
    return find_folder(root, "leftImg8bit", ("cityscapes", "Cityscapes"), "Cityscapes")


def cityscapes_labels(path: Path) -> Uint8:
    """The trainIds of a ``_labelIds.png``, (H, W) of 0..18 and 255.

    Raises:
        ValueError: damaged, an unknown labelId, or a file that says it holds trainIds already; names the file.
    """
    if "TrainIds" in Path(path).name:
        raise ValueError(f"{path} holds trainIds; wanted a *{_LABEL_ENDING}, or crfnet.images.read_labels for this one")
    return relabel(read_labels(path), _TRAIN_IDS, path, "labelIds 0..33")


def write_cityscapes_result(folder: PathLike, image_file: PathLike, train_ids: ArrayLike) -> Path:
    """Writes the labelIds of one image as ``folder/<city>_<seq>_<frame>_labelIds.png``, grey, for the server.

    Args:
        folder: made if missing; pack it to submit it.
        image_file: the image; gives the name and the size.
        train_ids: ``(H, W)`` of 0..18 at the image's own size; no void.

    Raises:
        ValueError: another name, shape, size or range.
    """
    image_file = Path(image_file)
    name = _frame(image_file)
    array = np.asarray(train_ids)
    label_picture(array)  # checks the shape
    if array.max() >= len(CITYSCAPES_CLASSES):
        raise ValueError(
            f"train_ids of {name} must lie in 0..{len(CITYSCAPES_CLASSES) - 1}, got {array.min()}..{array.max()}"
        )
    size = tuple(image_sizes([(image_file, image_file)])[0].tolist())
    if array.shape != size:
        raise ValueError(f"train_ids of {name} must have the size {size} of {image_file}, got {array.shape}")
    path = Path(folder) / cityscapes_result_name(image_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        Image.fromarray(np.array(CITYSCAPES_LABEL_IDS, np.uint8)[array.astype(np.uint8)]).save(stream, "PNG")
    return path


def cityscapes_result_name(image_file: Path) -> str:
    """``<city>_<seq>_<frame>_labelIds.png``, the name under which the server takes the labels of an image."""
    return f"{_frame(image_file)}{_RESULT_ENDING}"


def cityscapes_frame(path: Path, endings: Sequence[str] = CITYSCAPES_ENDINGS) -> str:
    """``<city>_<seq>_<frame>``, what the names of an image, its labels and its result share.

    Raises:
        ValueError: another name, or one that does not end in one of ``endings``.
    """
    match = re.fullmatch(rf"([^_]+_\d{{6}}_\d{{6}})({'|'.join(map(re.escape, endings))})", path.name)
    if not match:
        raise ValueError(f"{path}: wanted a name <city>_<seq, 6 digits>_<frame, 6 digits>{' or '.join(endings)}")
    return match[1]


def _frame(image: Path) -> str:
    return cityscapes_frame(image, (_IMAGE_ENDING,))
