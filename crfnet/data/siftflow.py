"""SIFT Flow: 33 semantic and 3 geometric classes of the same outdoor pictures, 2486 to train on, 200 to test, 256x256.

``<root>/{Images/<scenes>/<id>.jpg, SemanticLabels/<scenes>/<id>.mat, GeoLabels/<scenes>/<id>.mat}`` with the one folder
``spatial_envelope_256x256_static_8outdoorcategories`` as <scenes>; key ``S`` in both: semantic 0 void, 1 to 33 the
classes; geometric -1 void, 1 to 3. Lists ``<root>/<split>.txt`` of names, such as FCN's trainval.txt and test.txt.
Source: FCN's siftflow_layers.py and data/sift-flow.
"""

from pathlib import Path

import numpy as np

from crfnet.data.label_maps import relabel
from crfnet.data.lists import find_folder, read_list, want_file, want_pair
from crfnet.data.matlab import label_map, read_mat
from crfnet.data.samples import VOID
from crfnet.images import PathLike, Uint8

SIFTFLOW_CLASSES = (
    "awning", "balcony", "bird", "boat", "bridge", "building", "bus", "car", "cow", "crosswalk", "desert", "door",
    "fence", "field", "grass", "moon", "mountain", "person", "plant", "pole", "river", "road", "rock", "sand", "sea",
    "sidewalk", "sign", "sky", "staircase", "streetlight", "sun", "tree", "window",
)  # fmt: skip
SIFTFLOW_GEOMETRIC = ("sky", "horizontal", "vertical")
SCENES = "spatial_envelope_256x256_static_8outdoorcategories"
WITHOUT_LABELS = frozenset({"highway_bost181", "street_urb506"})  # pictures of the data set, never annotated
_SEMANTIC = {0: VOID} | {label: label - 1 for label in range(1, 34)}
_GEOMETRIC = {-1: VOID, 0: VOID} | {label: label - 1 for label in range(1, 4)}  # 0 as FCN takes it


def siftflow_files(root: PathLike, split: str) -> list[tuple[Path, Path]]:
    """Lists image and semantic .mat of a split; ``siftflow_labels`` reads that and the geometric one beside it.

    The two images without annotation are left out.

    Raises:
        FileNotFoundError: the folder, the list, an image or either label is missing.
        ValueError: the list is empty, or a name leads out of the folder.
    """
    folder = find_folder(root, "SemanticLabels", ("SiftFlowDataset", "siftflow"), "SIFT Flow")
    files = []
    for line in read_list(folder / f"{split}.txt", "one image name"):
        if line.name in WITHOUT_LABELS:
            continue
        image = folder / "Images" / SCENES / f"{line.name}.jpg"
        label = folder / "SemanticLabels" / SCENES / f"{line.name}.mat"
        files.append(want_pair(line, image, label))
        want_file(_geometric(label), f"{line.where} names {line.name!r}, but its geometric label")
    return files


def siftflow_labels(path: Path) -> Uint8:
    """Semantic and geometric labels, (2, H, W) of 0..32 and 0..2, with 255.

    Raises:
        ValueError: damaged, another key, an unknown label, or two sizes; names the file.
    """
    geometric = _geometric(path)
    semantic_labels = label_map(read_mat(path, "S"), "S", path)
    geometric_labels = label_map(read_mat(geometric, "S"), "S", geometric)
    if semantic_labels.shape != geometric_labels.shape:
        raise ValueError(
            f"{geometric} has the shape {geometric_labels.shape}, {path} {semantic_labels.shape}; wanted the same"
        )
    return np.stack(
        [
            relabel(semantic_labels, _SEMANTIC, path, "0 for void and 1..33"),
            relabel(geometric_labels, _GEOMETRIC, geometric, "-1 for void and 1..3"),
        ]
    )


def _geometric(semantic: Path) -> Path:
    return Path(semantic).parents[2] / "GeoLabels" / SCENES / Path(semantic).name
