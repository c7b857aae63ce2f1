"""PASCAL VOC 2012 from its own folders, and the folder that its test server takes.

``VOCdevkit/VOC2012/{JPEGImages/<id>.jpg, SegmentationClass/<id>.png, ImageSets/Segmentation/<split>.txt}``; labels are
indexed PNGs: 0 background, 1 to 20 the classes, 255 void.

| split | images |
| --- | --- |
| train, val, trainval | 1464, 1449, 2913 |
| train_aug, trainval_aug | 10,582, 12,031: with the masks of SBD, see ``write_train_aug`` |
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from crfnet.data.lists import find_folder, path_below, read_list, want_file, want_pair
from crfnet.images import PathLike, label_picture, write_labels

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
RESULTS = "results/VOC{year}/Segmentation/comp6_test_cls"  # comp6: trained with more than VOC's own images


def voc_folder(root: PathLike, *, year: int = 2012, lists: str = "Segmentation") -> Path:
    """Finds the folder VOC2012 from itself, from VOCdevkit or from the folder that holds VOCdevkit.

    Raises:
        FileNotFoundError: none of them holds ``ImageSets/<lists>``; says where it looked. Or root is another year's.
    """
    name = f"VOC{year}"
    called = Path(root).absolute().name
    if re.fullmatch(r"VOC\d{4}", called) and called != name:
        raise FileNotFoundError(f"root {str(root)!r} is {called}; wanted {name}, or a folder that holds it")
    below = (name, f"VOCdevkit/{name}", f"TrainVal/VOCdevkit/{name}")  # TrainVal as the archive of 2011 has it
    return find_folder(root, f"ImageSets/{lists}", below, f"PASCAL VOC {year}")


def voc_files(root: PathLike, split: str, *, labels: str | None = None, year: int = 2012) -> list[tuple[Path, Path]]:
    """Lists the image and label file of every member of a split, in the order of its list.

    Args:
        root: the folder VOC2012, VOCdevkit or the one that holds VOCdevkit.
        split: name of a list in ``ImageSets/Segmentation``: train, val, trainval, train_aug, trainval_aug, or one of
            your own, of names or of ``/JPEGImages/x.jpg /SegmentationClassAug/x.png`` lines.
        labels: folder of the label images where the list holds names alone; SegmentationClass, or SegmentationClassAug
            for splits that end in ``_aug``.
        year: of the folder, for VOC 2011 say.

    Raises:
        FileNotFoundError: the folder, the list, an image or a label is missing.
        ValueError: the list is empty, or a path leads out of the folder.
    """
    folder, augmented = voc_folder(root, year=year), split.endswith("_aug")
    labels = labels or ("SegmentationClassAug" if augmented else "SegmentationClass")
    hint = " (crfnet.data.write_train_aug makes it)" if augmented else ""
    files = []
    for line in read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "one image name", hint):
        where, words = line
        if len(words) == 2 and "/" in words[0]:
            image, label = (path_below(folder, word, where) for word in words)
            files.append((want_file(image, f"{where}: the image"), want_file(label, f"{where}: the label")))
        else:
            image, label = folder / "JPEGImages" / f"{line.name}.jpg", folder / labels / f"{line.name}.png"
            files.append(want_pair(line, image, label))
    return files


def voc_images(root: PathLike, split: str = "test", *, year: int = 2012) -> list[Path]:
    """Lists the images of a split in the order of its list; needs no labels, which the test images have not.

    Args:
        root: the folder VOC2012, VOCdevkit or the one that holds VOCdevkit.
        split: name of a list in ``ImageSets/Segmentation``.
        year: of the folder.

    Raises:
        FileNotFoundError: the folder, the list or an image is missing.
        ValueError: the list is empty, or a path leads out of the folder.
    """
    folder, images = voc_folder(root, year=year), []
    for line in read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "one image name"):
        where, words = line
        path = (
            folder / "JPEGImages" / f"{line.name}.jpg" if "/" not in words[0] else path_below(folder, words[0], where)
        )
        images.append(want_file(path, f"{where}: the image"))
    return images


def write_voc_results(folder: PathLike, image_id: str, labels: ArrayLike, *, year: int = 2012) -> Path:
    """Writes ``folder/results/VOC2012/Segmentation/comp6_test_cls/<image_id>.png``, as VOC's test server wants it.

    Args:
        folder: where ``results`` goes; pack that folder to submit it.
        image_id: name of the test image without its ending.
        labels: ``(H, W)`` of 0..20 at the image's own size; no void.
        year: of the challenge.

    Raises:
        ValueError: a name with a folder, or labels of another shape or range.
    """
    if not image_id or Path(image_id).name != image_id or "\\" in image_id:
        raise ValueError(f"image_id must be a plain name such as '2008_000006', got {image_id!r}")
    array = np.asarray(labels)
    label_picture(array)  # checks the shape
    if array.max() >= len(VOC_CLASSES):
        raise ValueError(
            f"labels of {image_id} must lie in 0..{len(VOC_CLASSES) - 1}, got {array.min()}..{array.max()}"
        )
    path = Path(folder) / RESULTS.format(year=year) / f"{image_id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(path, array)
    return path
