"""Real data sets in small: files written in each set's own format, what is read of them, and all ways to be wrong."""

import functools
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from PIL import Image
from torch.utils.data import DataLoader

from crfnet import data, images
from crfnet.data import VOID, Crop, Samples, person_part, siftflow
from crfnet.data.label_maps import relabel
from crfnet.data.lists import path_below, read_list
from crfnet.data.matlab import field_of, label_map, read_mat, records
from crfnet.models.preprocess import NYUD_COLOUR, NYUD_COLOUR_DEPTH, NYUD_HHA

H, W = 5, 7


def picture(path: Path, seed: int = 0, channels: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (H, W, channels), dtype=np.uint8)
    Image.fromarray(values.squeeze()).save(path)


def png(path: Path, labels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)


def mat(path: Path, **variables) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)  # as MATLAB's save does


def structs(*rows: dict) -> np.ndarray:
    """MATLAB's list of structures, (1, n); an empty one has no fields."""
    if not rows:
        return np.zeros((0, 0))
    out = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for index, row in enumerate(rows):
        for name, value in row.items():
            out[0, index][name] = value
    return out


def grid(*values: int, dtype=np.uint8) -> np.ndarray:
    """Labels (H, W) that hold exactly these values."""
    return np.resize(np.array(values, dtype), (H, W))


def sbd_mat(path: Path, labels: np.ndarray) -> None:
    """With the boundaries as a cell of sparse matrices, as SBD has them."""
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = scipy.sparse.csc_matrix(np.eye(H, W))
    mat(path, GTcls={"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": np.array([[3], [20]])})


def part_mat(path: Path, *objects: dict) -> None:
    mat(path, anno={"imname": path.stem, "objects": structs(*objects)})


def thing(kind: str, **parts: np.ndarray) -> dict:
    named = structs(*({"part_name": name, "mask": mask} for name, mask in parts.items()))
    return {"class": kind, "class_ind": 15.0, "mask": np.ones((H, W), np.uint8), "parts": named}


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


# each builder writes two samples, a and b, and returns (folder to give as root, list, label file of a, image of a)


def voc(root):
    folder = root / "VOCdevkit" / "VOC2012"
    for index, name in enumerate("ab"):
        picture(folder / "JPEGImages" / f"{name}.jpg", index)
        images_dir = folder / "SegmentationClass"
        images_dir.mkdir(exist_ok=True)
        images.write_labels(images_dir / f"{name}.png", grid(0, 20, 255, index))
    listing = folder / "ImageSets" / "Segmentation" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("a\nb\n")
    return root, listing, folder / "SegmentationClass" / "a.png", folder / "JPEGImages" / "a.jpg"


def sbd(root):
    folder = root / "benchmark_RELEASE" / "dataset"
    for index, name in enumerate("ab"):
        picture(folder / "img" / f"{name}.jpg", index)
        sbd_mat(folder / "cls" / f"{name}.mat", grid(0, 3, 20))
    (folder / "train.txt").write_text("a\nb\n")
    return root, folder / "train.txt", folder / "cls" / "a.mat", folder / "img" / "a.jpg"


def voc2010(root):
    folder = root / "VOCdevkit" / "VOC2010"
    for index, name in enumerate("ab"):
        picture(folder / "JPEGImages" / f"{name}.jpg", index)
    listing = folder / "ImageSets" / "Main" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("a\nb\n")
    return listing, folder / "JPEGImages" / "a.jpg"


ALL_NAMES = ["accordion", *data.PASCAL_CONTEXT_CLASSES[1:], "stone", "tennis racket"]
FULL_NAMES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
LABELS_TXT = "".join(f"{index}: {FULL_NAMES.get(name, name)}\n" for index, name in enumerate(ALL_NAMES, 1))


def context(root):
    listing, image = voc2010(root)
    for name in "ab":
        mat(root / "trainval" / f"{name}.mat", LabelMap=grid(0, 1, 2, 12, 60, 62, dtype=np.uint16))
    (root / "labels.txt").write_text(LABELS_TXT)
    names = "".join(f"{k}: {name}\n" for k, name in enumerate(data.PASCAL_CONTEXT_CLASSES))
    (root / "59_labels.txt").write_text(names)
    return root, listing, root / "trainval" / "a.mat", image


def persons(root):
    _, image = voc2010(root)
    for name in "ab":
        part_mat(root / "Annotations_Part" / f"{name}.mat", thing("person", head=box(0, 2, 0, 2)))
    (root / "train.txt").write_text("a\nb\n")
    return root, root / "train.txt", root / "Annotations_Part" / "a.mat", image


def cityscapes(root):
    for index, frame in enumerate(("aachen_000000_000019", "aachen_000001_000019")):
        picture(root / "leftImg8bit" / "train" / "aachen" / f"{frame}_leftImg8bit.png", index)
        png(root / "gtFine" / "train" / "aachen" / f"{frame}_gtFine_labelIds.png", grid(0, 7, 33, 29))
    label = root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    return root, None, label, root / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png"


def nyud(root):
    for index, n in enumerate((5001, 5002)):
        picture(root / "data" / "images" / f"img_{n}.png", index)
        picture(root / "data" / "hha" / f"img_{n}.png", index + 10)
        depth = np.arange(1000, 1000 + H * W, dtype=np.uint16).reshape(H, W)
        (root / "data" / "depth").mkdir(exist_ok=True)
        Image.fromarray(depth).save(root / "data" / "depth" / f"img_{n}.png")
        mat(root / "segmentation" / f"img_{n}.mat", segmentation=grid(0, 1, 40))
    (root / "train.txt").write_text("5001\n5002\n")
    return root, root / "train.txt", root / "segmentation" / "img_5001.mat", root / "data" / "images" / "img_5001.png"


def sift(root):
    scenes = siftflow.SCENES
    for index, name in enumerate(("coast_a1", "coast_b2")):
        picture(root / "Images" / scenes / f"{name}.jpg", index)
        mat(root / "SemanticLabels" / scenes / f"{name}.mat", S=grid(0, 1, 33, dtype=np.float64))
        mat(root / "GeoLabels" / scenes / f"{name}.mat", S=grid(-1, 1, 3, dtype=np.int16))
    (root / "train.txt").write_text("coast_a1\ncoast_b2\n")
    label = root / "SemanticLabels" / scenes / "coast_a1.mat"
    return root, root / "train.txt", label, root / "Images" / scenes / "coast_a1.jpg"


def camvid(root):
    lines = []
    for index, name in enumerate("ab"):
        picture(root / "train" / f"{name}.png", index)
        png(root / "trainannot" / f"{name}.png", grid(0, 10, 11))
        lines.append(f"/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png\n")
    (root / "train.txt").write_text("".join(lines))
    return root, root / "train.txt", root / "trainannot" / "a.png", root / "train" / "a.png"


SETS = {  # builder, lister, label reader, classes, labels in the small files, a label too many
    "voc": (voc, data.voc_files, images.read_labels, 21, {0, 20, 255, 1}, 21),
    "sbd": (sbd, data.sbd_files, data.sbd_labels, 21, {0, 3, 20}, 21),
    "context": (context, data.pascal_context_files, data.pascal_context_labels, 60, {0, 1, 11, 59}, 63),
    "persons": (persons, data.person_part_files, data.person_part_labels, 7, {0, 1}, None),
    "cityscapes": (cityscapes, data.cityscapes_files, data.cityscapes_labels, 19, {0, 18, 255}, 34),
    "nyud": (nyud, data.nyud_files, data.nyud_labels, 40, {0, 39, 255}, 41),
    "siftflow": (sift, data.siftflow_files, data.siftflow_labels, 33, {0, 2, 32, 255}, 34),
    "camvid": (camvid, data.camvid_files, data.camvid_labels, 11, {0, 10, 255}, 12),
}
KEYS = {"sbd": "GTcls", "context": "LabelMap", "persons": "anno", "nyud": "segmentation", "siftflow": "S"}
BELOW = {"context": "PASCAL-Context", "persons": "trainval", "siftflow": "SiftFlowDataset", "camvid": "CamVid"}
every_set = pytest.mark.parametrize("name", SETS)
with_list = pytest.mark.parametrize("name", [name for name in SETS if name != "cityscapes"])
with_mat = pytest.mark.parametrize("name", KEYS)


@every_set
def test_files_are_listed_and_read_by_samples_in_workers(name, tmp_path):
    build, files_of, read_labels, classes, expected, _ = SETS[name]
    root, _, label, image = build(tmp_path)
    files = files_of(root, "train")
    assert len(files) == 2
    assert files[0] == (image, label)
    found = set()

    def passes(workers: int, keep: bool) -> list[list[torch.Tensor]]:
        samples = Samples(
            files, classes, read_labels=read_labels, transform=Crop((9, 6), scales=(0.5, 1.5)), seed=1, keep=keep
        )
        return [list(batch) for _ in range(2) for batch in DataLoader(samples, 2, num_workers=workers)]

    for image, labels, inside in Samples(files, classes, read_labels=read_labels):
        assert (image.shape, image.dtype, inside.shape) == ((3, H, W), torch.float32, (H, W))
        assert labels.shape == ((2, H, W) if name == "siftflow" else (H, W))
        found |= set(labels.unique().tolist())
    assert found == expected
    alone = passes(0, True)
    for other in (passes(0, False), *([passes(2, False)] if name in ("context", "siftflow") else [])):
        assert all(torch.equal(x, y) for a, b in zip(alone, other, strict=True) for x, y in zip(a, b, strict=True))


@every_set
def test_folder_is_found_one_level_down_or_named(name, tmp_path):
    build, files_of, *_ = SETS[name]
    below = {"cityscapes": "cityscapes", "nyud": "nyud", **BELOW}.get(name)
    root, *_ = build(tmp_path / "here" / below if below else tmp_path / "here")
    if name in ("context", "persons"):  # what lies beside VOC 2010 may lie anywhere
        shutil.move(root / "VOCdevkit", tmp_path / "VOCdevkit")
        assert len(files_of(tmp_path / "here", "train", voc=tmp_path / "VOCdevkit")) == 2
        with pytest.raises(FileNotFoundError, match=r"no PASCAL VOC 2010 folder: looked for .*ImageSets.Main"):
            files_of(root, "train")
    else:
        assert len(files_of(tmp_path / "here", "train")) == 2
    with pytest.raises(FileNotFoundError, match=r"nowhere' is no .* folder: looked for .*nowhere"):
        files_of(tmp_path / "nowhere", "train")


@with_list
def test_wrong_lists_are_named(name, tmp_path):
    build, files_of, *_ = SETS[name]
    root, listing, label, image = build(tmp_path)
    lines = listing.read_text()
    listing.write_bytes(b"\xef\xbb\xbf\r\n" + lines.replace("\n", "\r\n\r\n").encode())
    assert len(files_of(root, "train")) == 2
    listing.write_text("\n \r\n")
    with pytest.raises(ValueError, match=r"train\.txt is empty; wanted one"):
        files_of(root, "train")
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"train\.txt is no text"):
        files_of(root, "train")
    bad = "../a ../b\n" if name == "camvid" else "../../a\n"
    for line in (bad, bad.replace("/", "\\")):
        listing.write_text(lines + line)
        with pytest.raises(ValueError, match=r"train\.txt, line 3: .*\.\."):
            files_of(root, "train")
    listing.write_text(lines + lines.splitlines()[0].replace("a", "z").replace("5001", "9") + "\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 3.* is missing"):
        files_of(root, "train")
    listing.write_text(lines)
    for path, what in ((image, "image"), (label, "label")):
        hidden = path.rename(path.with_suffix(".hidden"))
        with pytest.raises(FileNotFoundError, match=rf"train\.txt, line 1.* {what} .*{path.name} is missing"):
            files_of(root, "train")
        hidden.rename(path)
    with pytest.raises(FileNotFoundError, match=r"split 'nothing' wants the list .*nothing\.txt.*there: .*'train'"):
        files_of(root, "nothing")


@every_set
def test_damaged_and_mismatched_files_are_named(name, tmp_path):
    build, files_of, read_labels, classes, *_ = SETS[name]
    root, _, label, image = build(tmp_path)
    samples = Samples(files_of(root, "train"), classes, read_labels=read_labels)
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=image.name):
        samples[0]
    Image.new("RGB", (W + 1, H)).save(image)
    with pytest.raises(ValueError, match=rf"{label.name} is {W}x{H} pixels, its image .*{image.name} {W + 1}x{H}"):
        samples[0]
    image.write_bytes(whole)
    whole = label.read_bytes()
    for end in (0, 20, len(whole) // 2, whole.find(b"IDAT") + 8 if label.suffix == ".png" else len(whole) - 20):
        label.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=label.name):
            samples[0]
    label.unlink()
    with pytest.raises(FileNotFoundError, match=label.name):
        samples[0]


@every_set
def test_unknown_labels_are_named(name, tmp_path):
    build, files_of, read_labels, classes, _, strange = SETS[name]
    root, _, label, _ = build(tmp_path)
    if name == "persons":
        part_mat(label, thing("person", head=box(0, 1, 0, 1), tail=box(0, 1, 0, 1)))
        with pytest.raises(ValueError, match=r"a\.mat: a person has the part 'tail'; wanted one of \['hair'"):
            read_labels(label)
        return
    if label.suffix == ".png":
        png(label, grid(0, strange))
    elif name == "sbd":
        sbd_mat(label, grid(0, strange))
    else:
        mat(label, **{KEYS[name]: grid(0, strange, dtype=np.uint16)})
    with pytest.raises(ValueError, match=rf"{label.name} holds the labels \[{strange}\]; wanted"):
        Samples(files_of(root, "train"), classes, read_labels=read_labels)[0]


@with_mat
def test_wrong_mat_files_are_named(name, tmp_path):
    build, _, read_labels, *_ = SETS[name]
    _, _, label, _ = build(tmp_path)
    key = KEYS[name]
    mat(label, other=np.ones(3))
    with pytest.raises(ValueError, match=rf"a.*\.mat|img_5001\.mat holds \['other'\]; wanted the key '{key}'"):
        read_labels(label)
    mat(label, **{key: structs({"nothing": 1.0})})
    with pytest.raises(ValueError, match=rf"{label.name}.* got a structure with the fields \['nothing'\]"):
        read_labels(label)
    mat(label, **{key: "a string"})
    with pytest.raises(ValueError, match=rf"{label.name}: .*wanted|{label.name}: .*must be numbers"):
        read_labels(label)


def test_mat_files_that_are_none(tmp_path):
    path = tmp_path / "x.mat"
    for content, message in (
        (b"no mat at all " * 50, "cannot be read as a MATLAB file"),
        (
            b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(100),
            "HDF",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.mat: .*{message}"):
            read_mat(path, "S")
    with pytest.raises(FileNotFoundError, match=r"x2\.mat"):
        read_mat(tmp_path / "x2.mat", "S")
    mat(path, S=np.zeros((3, 4, 5)), text="no numbers")
    for key, got in (("S", r"float64 of shape \(3, 4, 5\)"), ("text", "the text 'no numbers'")):
        with pytest.raises(ValueError, match=rf"x\.mat: labels must be numbers \(H, W\), got {got}"):
            label_map(read_mat(path, key), "labels", path)


def test_labels_have_a_limit_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("crfnet.data.matlab.MAX_PIXELS", H * W - 1)
    with pytest.raises(ValueError, match=r"x\.mat: S has 35 pixels, more than 34"):
        label_map(grid(1), "S", tmp_path / "x.mat")


@pytest.mark.parametrize("kept", [0, 40, 127, 130, 200, -1])
def test_truncated_mat_files_are_errors(tmp_path, kept):
    mat(tmp_path / "x.mat", S=grid(1, 2), more=structs({"a": 1.0}))
    content = (tmp_path / "x.mat").read_bytes()
    (tmp_path / "x.mat").write_bytes(content[:kept] if kept >= 0 else content[: len(content) - 9])
    with pytest.raises(ValueError, match=r"x\.mat: (cannot be read as a MATLAB file|no variable)"):
        read_mat(tmp_path / "x.mat", "more")


def test_structures_cells_and_text_are_plain(tmp_path):
    cell = np.empty((2, 2), object)
    cell[:] = [[np.eye(3), "text"], [structs({"a": 1.0}, {"a": "\u00e9"}), np.ones((1, 2))]]
    mat(tmp_path / "x.mat", cell=cell)
    eye, inner, text, ones = read_mat(tmp_path / "x.mat", "cell")  # by columns
    assert eye.tolist() == np.eye(3).tolist() and text == "text" and ones.tolist() == [[1, 1]]
    assert inner[0]["a"].item() == 1.0 and inner[1]["a"] == "\u00e9"
    with pytest.raises(ValueError, match=r"x\.mat: wanted one structure with the field 'b'"):
        field_of(inner[:1], "b", tmp_path / "x.mat")


@pytest.mark.parametrize(("value", "message"), [(1.5, "whole numbers, got 1.5"), (np.nan, "finite"), (1e300, "finite")])
def test_labels_are_whole_numbers(value, message):
    labels = np.ones((2, 2))
    labels[0, 1] = value
    with pytest.raises(ValueError, match=message):
        label_map(labels, "S", Path("x.mat"))


def test_relabel_takes_any_integers():
    labels = np.array([[-1, 300], [2, 2]])
    assert relabel(labels, {-1: 255, 300: 0, 2: 7}, Path("x"), "").tolist() == [[255, 0], [7, 7]]
    for wrong in (-2, 0, 301, 10**9):
        with pytest.raises(ValueError, match=rf"x holds the labels \[{wrong}\]; wanted this"):
            relabel(np.array([[2, wrong]]), {-1: 255, 300: 0, 2: 7}, Path("x"), "this")


def test_lists_have_lines_and_paths_that_stay_inside(tmp_path):
    (tmp_path / "l.txt").write_text("\n/JPEGImages/x.jpg  /y/x.png\r\n2008_1.v2\n")
    first, second = read_list(tmp_path / "l.txt", "")
    assert (first.name, second.name) == ("x", "2008_1.v2")
    assert first.where.endswith("l.txt, line 2")
    assert path_below(tmp_path, "/JPEGImages/x.jpg", "") == tmp_path / "JPEGImages" / "x.jpg"
    assert path_below(tmp_path, "a..b/x", "") == tmp_path / "a..b" / "x"
    for out in ("../x", "a/../../x", "..\\x", "/.."):
        with pytest.raises(ValueError, match="l.txt, line 1: .*leads out of the folder"):
            path_below(tmp_path, out, "l.txt, line 1")
    root, listing, *_ = voc(tmp_path)
    (listing.parent / "mine_aug.txt").write_text("/JPEGImages/a.jpg /SegmentationClass/../../a.png\n")
    with pytest.raises(ValueError, match="line 1: .*leads out"):
        data.voc_files(root, "mine_aug")
    (tmp_path / "pairs.txt").write_text("../x.png y.png\n")
    with pytest.raises(ValueError, match="line 1: .*leads out"):
        data.pairs_files(tmp_path, "pairs")


# VOC and SBD


@pytest.fixture
def voc_and_sbd(tmp_path):
    """VOC train a b, val c; SBD train a c d, val e: train_aug is a b d e."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (folder / "SegmentationClass").mkdir()
    benchmark = tmp_path / "benchmark_RELEASE" / "dataset"
    for index, name in enumerate("abcde"):
        picture(folder / "JPEGImages" / f"{name}.jpg", index)
        if name in "abc":
            images.write_labels(folder / "SegmentationClass" / f"{name}.png", grid(0, 1, 255))
        if name in "acde":
            sbd_mat(benchmark / "cls" / f"{name}.mat", grid(0, 2))
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    (benchmark / "train.txt").write_text("a\nc\nd\n")
    (benchmark / "val.txt").write_text("e\n")
    return folder, benchmark


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore:train:UserWarning")
def test_train_aug_is_built_from_both(voc_and_sbd):
    folder, benchmark = voc_and_sbd
    before = contents(folder, benchmark)
    with pytest.raises(FileNotFoundError, match=r"train_aug\.txt.*write_train_aug makes it.*there: \['train', 'val'\]"):
        data.voc_files(folder, "train_aug")
    train, trainval = data.write_train_aug(folder.parent.parent, benchmark.parent)
    assert train.read_text().splitlines() == [f"/JPEGImages/{x}.jpg /SegmentationClassAug/{x}.png" for x in "abde"]
    assert [line[12] for line in trainval.read_text().splitlines()] == [*"abdec"]
    for split, names in (("train_aug", "abde"), ("trainval_aug", "abdec")):
        files = data.voc_files(folder, split)
        assert files == [
            (folder / "JPEGImages" / f"{x}.jpg", folder / "SegmentationClassAug" / f"{x}.png") for x in names
        ]
        for _, label in files:
            with Image.open(label) as opened:
                assert opened.mode == "P"
                assert opened.getpalette() == images.voc_palette().ravel().tolist()
            official = label.stem in "abc"
            assert set(np.unique(images.read_labels(label))) == ({0, 1, 255} if official else {0, 2})
    assert len(list(Samples(data.voc_files(folder, "trainval_aug"), 21))) == 5
    after = contents(folder, benchmark)
    assert {path: after[path] for path in before} == before


@pytest.mark.filterwarnings("ignore:train:UserWarning")
def test_train_aug_can_be_interrupted_and_repeated(voc_and_sbd, monkeypatch):
    folder, benchmark = voc_and_sbd
    with monkeypatch.context() as patch:
        real = data.sbd.sbd_labels

        def interrupted(path):
            if path.stem == "e":
                raise KeyboardInterrupt
            return real(path)

        patch.setattr("crfnet.data.sbd.sbd_labels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.write_train_aug(folder, benchmark)
    masks = folder / "SegmentationClassAug"
    assert sorted(path.name for path in masks.iterdir()) == ["a.png", "b.png", "c.png", "d.png"]
    assert not list(folder.rglob("*_aug.txt"))
    times = {path: path.stat().st_mtime_ns for path in masks.iterdir()}
    lists = data.write_train_aug(folder, benchmark)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (masks / "e.png").is_file()
    assert data.write_train_aug(folder, benchmark) == lists
    shuffled = "".join(sorted(lists[0].read_text().splitlines(keepends=True), reverse=True))
    lists[0].write_text(shuffled)  # DeepLab's own list has another order
    assert data.write_train_aug(folder, benchmark) == lists and lists[0].read_text() == shuffled
    lists[1].write_text("a\n")
    with pytest.raises(FileExistsError, match=r"trainval_aug\.txt holds another list"):
        data.write_train_aug(folder, benchmark)


@pytest.mark.filterwarnings("ignore:train:UserWarning")
def test_masks_that_somebody_else_left_are_not_trusted(voc_and_sbd):
    folder, benchmark = voc_and_sbd
    masks = folder / "SegmentationClassAug"
    masks.mkdir()
    images.write_labels(masks / "d.png", grid(0, 15))
    with pytest.raises(FileExistsError, match=r"d\.png holds other labels than its source; move it away"):
        data.write_train_aug(folder, benchmark)
    (masks / "d.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"d\.png"):
        data.write_train_aug(folder, benchmark)
    assert not list(folder.rglob("*_aug.txt"))


def test_a_folder_of_another_year_is_refused(voc_and_sbd):
    folder, benchmark = voc_and_sbd
    with pytest.raises(FileNotFoundError, match=r"VOC2012' is VOC2012; wanted VOC2011, or a folder that holds it"):
        data.seg11valid_files(folder, benchmark)


def test_counts_that_differ_are_said(voc_and_sbd, monkeypatch):
    folder, benchmark = voc_and_sbd
    with pytest.warns(UserWarning) as said:
        data.write_train_aug(folder, benchmark)
    assert [str(each.message).split(";")[1] for each in said] == [
        f" it has {count} where VOC and SBD are whole" for count in ("10,582", "12,031")
    ]
    assert said[0].filename == __file__
    monkeypatch.setattr("crfnet.data.sbd.COUNTS", {"train_aug": 4, "trainval_aug": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.write_train_aug(folder, benchmark)


@pytest.mark.filterwarnings("ignore:train:UserWarning")
def test_what_is_missing_or_wrong_for_train_aug_is_named(voc_and_sbd):
    folder, benchmark = voc_and_sbd
    (folder / "JPEGImages" / "d.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 3 names 'd', but VOC's image .*d\.jpg is missing"):
        data.write_train_aug(folder, benchmark)
    picture(folder / "JPEGImages" / "d.jpg")
    (benchmark / "cls" / "e.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt, line 1 names 'e', but its label .*e\.mat is missing"):
        data.write_train_aug(folder, benchmark)
    assert not (folder / "SegmentationClassAug").exists()
    sbd_mat(benchmark / "cls" / "e.mat", grid(21))
    with pytest.raises(ValueError, match=r"e\.mat holds the labels \[21\]; wanted 0\.\.20"):
        data.write_train_aug(folder, benchmark)
    images.write_labels(folder / "SegmentationClass" / "b.png", grid(0, 30, 255))
    (folder / "SegmentationClassAug" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png holds the labels \[30\]; wanted 0\.\.20 and 255"):
        data.write_train_aug(folder, benchmark)
    with pytest.raises(FileNotFoundError, match="no SBD folder"):
        data.write_train_aug(folder, folder)


def test_names_alone_in_an_augmented_list(voc_and_sbd):
    folder, _ = voc_and_sbd
    (folder / "SegmentationClassAug").mkdir()
    shutil.copy(folder / "SegmentationClass" / "a.png", folder / "SegmentationClassAug" / "a.png")
    (folder / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("a\n")
    assert data.voc_files(folder, "train_aug")[0][1] == folder / "SegmentationClassAug" / "a.png"


def test_seg11valid_leaves_out_what_sbd_trains_on(tmp_path, voc_and_sbd):
    _, benchmark = voc_and_sbd
    folder = tmp_path / "TrainVal" / "VOCdevkit" / "VOC2011"
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("c\nf\n")
    for name in "cf":
        picture(folder / "JPEGImages" / f"{name}.jpg")
        png(folder / "SegmentationClass" / f"{name}.png", grid(0))
    with pytest.warns(UserWarning, match="seg11valid has 1 images here; it has 736 where"):
        files = data.seg11valid_files(tmp_path, benchmark)
    assert [image.stem for image, _ in files] == ["f"]


def test_crfrnn_trains_on_all_of_both_and_validates_on_what_sbd_lacks(voc_and_sbd, monkeypatch):
    folder, benchmark = voc_and_sbd
    for index, name in enumerate("acdef"):
        picture(benchmark / "img" / f"{name}.jpg", index)
    picture(folder / "JPEGImages" / "f.jpg")
    images.write_labels(folder / "SegmentationClass" / "f.png", grid(0, 1, 255))
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("c\nf\n")
    with pytest.warns(
        UserWarning, match="CRF-RNN's train has 5 images here; it has 11,685 where VOC and SBD are whole"
    ):
        train = data.crfrnn_files(folder, benchmark, "train")
    with pytest.warns(UserWarning, match="CRF-RNN's val has 1 images here; it has 346 where") as said:
        val = data.crfrnn_files(folder.parent, benchmark.parent, "val")
    assert said[0].filename == __file__
    assert [label.name for _, label in train] == ["a.png", "b.png", "c.mat", "d.mat", "e.mat"]
    assert [label for _, label in val] == [folder / "SegmentationClass" / "f.png"]
    monkeypatch.setattr("crfnet.data.sbd.COUNTS", {"CRF-RNN's train": 5, "CRF-RNN's val": 1})
    assert data.crfrnn_files(folder, benchmark, "train") == train
    found = [set(labels.unique().tolist()) for _, labels, _ in Samples(train, 21, read_labels=data.voc_or_sbd_labels)]
    assert found == [{0, 1, 255}] * 2 + [{0, 2}] * 3
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        data.crfrnn_files(folder, benchmark, "test")
    (benchmark / "img" / "e.jpg").unlink()
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match=r"val\.txt, line 1 names 'e', but its image .*e\.jpg is missing"):
            data.crfrnn_files(folder, benchmark, split)


@pytest.mark.parametrize("nested", ["struct", "cell", "cell of cells"])
def test_sbd_structures_however_nested(tmp_path, nested):
    inner: object = {"Segmentation": grid(0, 5)}
    for _ in range({"struct": 0, "cell": 1, "cell of cells": 2}[nested]):
        cell = np.empty((1, 1), object)
        cell[0, 0] = inner
        inner = cell
    mat(tmp_path / "x.mat", GTcls=inner)
    assert (data.sbd_labels(tmp_path / "x.mat") == grid(0, 5)).all()
    assert records(np.zeros((0, 0))) == []


def test_voc_results_are_what_the_server_takes(tmp_path):
    labels = grid(0, 1, 20)
    path = data.write_voc_results(tmp_path / "out", "2008_000006", labels)
    where = "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    assert path == tmp_path / "out" / where
    with Image.open(path) as opened:
        assert (opened.mode, opened.size) == ("P", (W, H))
        assert opened.getpalette() == images.voc_palette().ravel().tolist()
        assert (np.asarray(opened) == labels).all()
    assert data.write_voc_results(tmp_path / "out", "2008_000006", torch.from_numpy(labels)) == path
    for bad in ("", "../x", "a/b", "a\\b"):
        with pytest.raises(ValueError, match="image_id must be a plain name"):
            data.write_voc_results(tmp_path, bad, labels)
    with pytest.raises(ValueError, match=r"labels of x must lie in 0\.\.20, got 0\.\.255"):
        data.write_voc_results(tmp_path, "x", grid(0, 255))
    with pytest.raises(ValueError, match=r"labels must be \(H, W\) integers"):
        data.write_voc_results(tmp_path, "x", np.zeros((2, 3, 4), int))


# PASCAL-Context and Person-Part


def test_context_maps_by_name(tmp_path):
    _, _, label, _ = context(tmp_path)
    assert len(data.PASCAL_CONTEXT_CLASSES) == 60
    every = np.arange(63)[None]  # 1 accordion, 2..60 the classes, 61 stone, 62 tennis racket
    mat(label, LabelMap=every.astype(np.uint16))
    wanted = [0, 0, *range(1, 60), 0, 0]
    assert data.pascal_context_labels(label).tolist() == [wanted]
    again = functools.partial(data.pascal_context_labels, classes=tmp_path / "59_labels.txt")
    assert again(label).tolist() == [wanted]
    (tmp_path / "mine.txt").write_text("tennis racket\nclothes\r\n")
    mine = data.pascal_context_labels(label, classes=tmp_path / "mine.txt")[0]
    assert mine.nonzero()[0].tolist() == [29, 62]
    assert (mine[62], mine[29]) == (1, 2)


def test_context_names_what_is_wrong(tmp_path):
    root, _, label, _ = context(tmp_path)
    (tmp_path / "strange.txt").write_text("1: aeroplane\n2: unicorn\n")
    with pytest.raises(ValueError, match=r"labels\.txt has no label 'unicorn', a class of .*strange\.txt"):
        data.pascal_context_labels(label, classes=tmp_path / "strange.txt")
    (tmp_path / "strange.txt").write_text("1: aeroplane\ntwo: bicycle\n")
    with pytest.raises(ValueError, match=r"strange\.txt, line 2: wanted `index: name`, got 'two: bicycle'"):
        data.pascal_context_labels(label, classes=tmp_path / "strange.txt")
    (tmp_path / "strange.txt").write_text("table\ndog\ndiningtable\n")
    with pytest.raises(ValueError, match=r"strange\.txt names the label \d+ of .*twice: 'table' and 'diningtable'"):
        data.pascal_context_labels(label, classes=tmp_path / "strange.txt")
    (tmp_path / "strange.txt").write_text("background\ndog\n")
    with pytest.raises(ValueError, match=r"strange\.txt must name the classes alone, got background"):
        data.pascal_context_classes(tmp_path / "strange.txt")
    with pytest.raises(FileNotFoundError, match=r"33_labels\.txt"):
        data.pascal_context_labels(label, classes=tmp_path / "33_labels.txt")
    (root / "labels.txt").rename(root / "trainval" / "labels.txt")
    assert len(data.pascal_context_files(root, "train")) == 2
    (root / "trainval" / "labels.txt").unlink()
    for call in (lambda: data.pascal_context_files(root, "train"), lambda: data.pascal_context_labels(label)):
        with pytest.raises(FileNotFoundError, match=r"wants labels\.txt.*looked for .*labels\.txt and .*trainval"):
            call()


PARTS = {
    "head": ["head", "hair", "leye", "reye", "lear", "rear", "lebrow", "rebrow", "nose", "mouth"],
    "torso": ["torso", "neck"],
    "upper arms": ["luarm", "ruarm"],
    "lower arms": ["llarm", "rlarm", "lhand", "rhand"],
    "upper legs": ["luleg", "ruleg"],
    "lower legs": ["llleg", "rlleg", "lfoot", "rfoot"],
}


def test_person_parts_are_merged(tmp_path):
    assert data.PERSON_PART_CLASSES == ("background", *PARTS)
    for label, parts in enumerate(PARTS.values(), 1):
        for part in parts:
            part_mat(tmp_path / "x.mat", thing("person", **{part: box(1, 3, 2, 4)}))
            assert (data.person_part_labels(tmp_path / "x.mat") == label * box(1, 3, 2, 4)).all()


def test_later_parts_and_persons_lie_on_top(tmp_path):
    first = thing("person", torso=box(0, 3, 0, 3), head=box(2, 4, 0, 3))
    dog, bare = thing("dog", head=box(0, 5, 0, 7), tail=box(0, 5, 0, 7)), thing("person")
    second = thing("person", lhand=box(0, 1, 0, 1))
    part_mat(tmp_path / "x.mat", dog, first, bare, second, dog)
    wanted = np.zeros((H, W), int)
    wanted[0:3, 0:3], wanted[2:4, 0:3], wanted[0, 0] = 2, 1, 4
    assert (data.person_part_labels(tmp_path / "x.mat") == wanted).all()
    part_mat(tmp_path / "x.mat", thing("person", head=np.ones((3, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"x\.mat: the mask of head is \(3, 3\), another \(5, 7\)"):
        data.person_part_labels(tmp_path / "x.mat")
    part_mat(tmp_path / "x.mat")
    with pytest.raises(ValueError, match=r"x\.mat: anno\.objects is empty"):
        data.person_part_labels(tmp_path / "x.mat")
    mat(tmp_path / "x.mat", anno={"objects": structs({"class": "person"})})
    with pytest.raises(ValueError, match=r"x\.mat: wanted one structure with the field 'mask', got .*'class'"):
        data.person_part_labels(tmp_path / "x.mat")


def test_person_lists_of_deeplab_and_our_own(tmp_path):
    root, listing, label, _ = persons(tmp_path)
    lists = root / "pascal_person_part_trainval_list"
    lists.mkdir()
    (lists / "val.txt").write_text("/JPEGImages/b.jpg /pascal_person_part_gt/b.png\n")
    assert [image.name for image, _ in data.person_part_files(root, "val")] == ["b.jpg"]
    shutil.rmtree(lists)
    with pytest.raises(FileExistsError, match=r"train\.txt is there already"):
        data.write_person_part_lists(root)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="write_person_part_lists makes it"):
        data.person_part_files(root, "train")
    (root / "VOCdevkit" / "VOC2010" / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    part_mat(label, thing("dog", head=box(0, 1, 0, 1)))
    with pytest.warns(UserWarning, match=r"1 images here; it has (1716|1817) in DeepLab v2"):
        train, val = data.write_person_part_lists(root)
    assert (train.read_text(), val.read_text()) == ("b\n", "b\n")
    assert person_part.COUNTS == {"train": 1716, "val": 1817}


# Cityscapes


def test_cityscapes_there_and_back(tmp_path):
    root, _, label, image = cityscapes(tmp_path)
    every = np.array([*range(34), 255])[None]
    png(label, every)
    train_ids = data.cityscapes_labels(label)[0]
    pairs = {int(label_id): int(class_) for label_id, class_ in zip(every[0], train_ids, strict=True) if class_ != VOID}
    assert pairs == {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                     27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    assert len(data.CITYSCAPES_CLASSES) == 19
    predicted = grid(*range(19))
    for called in (predicted, torch.from_numpy(predicted).long()):
        path = data.write_cityscapes_result(tmp_path / "new" / "out", image, called)
    assert path == tmp_path / "new" / "out" / "aachen_000000_000019_labelIds.png"
    with Image.open(path) as opened:
        assert opened.mode == "L"
    assert (data.cityscapes_labels(path) == predicted).all()
    assert {int(label_id) for label_id in np.unique(images.read_labels(path))} == set(pairs)


def test_cityscapes_names_what_is_wrong(tmp_path):
    root, _, label, image = cityscapes(tmp_path)
    for labels, message in (
        (grid(0, 19), r"train_ids of aachen_000000_000019 must lie in 0\.\.18, got 0\.\.19"),
        (grid(0, 255), r"0\.\.18, got 0\.\.255"),
        (np.zeros((2, 2), int), r"must have the size \(5, 7\) of .*leftImg8bit\.png, got \(2, 2\)"),
        (np.zeros((H, W)), r"must be \(H, W\) integers"),
    ):
        with pytest.raises(ValueError, match=message):
            data.write_cityscapes_result(tmp_path, image, labels)
    with pytest.raises(ValueError, match=r"photo\.png: wanted a name <city>_<seq"):
        data.write_cityscapes_result(tmp_path, "photo.png", grid(0))
    trained = label.with_name("aachen_000000_000019_gtFine_labelTrainIds.png")
    png(trained, grid(0))
    with pytest.raises(ValueError, match=r"labelTrainIds\.png holds trainIds; wanted a \*_gtFine_labelIds"):
        data.cityscapes_labels(trained)
    with pytest.raises(FileNotFoundError, match=r"split 'val' wants the folder .*val, .*there: \['train'\]"):
        data.cityscapes_files(root, "val")
    label.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"_leftImg8bit\.png is there, but its label .*labelIds\.png is missing"
    ):
        data.cityscapes_files(root, "train")
    image.rename(image.with_name("bremen_000000_000019_leftImg8bit.png"))
    with pytest.raises(ValueError, match="lies in the folder of 'aachen'"):
        data.cityscapes_files(root, "train")
    shutil.rmtree(image.parent)
    with pytest.raises(FileNotFoundError, match="train holds no <city>"):
        data.cityscapes_files(root, "train")


# NYUDv2


def test_nyud_inputs(tmp_path):
    root, _, _, image = nyud(tmp_path)
    (root / "val.txt").write_text("img_5002\n")
    files = data.nyud_files(root, "train", also=("depth", "hha"))
    assert [path.name for path, _ in data.nyud_files(root, "trainval")] == ["img_5001.png", "img_5002.png"] + [
        "img_5002.png"
    ]
    colour = images.read_image(image).transpose(2, 0, 1)
    hha = images.read_image(root / "data" / "hha" / image.name).transpose(2, 0, 1)
    depth = np.arange(1000, 1000 + H * W).reshape(1, H, W)
    colour_mean = NYUD_COLOUR.mean[::-1]  # BGR there, RGB here
    depth_mean = math.exp(NYUD_COLOUR_DEPTH.mean[3])  # that of the logarithms there
    for read, wanted, fill in (
        (data.read_hha, [hha], None),
        (data.read_colour_hha, [colour, hha], colour_mean + NYUD_HHA.mean),
        (data.read_colour_depth, [colour, depth], (*colour_mean, depth_mean)),
    ):
        found = read(image)
        assert found.dtype == np.float32
        assert (found == np.concatenate(wanted)).all()
        for keep in (False, True):
            samples = Samples(files, 40, read_image=read, read_labels=data.nyud_labels, keep=keep)
            assert all((samples[0][0].numpy() == found).all() for _ in range(2))
        samples[0][0].zero_()  # a sample is its owner's, the kept one stays
        assert (samples[0][0].numpy() == found).all()
        crop = Crop((2 * H, W), scales=(1.5,), fill=fill)
        cropped, _, inside = crop(samples[0], np.random.default_rng(0))
        assert inside.sum() == round(1.5 * H) * W
        assert (cropped > 0).flatten(1).any(1).all()
        assert cropped[-1].min() > (1000 if read is data.read_colour_depth else -1)
        assert torch.tensor(fill or data.samples.MEAN_COLOUR).equal(cropped[:, -1, -1])


def test_nyud_names_what_is_wrong(tmp_path):
    root, _, _, image = nyud(tmp_path)
    depth = root / "data" / "depth" / image.name
    values = np.full((H, W), 2000, np.uint16)
    values[0, :3] = 0
    Image.fromarray(values).save(depth)
    with pytest.raises(ValueError, match=r"depth.*img_5001\.png: 3 depths are not positive; wanted all"):
        data.read_colour_depth(image)
    Image.fromarray(values[1:]).save(depth)
    with pytest.raises(ValueError, match=r"depth.*img_5001\.png is 7x4 pixels, its image .*images.*img_5001\.png 7x5"):
        data.read_colour_depth(image)
    picture(depth)
    with pytest.raises(ValueError, match=r"depth.*img_5001\.png: pixels of type RGB; depth is a grey PNG"):
        data.read_colour_depth(image)
    whole = depth.read_bytes()
    depth.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"depth.*img_5001\.png: "):
        data.read_colour_depth(image)
    (root / "data" / "hha" / image.name).unlink()
    with pytest.raises(FileNotFoundError, match=r"hha.*img_5001\.png"):
        data.read_colour_hha(image)
    assert len(data.nyud_files(root, "train", also=("depth",))) == 2
    with pytest.raises(FileNotFoundError, match=r"line 1 names '5001', but its hha .*img_5001\.png is missing"):
        data.nyud_files(root, "train", also=("depth", "hha"))
    assert len(data.NYUD_CLASSES) == 40


# SIFT Flow


def test_siftflow_has_two_labellings(tmp_path):
    root, listing, label, _ = sift(tmp_path)
    labels = data.siftflow_labels(label)
    assert (labels[0] == grid(255, 0, 32)).all()
    assert (labels[1] == grid(255, 0, 2)).all()
    listing.write_text(f"street_urb506\n{siftflow.SCENES}\\coast_a1.jpg\nhighway_bost181\n")
    assert [image.name for image, _ in data.siftflow_files(root, "train")] == ["coast_a1.jpg"]
    assert (len(data.SIFTFLOW_CLASSES), len(data.SIFTFLOW_GEOMETRIC)) == (33, 3)
    geometric = root / "GeoLabels" / siftflow.SCENES / "coast_a1.mat"
    mat(geometric, S=grid(4))
    with pytest.raises(ValueError, match=r"GeoLabels.*coast_a1\.mat holds the labels \[4\]; wanted -1"):
        data.siftflow_labels(label)
    mat(geometric, S=np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"GeoLabels.* has the shape \(3, 4\), .*SemanticLabels.* \(5, 7\)"):
        data.siftflow_labels(label)
    geometric.unlink()
    with pytest.raises(FileNotFoundError, match=r"names .*coast_a1.*, but its geometric label .* is missing"):
        data.siftflow_files(root, "train")


def test_both_labellings_are_cut_alike():
    pixel = torch.arange(12 * 16).view(12, 16)
    sample = (pixel.float().expand(4, -1, -1) * 10, torch.stack([pixel % 7, pixel % 3]), pixel >= 0)
    for seed in range(6):
        image, labels, inside = Crop((20, 9))(sample, np.random.default_rng(seed))
        number = (image[0] / 10).long()
        assert labels.shape == (2, 20, 9)
        assert torch.equal(labels[0][inside], number[inside] % 7)
        assert torch.equal(labels[1][inside], number[inside] % 3)
        assert (labels[:, ~inside] == VOID).all()
        # without a fill, what four channels are padded with is the mean of what is seen
        assert image[:, ~inside].unique(dim=1).squeeze(1).tolist() == pytest.approx(
            [image[0][inside].mean().item()] * 4
        )
        one, _, _ = Crop((20, 9))((sample[0], sample[1][0], sample[2]), np.random.default_rng(seed))
        assert torch.equal(one, image)
        resized, twice, _ = Crop(None, scales=(2.0,), mirror=False)(sample, np.random.default_rng(seed))
        assert torch.equal(twice, sample[1].repeat_interleave(2, 1).repeat_interleave(2, 2))
        assert resized.max() > 255  # depth is no colour


def test_scales_are_drawn_alike_and_from_the_list_alone():
    sample = (torch.rand(3, 40, 80), torch.zeros(40, 80, dtype=torch.long), torch.ones(40, 80, dtype=torch.bool))
    crop = Crop(None, scales=data.DEEPLAB_SCALES)
    sizes = [tuple(crop(sample, np.random.default_rng([7, n]))[1].shape) for n in range(200)]
    assert set(sizes) == {(20, 40), (30, 60), (40, 80), (50, 100), (60, 120)}
    assert min(sizes.count(size) for size in set(sizes)) > 20  # 40 are expected, with a deviation of 5.7
    for bad in ({"scales": (0.0, 1.0)}, {"scales": (1.0,), "scale": (0.5, 1.0)}):
        with pytest.raises(ValueError, match="wanted scales > 0 and no scale beside them"):
            Crop(None, **bad)
    with pytest.raises(ValueError, match=r"fill must have a value for each of 3 channels, got \(1\.0, 2\.0\)"):
        Crop((50, 90), fill=(1.0, 2.0))(sample, np.random.default_rng(0))
    padded, _, inside = Crop((50, 90), fill=(0.0, 1.0, 2.0))(sample, np.random.default_rng(0))
    assert padded[:, ~inside].unique(dim=1).squeeze(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("readers", "message"),
    [
        ({"read_image": lambda _: np.zeros((H, W), np.uint8)}, r"read_image must give .* got uint8 of shape \(5, 7\)"),
        ({"read_image": lambda _: np.zeros((3, H, W))}, "read_image must give .* got float64"),
        ({"read_labels": lambda _: np.zeros((H, W), int)}, "read_labels must give .* got int64"),
        ({"read_labels": lambda _: np.zeros(H, np.uint8)}, r"read_labels must give .* got uint8 of shape \(5,\)"),
    ],
)
def test_readers_that_give_something_else_are_told(tmp_path, readers, message):
    root, *_ = voc(tmp_path)
    with pytest.raises(ValueError, match=message):
        Samples(data.voc_files(root, "train"), 21, **readers)[0]


def test_sizes_of_damaged_and_huge_images(tmp_path, monkeypatch):
    root, _, _, image = voc(tmp_path)
    files = data.voc_files(root, "train")
    assert data.image_sizes(files).tolist() == [[H, W]] * 2
    monkeypatch.setattr("crfnet.images.MAX_PIXELS", H * W - 1)
    with pytest.raises(ValueError, match=r"a\.jpg: 7 x 5 = 35 pixels, more than"):
        data.image_sizes(files)
    image.write_bytes(image.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"a\.jpg: "):
        data.image_sizes(files)


# CamVid


def test_camvid_lists_of_any_machine(tmp_path):
    root, listing, label, image = camvid(tmp_path)
    for prefix in ("/SegNet/CamVid/", "", "./", "/home/me/data/", "C:\\data\\"):
        line = f"{prefix}train/a.png {prefix}trainannot/a.png\n"
        listing.write_text(line.replace("/", "\\") if "\\" in prefix else line)
        assert data.camvid_files(root, "train") == [(image, label)]
    listing.write_text("train/a.png\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 1: wanted two paths `image label`, got 'train/a\.png'"):
        data.camvid_files(root, "train")


def test_camvid_facts():
    assert len(data.CAMVID_CLASSES) == len(data.CAMVID_WEIGHTS) == 11
    assert data.CAMVID_PALETTE[[0, 4, 10, 11, 255]].tolist() == [
        [128, 128, 128], [60, 40, 222], [0, 128, 192], [0, 0, 0], [0, 0, 0]
    ]  # fmt: skip


def test_median_frequency_weights():
    # class 0: 6 of 8 pixels where it is, class 1: 2 of 8, class 2: 4 of 4; the median is 0.75
    maps = [np.array([[0, 0, 0, 0, 0, 0, 1, 1]], np.uint8), np.array([[2, 2, 2, 2]], np.uint8)]
    assert data.median_frequency_weights(maps, 3).tolist() == [1, 3, 0.75]
    void = [np.append(labels, VOID)[None].astype(np.uint8) for labels in maps]
    assert data.median_frequency_weights(void, 3)[0] == pytest.approx((6 / 9) / (6 / 9))
    with pytest.raises(ValueError, match=r"classes \[3\] occur in none"):
        data.median_frequency_weights(maps, 4)


def test_real_camvid(data_root):
    for split, size in (("train", 367), ("val", 101)):
        files = data.camvid_files(data_root, split)
        assert len(files) == size
        assert files == data.pairs_files(data_root / "camvid", split)
        for image, labels, _ in Samples(files[:3], 11, read_labels=data.camvid_labels):
            assert image.shape[1:] == labels.shape == (360, 480)
            assert VOID in labels
    train = data.camvid_files(data_root, "train")
    weights = data.median_frequency_weights((data.camvid_labels(path) for _, path in train), 11)
    ratio = dict(zip(data.CAMVID_CLASSES, weights / data.CAMVID_WEIGHTS, strict=True))
    assert 0.3 < ratio.pop("sign") < 0.5  # the published weight of signs is not that of these labels
    assert all(1 < each < 1.25 for each in ratio.values())  # nor is the median, but the frequencies are
