"""DeepLab v2's recipes: two steps on tiny data in the real formats, with networks of a 32nd of their channels."""

import csv
import json
import multiprocessing
import os
import socket
from dataclasses import fields, replace
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from recipe import load
from slim import slim
from torch import distributed

from crfnet import DenseCRF, data, images, weights
from crfnet.checkpoints import existing
from crfnet.data.cityscapes import CITYSCAPES_LABEL_IDS
from crfnet.models import DeepLabV2ResNet, WithCRF
from crfnet.tuning import Grid

H, W = 24, 30
KEPT = (3, 7, 19, 21, 60)  # channels that are classes
TINY = {
    "weights": "", "iterations": 2, "batch_size": 2, "accumulate": 1, "crop": 33, "held_out": 1, "device": "cpu",
    "workers": 0, "checkpoint_every": 1, "validate_every": 0,
    "grid": Grid((3.0,), (20.0,), (5.0, 10.0), rounds=0, num_iterations=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks are slim, but for as many scores as there are classes."""
    monkeypatch.setattr("slim.LABELS", KEPT)
    with slim(32):
        yield


def picture(path: Path, labels: np.ndarray, seed: int) -> None:
    """A colour a label, with noise."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(9).integers(0, 256, (256, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    noisy = np.clip(colours[labels] + rng.normal(0, 9, (*labels.shape, 3)), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(path)


def scene(first: int, second: int, seed: int, dtype=np.uint8) -> np.ndarray:
    labels = np.full((H, W + seed), first, dtype)
    labels[6:18, 5:20] = second
    return labels


def mat(path: Path, **variables) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables)


def voc2010(root: Path, drawn: list[np.ndarray], lists: bool) -> None:
    """Three images to train, two for the scores."""
    folder = root / "VOCdevkit" / "VOC2010"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for index, labels in enumerate(drawn):
        picture(folder / "JPEGImages" / f"{index}.jpg", labels, index)
    for split, names in (("train", "0\n1\n2\n"), ("val", "3\n4\n")):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
        if lists:
            (root / f"{split}.txt").write_text(names)


def voc(root: Path) -> dict:
    """Three images in VOC's train, two in val, one in test, two more in SBD, all beside each other."""
    folder, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    (folder / "SegmentationClass").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for index in range(7):
        labels = scene(0, (7, 20)[index % 2], index)
        picture(folder / "JPEGImages" / f"{index}.jpg", labels, index)
        if index < 5:
            labels[6, 5:20] = 255
            images.write_labels(folder / "SegmentationClass" / f"{index}.png", labels)
        mat(sbd / "cls" / f"{index}.mat", GTcls={"Segmentation": np.where(labels == 255, 0, labels)})
    for split, names, more in (("train", "0\n1\n2\n", "5\n3\n"), ("val", "3\n4\n", "6\n")):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
        (sbd / f"{split}.txt").write_text(more)
    (folder / "ImageSets" / "Segmentation" / "test.txt").write_text("6\n")
    return {"voc": str(root), "sbd": str(root), "submission": str(root.parent / "submission")}


def cityscapes(root: Path) -> dict:
    for index, split in enumerate(("train", "train", "val", "test")):
        frame = f"aachen_00000{index}_000019"
        labels = scene(7, 26, index)  # road and car
        picture(root / "leftImg8bit" / split / "aachen" / f"{frame}_leftImg8bit.png", labels, index)
        path = root / "gtFine" / split / "aachen" / f"{frame}_gtFine_labelIds.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels if split != "test" else np.zeros_like(labels)).save(path)
    return {"root": str(root), "submission": str(root.parent / "submission")}


def context(root: Path) -> dict:
    drawn = [scene(12, 60, index, np.uint16) for index in range(5)]
    voc2010(root, drawn, lists=False)
    for index, labels in enumerate(drawn):
        mat(root / "trainval" / f"{index}.mat", LabelMap=labels)
    full = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
    names = ["accordion", *(full.get(name, name) for name in data.PASCAL_CONTEXT_CLASSES[1:])]
    (root / "labels.txt").write_text("".join(f"{index}: {name}\n" for index, name in enumerate(names, 1)))
    return {"root": str(root)}


def persons(root: Path) -> dict:
    voc2010(root, [scene(0, 1, index) for index in range(5)], lists=True)
    for index in range(5):
        parts = np.empty((1, 2), [("part_name", object), ("mask", object)])
        for place, (name, part) in enumerate((("head", slice(6, 10)), ("torso", slice(10, 18)))):
            mask = np.zeros((H, W + index), np.uint8)
            mask[part, 5:20] = 1
            parts[0, place]["part_name"], parts[0, place]["mask"] = name, mask
        thing = np.empty((1, 1), [(name, object) for name in ("class", "mask", "parts")])
        whole = np.zeros((H, W + index), np.uint8)
        whole[6:18, 5:20] = 1
        thing[0, 0]["class"], thing[0, 0]["mask"], thing[0, 0]["parts"] = "person", whole, parts
        mat(root / "Annotations_Part" / f"{index}.mat", anno={"objects": thing})
    return {"root": str(root)}


CASES = {  # recipe: its data, flags, number of classes
    "voc_deeplab_v2": (voc, {"model": "resnet-aspp", "multi_scale": True, "augment": True}, 21),
    "cityscapes_deeplab": (cityscapes, {"model": "resnet-largefov", "augment": True, "tile": 20, "average": True}, 19),
    "pascal_context": (context, {"model": "vgg-largefov", "multi_scale": True}, 60),
    "person_part": (persons, {"model": "resnet-plain", "augment": True, "average": True}, 7),
}


def configured(name: str, folder: Path, **more):
    """The recipe, and its settings for data that is written in the folder."""
    build, flags, _ = CASES[name]
    recipe = load(name)
    return recipe, recipe.Config(**{**TINY, **build(folder / "data"), **flags, "out": str(folder / "out"), **more})


@pytest.mark.filterwarnings("ignore:train(val)?_aug has . images here")
@pytest.mark.parametrize("name", CASES)
def test_from_the_files_to_the_report_and_the_same_when_resumed(name, tmp_path, monkeypatch):
    recipe, config = configured(name, tmp_path)
    seen: dict = {}
    train, fit = recipe.train, recipe.fit

    def watched_train(network, samples, *more, **settings):
        seen["trained"] = {image.name for image, _ in samples.files}
        return train(network, samples, *more, **settings)

    def watched_fit(network, samples, *more, **settings):
        seen["held out"] = {image.name for image, _ in samples.files}
        return fit(network, samples, *more, **settings)

    monkeypatch.setattr(recipe, "train", watched_train)
    monkeypatch.setattr(recipe, "fit", watched_fit)
    scores = recipe.main(config)
    out = tmp_path / "out"
    assert list(scores) == ["dcnn", "piecewise"] + ["averaged"] * config.average
    assert json.loads((out / "results.json").read_text()) == scores
    assert all(0 <= value <= 1 for row in scores.values() for value in row.values())
    for file in ("search.png", "panel.png", "trimap.png", "report.md"):
        assert (out / file).stat().st_size > 0

    # parameters are chosen on what was not trained on
    assert len(seen["held out"]) == 1 and not seen["held out"] & seen["trained"]
    assert len(seen["trained"]) == {"voc_deeplab_v2": 4, "cityscapes_deeplab": 1}.get(name, 2)
    with open(out / "search.csv") as lines:
        table = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [float(row["theta_beta"]) for row in table[1:]] == [5, 10]

    kept = existing(out / "dcnn")
    assert len(kept) == 2
    kept[-1].unlink()  # as if killed after the first step
    saved = weights.read(out / "dcnn.safetensors")
    with pytest.raises(ValueError, match="is of a run before: resume goes on from it"):
        recipe.main(config)
    assert recipe.main(replace(config, resume=True)) == scores
    again = weights.read(out / "dcnn.safetensors")
    assert all(torch.equal(again[key], value) for key, value in saved.items())
    if name == "cityscapes_deeplab":
        (path,) = (tmp_path / "submission").iterdir()
        assert path.name == "aachen_000003_000019_labelIds.png"
        both = WithCRF(
            DeepLabV2ResNet(19, head="largefov"), DenseCRF(19, weights="scalar", compatibility="potts", learn=())
        )
        weights.load(both, out / "piecewise.safetensors")  # tiles leave no trace in it
        assert set(np.unique(images.read_labels(path))) <= set(CITYSCAPES_LABEL_IDS)
    if name == "voc_deeplab_v2":
        (path,) = (tmp_path / "submission").glob("results/VOC2012/Segmentation/comp6_test_cls/*")
        assert path.name == "6.png" and images.read_labels(path).shape == (H, W + 6)


@pytest.mark.filterwarnings("ignore:train(val)?_aug has . images here")
@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("voc_deeplab_v2", {"held_out": 3}, r"held_out: count must be 0\.\.2 of 3 files, got 3"),
        ("voc_deeplab_v2", {"crop": 41}, r"labels must have 32 k \+ 1 pixels an axis, .* got \(41, 41\)"),
        ("voc_deeplab_v2", {"sbd": ""}, r"train_aug\.txt .* is missing \(crfnet\.data\.write_train_aug makes it\)"),
        ("voc_deeplab_v2", {"weights": "nowhere.pth"}, r"nowhere\.pth"),
        ("cityscapes_deeplab", {"held_out": -1}, r"held_out: count must be 0\.\.1 of 2 files, got -1"),
        ("cityscapes_deeplab", {"device": "cuda:9"}, r"device must be there, got cuda:9 of . GPUs that torch sees"),
        ("cityscapes_deeplab", {"tile": -1}, r"tile must be a whole number, 0 or more, got -1"),
        ("voc_deeplab_v2", {"submission": __file__}, r"comp6_test_cls: cannot be made or written, as .* is a file"),
        ("cityscapes_deeplab", {"submission": __file__}, r"test_recipes_v2\.py: cannot be made or written"),
        ("cityscapes_deeplab", {"model": "vgg-largefov", "stride_on": "conv3x3"}, "stride_on is of ResNet-101"),
        ("cityscapes_deeplab", {"crop": 32}, r"labels must have 8 k \+ 1 pixels an axis"),
        ("pascal_context", {"classes": "nowhere.txt"}, r"the list of classes nowhere\.txt is missing"),
        ("pascal_context", {"voc": "nowhere"}, r"root 'nowhere' is no PASCAL VOC 2010 folder"),
        ("person_part", {"root": "nowhere"}, r"root 'nowhere' is no PASCAL-Part folder"),
        ("person_part", {"iterations": 0}, r"total must be .* 1.* got 0"),
    ],
)
def test_wrong_flags_are_named(name, flags, message, tmp_path):
    recipe, config = configured(name, tmp_path, **flags)
    with pytest.raises((ValueError, OSError), match=message):
        recipe.main(config)
    assert not existing(tmp_path / "out" / "dcnn")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("voc_deeplab_v2", {"model": "vgg-aspp-s", "policy": "step", "multi_scale": False}),
        ("voc_deeplab_v2", {"model": "resnet-plain", "autocast": True}),
        ("pascal_context", {"model": "resnet-plain", "multi_scale": False}),
        ("cityscapes_deeplab", {"model": "vgg-largefov", "submission": "", "average": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:train(val)?_aug has . images here")
def test_all_of_train_without_a_crf(name, flags, tmp_path):
    recipe, config = configured(name, tmp_path, held_out=0, **flags)
    assert list(recipe.main(config)) == ["dcnn"]
    assert not (tmp_path / "out" / "search.csv").exists()


def test_context_takes_names_of_classes_from_a_file(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("0: background\n1: dog\n2: wood\n")
    recipe, config = configured("pascal_context", tmp_path, classes=str(names), held_out=0)
    assert data.pascal_context_classes(str(names)) == ("background", "dog", "wood")
    assert data.pascal_context_classes() == data.PASCAL_CONTEXT_CLASSES
    recipe.main(config)
    head = weights.read(tmp_path / "out" / "dcnn.safetensors")["head.branches.0.fc8.weight"]
    assert len(head) == 3
    assert "wood" in (tmp_path / "out" / "report.md").read_text()
    names.write_text("dog\nwood\n")
    assert data.pascal_context_classes(names) == ("background", "dog", "wood")


def test_a_network_of_other_classes_is_a_start_but_for_its_scores(tmp_path, capsys):
    weights.save(DeepLabV2ResNet(21, head="aspp"), tmp_path / "voc.safetensors")
    start = {"weights": str(tmp_path / "voc.safetensors"), "model": "resnet-aspp", "held_out": 0}
    recipe, config = configured("person_part", tmp_path, **start)
    with pytest.raises(ValueError, match=r"of another shape head\.branches\.0\.bias \(21,\), wanted \(7,\)"):
        recipe.main(config)
    recipe.main(replace(config, keep=("head.*",)))
    assert "crfnet: " in capsys.readouterr().out
    assert len(weights.read(tmp_path / "out" / "dcnn.safetensors")["head.branches.0.bias"]) == 7


def run(number: int, port: int, flags: dict[str, dict], found: Path) -> None:
    """What one process of torchrun does, recipe after recipe."""
    torch.set_num_threads(1)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(shared, RANK=str(number), LOCAL_RANK=str(number))
    with mock.patch("slim.LABELS", KEPT), slim(32):
        recipes = {name: load(name) for name in flags}
        scores = {name: recipe.main(recipe.Config(**flags[name])) for name, recipe in recipes.items()}
    found.write_text(json.dumps(scores))


@pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system has no fork server"
)
def test_two_processes_of_torchrun_come_to_the_scores_of_one(tmp_path):
    recipe, config = configured("person_part", tmp_path)  # a ResNet: no dropout, which is each process's own
    scores = recipe.main(config)
    flags = {field.name: getattr(config, field.name) for field in fields(config)} | {"out": str(tmp_path / "both")}
    v1 = {name: TINY[name] for name in ("iterations", "batch_size", "crop", "held_out", "device", "workers")}
    v1 |= {"network": "largefov", "v1_grid": TINY["grid"], "joint_iterations": 2, "guard_images": 1}
    v1 |= {"root": voc(tmp_path / "voc")["voc"], "out": str(tmp_path / "v1")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])  # once for both; the first for the optimisers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    lives = [
        context.Process(target=run, args=(n, port, {"person_part": flags, "voc_deeplab": v1}, tmp_path / f"{n}.json"))
        for n in range(2)
    ]
    for life in lives:
        life.start()
    for life in lives:
        life.join(300)
        life.kill()  # or one that waits for another would stay
    assert [life.exitcode for life in lives] == [0, 0]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == second and first["person_part"] == scores
    assert list(first["voc_deeplab"]) == ["dcnn", "piecewise", "joint"]  # whole images, one a process
    assert (tmp_path / "v1" / "networks.pt").stat().st_size
    alone, both = (weights.read(tmp_path / folder / "dcnn.safetensors") for folder in ("out", "both"))
    for name, value in alone.items():  # sums of float32 in another order
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
