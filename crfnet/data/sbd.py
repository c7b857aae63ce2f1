"""SBD, the Semantic Boundaries Dataset, alone and as VOC 2012's train_aug.

``benchmark_RELEASE/dataset/{img/<id>.jpg, cls/<id>.mat, train.txt, val.txt}``; labels are
``GTcls.Segmentation`` of the .mat: 0 background, 1 to 20 VOC's classes, no void.

| list | images | how |
| --- | --- | --- |
| SBD train, val | 8498, 2857 | its own lists |
| train_aug | 10,582 | (SBD train + SBD val + VOC 2012 train) - VOC 2012 val |
| trainval_aug | 12,031 | train_aug + VOC 2012 val |
| seg11valid | 736 | VOC 2011 val - SBD train: what FCN evaluates on |
| CRF-RNN's train | 11,685 | VOC 2012 train + SBD train + SBD val, of which 1103 are in VOC 2012 val |
| CRF-RNN's val | 346 | VOC 2012 val - SBD: the reduced validation set |

Source: TransformBerkeleyVOC2011Annot.m of DeepLab; data/pascal of FCN's repository; arXiv:1502.03240, section 7.
"""

import warnings
from pathlib import Path

import numpy as np

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, read_list, want_file, want_pair
from crfnet.data.matlab import field_of, label_map, read_mat
from crfnet.data.voc import VOC_CLASSES, voc_files, voc_folder
from crfnet.images import PathLike, Uint8, atomic_write, read_labels, write_labels

COUNTS = {
    "train_aug": 10_582, "trainval_aug": 12_031, "seg11valid": 736, "CRF-RNN's train": 11_685, "CRF-RNN's val": 346,
}  # fmt: skip
_CLASSES = {label: label for label in range(len(VOC_CLASSES))}
_WITH_VOID = {**_CLASSES, 255: 255}
_AUG_LINE = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"


def sbd_folder(root: PathLike) -> Path:
    """Finds SBD's folder ``dataset`` from itself, from benchmark_RELEASE or from the folder that holds that.

    Raises:
        FileNotFoundError: none of the three holds ``cls``; says where it looked.
    """
    return find_folder(root, "cls", ("dataset", "benchmark_RELEASE/dataset"), "SBD")


def sbd_files(root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists image and .mat of every member of SBD's ``train`` or ``val``; read the labels with ``sbd_labels``.

    Raises:
        FileNotFoundError: the folder, the list, an image or a label is missing.
        ValueError: the list is empty, or a name leads out of the folder.
    """
    folder = sbd_folder(root)
    return [
        want_pair(line, folder / "img" / f"{line.name}.jpg", folder / "cls" / f"{line.name}.mat")
        for line in read_list(folder / f"{split}.txt", "one image name")
    ]


def sbd_labels(path: Path) -> Uint8:
    """The labels of a file in ``cls``, (H, W) of 0..20.

    Raises:
        ValueError: damaged, another key or field, or an unknown label; names the file.
    """
    found = field_of(read_mat(path, "GTcls"), "Segmentation", path)
    return relabel(label_map(found, "GTcls.Segmentation", path), _CLASSES, path, "0..20")


def write_train_aug(voc_root: PathLike, sbd_root: PathLike) -> tuple[Path, Path]:
    """Adds train_aug and trainval_aug to a VOC 2012 folder and returns their lists; ``voc_files`` reads them.

    Writes ``SegmentationClassAug/<id>.png``, VOC's own mask where there is one and SBD's elsewhere, then the two lists
    in ``ImageSets/Segmentation``. Nothing of VOC or SBD is changed. Each file appears whole or not at all, the lists
    last. Masks that are there without the lists, as after an interruption, must hold what would be written; with both
    lists, whose order is free, they are left as they are and only missing ones written.

    Warns:
        UserWarning: the lists do not have 10,582 and 12,031 lines, as when a part of either data set is there.

    Raises:
        FileNotFoundError: a folder, list, image or mask is missing.
        FileExistsError: there is another list of that name, or without the lists another mask.
        ValueError: a damaged mask or one with unknown labels; names the file.
    """
    voc, sbd = voc_folder(voc_root), sbd_folder(sbd_root)
    train, val = ([image.stem for image, _ in voc_files(voc, split)] for split in ("train", "val"))
    listed = {line.name: line.where for split in ("train", "val") for line in read_list(sbd / f"{split}.txt", "a name")}
    added = listed.keys() - {*train, *val}
    more = sorted(added)
    for name in more:
        want_file(voc / "JPEGImages" / f"{name}.jpg", f"{listed[name]} names {name!r}, but VOC's image")
        want_file(sbd / "cls" / f"{name}.mat", f"{listed[name]} names {name!r}, but its label")
    splits = {"train_aug": train + more, "trainval_aug": train + more + val}
    lists = {split: voc / "ImageSets" / "Segmentation" / f"{split}.txt" for split in splits}
    texts = {split: "".join(map(_AUG_LINE.format, names)).encode() for split, names in splits.items()}
    for split, path in lists.items():  # before the masks, which take a while
        if path.exists() and sorted(path.read_bytes().split()) != sorted(texts[split].split()):
            raise FileExistsError(f"{path} holds another list; move it away to have it written")
        _compare_count(split, len(splits[split]))
    whole, masks = all(path.exists() for path in lists.values()), voc / "SegmentationClassAug"
    masks.mkdir(exist_ok=True)
    for name in train + val + more:
        path = masks / f"{name}.png"
        if path.exists() and whole:
            continue
        labels = sbd_labels(sbd / "cls" / f"{name}.mat") if name in added else _voc_labels(voc, name)
        if not path.exists():
            write_labels(path, labels)
        elif not np.array_equal(read_labels(path), labels):
            raise FileExistsError(f"{path} holds other labels than its source; move it away to have it written")
    for split, path in lists.items():
        if not path.exists():
            with atomic_write(path) as stream:
                stream.write(texts[split])
    return lists["train_aug"], lists["trainval_aug"]


def _voc_labels(voc: Path, name: str) -> Uint8:
    source = voc / "SegmentationClass" / f"{name}.png"
    return relabel(read_labels(source), _WITH_VOID, source, "0..20 and 255")


def seg11valid_files(voc2011_root: PathLike, sbd_root: PathLike) -> list[tuple[Path, Path]]:
    """Lists FCN's validation images: those of VOC 2011 val that are not in SBD's train.

    Warns:
        UserWarning: they are not 736.

    Raises:
        FileNotFoundError: a folder, list, image or label is missing.
    """
    folder = voc_folder(voc2011_root, year=2011)
    trained = {line.name for line in read_list(sbd_folder(sbd_root) / "train.txt", "one image name")}
    files = [pair for pair in voc_files(folder, "val", year=2011) if pair[0].stem not in trained]
    _compare_count("seg11valid", len(files))
    return files


def crfrnn_files(voc_root: PathLike, sbd_root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists the images that CRF-RNN trains on or validates on; read the labels with ``voc_or_sbd_labels``.

    Args:
        voc_root: the folder VOC2012, VOCdevkit or the one that holds VOCdevkit.
        sbd_root: SBD's folder, see ``sbd_folder``.
        split: "train": VOC 2012 train with VOC's masks, then what is in SBD alone with SBD's; or "val": VOC 2012 val
            without anything of SBD.

    Warns:
        UserWarning: they are not 11,685, or 346.

    Raises:
        FileNotFoundError: a folder, list, image or label is missing.
        ValueError: another split, or an empty list.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    both = dict.fromkeys(pair for part in ("train", "val") for pair in sbd_files(sbd_root, part))
    files = voc_files(voc_root, split)
    if split == "train":
        official = {image.stem for image, _ in files}
        files += [pair for pair in both if pair[0].stem not in official]
    else:
        listed = {image.stem for image, _ in both}
        files = [pair for pair in files if pair[0].stem not in listed]
    _compare_count(f"CRF-RNN's {split}", len(files))
    return files


def voc_or_sbd_labels(path: Path) -> Uint8:
    """The labels of a .mat of SBD or a picture of VOC, (H, W) of 0..20 and 255; for lists that have both."""
    return sbd_labels(path) if Path(path).suffix == ".mat" else read_labels(path)


def _compare_count(name: str, count: int) -> None:
    if count != COUNTS[name]:
        text = f"{name} has {count} images here; it has {COUNTS[name]:,} where VOC and SBD are whole"
        warnings.warn(text, stacklevel=3)
