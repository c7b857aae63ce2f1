"""PASCAL-Person-Part: six parts of persons and background, from PASCAL-Part's annotations; 1716 train, 1817 val.

Images are VOC 2010's; annotations are ``Annotations_Part/<id>.mat`` with the structure ``anno``: ``objects`` (class,
mask, parts), each part a ``part_name`` and a ``mask``. Where parts overlap, the later object and part wins. Lists of
names are not part of these annotations: DeepLab's pascal_person_part_trainval_list, or ``write_person_part_lists``.

The merge of parts is that of a public conversion script that cites DeepLab v2; its paper names the same six parts.
"""

import warnings
from pathlib import Path

import numpy as np

from crfnet.data.lists import find_folder, read_list, want_pair
from crfnet.data.matlab import field_of, label_map, read_mat, records, text
from crfnet.data.voc import voc_folder
from crfnet.images import PathLike, Uint8, atomic_write

_PARTS = {
    "background": "",
    "head": "head hair leye reye lear rear lebrow rebrow nose mouth",
    "torso": "torso neck",
    "upper arms": "luarm ruarm",
    "lower arms": "llarm rlarm lhand rhand",
    "upper legs": "luleg ruleg",
    "lower legs": "llleg rlleg lfoot rfoot",
}
PERSON_PART_CLASSES = tuple(_PARTS)
_CLASS_OF = {part: label for label, parts in enumerate(_PARTS.values()) for part in parts.split()}
_LISTS = "pascal_person_part_trainval_list"
COUNTS = {"train": 1716, "val": 1817}


def person_part_files(root: PathLike, split: str, *, voc: PathLike | None = None) -> list[tuple[Path, Path]]:
    """Lists image and .mat of a split; read the labels with ``person_part_labels``.

    Args:
        root: the folder that holds Annotations_Part and the lists, which may lie in pascal_person_part_trainval_list;
            or the one above it if this is called trainval, as in the archive.
        split: name of a list: train, val. Of a line only the first name counts: ``/JPEGImages/x.jpg ...`` or ``x``.
        voc: the folder VOC2010, VOCdevkit or the one that holds VOCdevkit; root, unless given.

    Raises:
        FileNotFoundError: a folder, the list, an image or an annotation is missing.
        ValueError: the list is empty, or a name leads out of the folder.
    """
    folder, images = _folders(root, voc)
    lists = folder / _LISTS if (folder / _LISTS).is_dir() else folder
    hint = " (crfnet.data.write_person_part_lists makes it)"
    return [
        want_pair(line, images / "JPEGImages" / f"{line.name}.jpg", folder / "Annotations_Part" / f"{line.name}.mat")
        for line in read_list(lists / f"{split}.txt", "one image name", hint)
    ]


def person_part_labels(path: Path) -> Uint8:
    """The labels of an annotation, (H, W) of 0..6.

    Raises:
        ValueError: damaged, another key or field, no object, masks of two sizes, an unknown part; names the file.
    """
    objects = records(field_of(read_mat(path, "anno"), "objects", path))
    if not objects:
        raise ValueError(f"{path}: anno.objects is empty; wanted one object or more")
    labels = np.zeros(label_map(field_of(objects[0], "mask", path), "mask", path).shape, np.uint8)
    for thing in objects:
        if text(field_of(thing, "class", path)) != "person":
            continue
        for part in records(field_of(thing, "parts", path)):
            name = text(field_of(part, "part_name", path))
            if name not in _CLASS_OF:
                raise ValueError(f"{path}: a person has the part {name!r}; wanted one of {sorted(_CLASS_OF)}")
            mask = label_map(field_of(part, "mask", path), f"mask of {name}", path)
            if mask.shape != labels.shape:
                raise ValueError(f"{path}: the mask of {name} is {mask.shape}, another {labels.shape}; wanted one size")
            labels[mask != 0] = _CLASS_OF[name]
    return labels


def write_person_part_lists(root: PathLike, *, voc: PathLike | None = None) -> tuple[Path, Path]:
    """Writes train.txt and val.txt beside Annotations_Part: the images of VOC 2010's lists with a part of a person.

    Takes some minutes, as it opens every annotation.

    Warns:
        UserWarning: they are not 1716 and 1817.

    Raises:
        FileNotFoundError: a folder, a list, an image or an annotation is missing.
        FileExistsError: there is a list of that name.
    """
    folder, images = _folders(root, voc)
    paths = {split: folder / f"{split}.txt" for split in COUNTS}
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already; move it away to have it written")
    found: dict[str, list[str]] = {split: [] for split in COUNTS}
    for split, names in found.items():
        for line in read_list(images / "ImageSets" / "Main" / f"{split}.txt", "one image name"):
            files = images / "JPEGImages" / f"{line.name}.jpg", folder / "Annotations_Part" / f"{line.name}.mat"
            if person_part_labels(want_pair(line, *files)[1]).any():
                names.append(line.name)
    for split, names in found.items():
        with atomic_write(paths[split]) as stream:
            stream.write("".join(f"{name}\n" for name in names).encode())
    for split, names in found.items():
        if len(names) != COUNTS[split]:
            said = f"{split} has {len(names)} images here; it has {COUNTS[split]} in DeepLab v2"
            warnings.warn(said, stacklevel=2)
    return paths["train"], paths["val"]


def _folders(root: PathLike, voc: PathLike | None) -> tuple[Path, Path]:
    folder = find_folder(root, "Annotations_Part", ("trainval",), "PASCAL-Part")
    return folder, voc_folder(root if voc is None else voc, year=2010, lists="Main")
