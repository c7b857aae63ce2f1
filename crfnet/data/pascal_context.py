"""PASCAL-Context: 59 classes and a background that is trained as a class, 60 outputs; 4998 train, 5105 val.

Images and lists are VOC 2010's, ``VOCdevkit/VOC2010/{JPEGImages/<id>.jpg, ImageSets/Main/<split>.txt}``; annotations
are ``<root>/trainval/<id>.mat`` (key ``LabelMap``: 0 and the numbers of ``<root>/labels.txt``, lines ``index: name``,
some 460). Classes are found there by name. Whatever is none of them is background, 0; nothing is void.

| class | name in labels.txt |
| --- | --- |
| diningtable | table |
| bedcloth | bedclothes |
| clothes | cloth |

The subset of 33 classes is not built in, as its list is unconfirmed: give a file of names (the data set's own
33_labels.txt) as ``classes``. Source: FCN's pascalcontext_layers.py.
"""

from functools import lru_cache
from pathlib import Path

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, read_list, want_file, want_pair
from crfnet.data.matlab import label_map, read_mat
from crfnet.data.voc import voc_folder
from crfnet.images import PathLike, Uint8

PASCAL_CONTEXT_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor", "bag", "bed", "bench",
    "book", "building", "cabinet", "ceiling", "clothes", "computer", "cup", "door", "fence", "floor", "flower", "food",
    "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform", "sign", "plate", "road", "rock",
    "shelves", "sidewalk", "sky", "snow", "bedcloth", "track", "tree", "truck", "wall", "water", "window", "wood",
)  # fmt: skip
_ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def pascal_context_files(root: PathLike, split: str, *, voc: PathLike | None = None) -> list[tuple[Path, Path]]:
    """Lists image and .mat of a split of VOC 2010; read the labels with ``pascal_context_labels``.

    Args:
        root: the folder that holds trainval and labels.txt, or the one above it if this is called PASCAL-Context.
        split: train, val or another list of VOC 2010's ImageSets/Main.
        voc: the folder VOC2010, VOCdevkit or the one that holds VOCdevkit; root, unless given.

    Raises:
        FileNotFoundError: a folder, labels.txt, the list, an image or an annotation is missing.
        ValueError: the list is empty, or a name leads out of the folder.
    """
    folder = find_folder(root, "trainval", ("PASCAL-Context", "pascal-context"), "PASCAL-Context")
    images = voc_folder(root if voc is None else voc, year=2010, lists="Main")
    _labels_txt(folder, folder / "trainval")
    return [
        want_pair(line, images / "JPEGImages" / f"{line.name}.jpg", folder / "trainval" / f"{line.name}.mat")
        for line in read_list(images / "ImageSets" / "Main" / f"{split}.txt", "one image name")
    ]


def pascal_context_classes(classes: PathLike | None = None) -> tuple[str, ...]:
    """Names of the labels 0, 1, ... that `pascal_context_labels` gives with the same file: background comes first.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it has other lines, or background among the classes.
    """
    if classes is None:
        return PASCAL_CONTEXT_CLASSES
    names = _names(want_file(Path(classes), "the list of classes"))
    wanted = tuple(name for index, name in names if index)
    if "background" in wanted:
        raise ValueError(f"{classes} must name the classes alone, got background, which is label 0 in any case")
    return ("background", *wanted)


def pascal_context_labels(path: Path, *, classes: PathLike | None = None) -> Uint8:
    """The labels of an annotation, (H, W): 0 background, 1..59 the classes.

    Args:
        path: a file in trainval.
        classes: a file of other classes to take, lines ``name`` or ``index: name``, such as 59_labels.txt; their order
            gives the labels 1, 2, ..., the indices do not count.
            ``functools.partial(pascal_context_labels, classes=...)`` makes a reader of it.

    Raises:
        FileNotFoundError: labels.txt, or the list of classes, is missing.
        ValueError: damaged, another key, an unknown label, a class that labels.txt does not know; names the file.
    """
    path = Path(path)
    labels_txt = _labels_txt(path.parents[1], path.parent)
    table = _table(labels_txt, None if classes is None else Path(classes))
    labels = label_map(read_mat(path, "LabelMap"), "LabelMap", path)
    return relabel(labels, table, path, f"0 and the {len(table) - 1} indices of {labels_txt}")


def _labels_txt(*folders: Path) -> Path:
    for folder in folders:
        if (folder / "labels.txt").is_file():
            return folder / "labels.txt"
    looked = " and ".join(str(folder / "labels.txt") for folder in folders)
    raise FileNotFoundError(f"PASCAL-Context wants labels.txt, lines `index: name`: looked for {looked}")


@lru_cache(maxsize=8)
def _table(labels_txt: Path, classes: Path | None) -> dict[int, int]:
    """Class of each index of labels.txt."""
    indices = {name: index for index, name in _names(labels_txt) if index}
    table, taken = {0: 0} | dict.fromkeys(indices.values(), 0), dict[int, str]()
    for class_, name in enumerate(pascal_context_classes(classes)[1:], 1):
        found = indices.get(name, indices.get(_ALIASES.get(name, name)))
        if found is None:
            raise ValueError(f"{labels_txt} has no label {name!r}, a class of {classes or 'PASCAL-Context'}")
        if found in taken:
            raise ValueError(f"{classes} names the label {found} of {labels_txt} twice: {taken[found]!r} and {name!r}")
        table[found], taken[found] = class_, name
    return table


def _names(path: Path) -> list[tuple[int, str]]:
    """Index and name of each line, spaces left out of the name; a line without an index counts on from the last."""
    names: list[tuple[int, str]] = []
    for where, words in read_list(path, "one label `index: name`"):
        index, colon, name = " ".join(words).rpartition(":")
        if colon and not index.strip().isdecimal():
            raise ValueError(f"{where}: wanted `index: name`, got {' '.join(words)!r}")
        number = int(index) if colon else (names[-1][0] if names else 0) + 1
        names.append((number, name.replace(" ", "")))
    return names
