"""The recipes of FCN's and CRF-RNN's tables, two steps each on tiny data in the real formats."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import test_datasets
import torch
from PIL import Image
from recipe import load
from slim import make, slim
from torch import nn

from crfnet import images, weights
from crfnet.data import write_scenes
from crfnet.models import CRFRNN, FCN8s, SiftFlowFCN
from crfnet.tuning import Grid

QUICK = {"vgg16": "", "iterations": 2, "device": "cpu", "workers": 0, "checkpoint_every": 2, "validate_every": 0}
REPORT = {"results.json", "report.md", "trimap.png", "panel.png"}
FILES = REPORT | {"config.json"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# VOC


@pytest.mark.filterwarnings("ignore:seg11valid has 2 images here")
@pytest.mark.parametrize("at_once", [False, True])
def test_fcn_from_32s_to_8s_and_the_same_again_when_resumed(tmp_path, at_once):
    recipe = load("voc_fcn")
    drawn = Path(write_scenes(tmp_path / "voc", num_train=2, num_val=2, height=20, width=24))
    voc, sbd = drawn.rename(drawn.with_name("VOC2011")), tmp_path / "sbd" / "dataset"
    for folder in ("img", "cls"):
        (sbd / folder).mkdir(parents=True)
    names = (voc / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    for name in names:
        shutil.copy(voc / "JPEGImages" / f"{name}.jpg", sbd / "img")
        labels = np.zeros((20, 24), np.uint8)
        labels[5:15, 5:15] = 7
        scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels}})
    (sbd / "train.txt").write_text("\n".join(names) + "\n")
    tiny = dict(
        voc=str(voc.parent), sbd=str(sbd.parent), vgg16="", out=str(tmp_path / "out"), at_once=at_once, iterations=2,
        device="cpu", workers=0, checkpoint_every=1, validate_every=0, submission=str(tmp_path / "test"),
    )  # fmt: skip
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text(names[0] + "\n")
    with slim(32):
        scores = recipe.main(recipe.Config(**tiny))
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == scores
        assert all((tmp_path / "out" / name).stat().st_size for name in ("report.md", "trimap.png", "panel.png"))
        assert recipe.main(recipe.Config(resume=True, **tiny)) == scores
        network = FCN8s(21, at_once=at_once)
    (labels,) = (tmp_path / "test").glob("results/VOC2011/Segmentation/comp6_test_cls/*")
    assert labels.stem == names[0] and images.read_labels(labels).shape == (20, 24)
    assert list(scores) == (["8s-atonce"] if at_once else ["32s", "16s", "8s"])
    weights.load(network, tmp_path / "out" / f"fcn{list(scores)[-1]}.safetensors")


# NYUDv2


@pytest.fixture(scope="module")
def nyud(tmp_path_factory) -> Path:
    """Two pictures, both to train and one to test."""
    root = tmp_path_factory.mktemp("nyud")
    test_datasets.nyud(root)
    for split, lines in {"train": "5001\n", "val": "5002\n", "test": "5002\n"}.items():
        (root / f"{split}.txt").write_text(lines)
    return root


def test_nyud_all_five_rows_and_the_same_again_when_resumed(nyud, tmp_path):
    recipe = load("nyud_fcn")
    config = recipe.Config(root=str(nyud), out=str(tmp_path / "out"), **QUICK)
    with slim(32):
        scores = recipe.main(config)
        assert list(scores) == list(recipe.ROWS) == list(config.rows)
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == scores
        assert names_in(tmp_path / "out") >= FILES | {f"{row}.safetensors" for row in scores} | set(scores)
        some = recipe.Config(root=str(nyud), out=str(tmp_path / "out"), rows=("hha",), resume=True, **QUICK)
        assert recipe.main(some) == {row: scores[row] for row in some.rows}

        # late fusion begins as the mean of both nets, its 16s as the 32s
        colour_hha = torch.from_numpy(recipe.read_colour_hha(nyud / "data" / "images" / "img_5001.png"))[None]
        nets = {row: recipe.ROWS[row].build().eval() for row in ("colour", "hha", "colour-hha")}
        for row in ("colour", "hha"):
            weights.load(nets[row], tmp_path / "out" / f"{row}.safetensors")
        recipe.initialise(nets["colour-hha"], "colour-hha", config)
        with torch.no_grad():
            parts = [nets["colour"](colour_hha[:, :3]), nets["hha"](colour_hha[:, 3:])]
            wanted = torch.stack(parts).mean(0)
            assert wanted.abs().max() > 0
            torch.testing.assert_close(
                nets["colour-hha"](colour_hha), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max()
            )


def test_nyud_says_what_is_missing_before_it_trains(nyud, tmp_path):
    recipe = load("nyud_fcn")
    late = recipe.Config(root=str(nyud), out=str(tmp_path / "out"), rows=("colour", "colour-hha"), **QUICK)
    with pytest.raises(
        FileNotFoundError, match=r"row 'colour-hha' starts from 'hha': put it before that in --rows, or"
    ):
        recipe.main(late)
    with pytest.raises(ValueError, match=r"rows must be at least one of colour, .*, got none"):
        recipe.main(recipe.Config(root=str(nyud), out=str(tmp_path / "out"), rows=(), **QUICK))
    shutil.copytree(nyud, tmp_path / "nyud")
    shutil.rmtree(tmp_path / "nyud" / "data" / "hha")
    with pytest.raises(FileNotFoundError, match=r"names '5001', but its hha .*img_5001\.png is missing"):
        recipe.main(recipe.Config(root=str(tmp_path / "nyud"), out=str(tmp_path / "out"), **QUICK))
    with pytest.raises(FileNotFoundError, match=r"nowhere' is no NYUDv2 folder: looked for"):
        recipe.main(recipe.Config(root=str(tmp_path / "nowhere"), out=str(tmp_path / "out"), **QUICK))
    assert not (tmp_path / "out").exists()


# SIFT Flow


@pytest.fixture(scope="module")
def siftflow(tmp_path_factory) -> Path:
    """Two pictures, both to train and one to test."""
    root = tmp_path_factory.mktemp("siftflow")
    _, listing, *_ = test_datasets.sift(root)
    listing.rename(root / "trainval.txt")
    (root / "test.txt").write_text("coast_b2\n")
    return root


def test_siftflow_scores_both_labellings_of_every_net_and_resumes(siftflow, tmp_path):
    recipe = load("siftflow_fcn")
    with slim(32):
        scores = recipe.main(recipe.Config(root=str(siftflow), out=str(tmp_path), **QUICK))
        assert {task: list(rows) for task, rows in scores.items()} == {
            task: [f"{task} {stage}" for stage in ("32s", "16s", "8s")] for task in ("semantic", "geometric")
        }
        for task, rows in scores.items():
            assert names_in(tmp_path / task) >= REPORT
            assert json.loads((tmp_path / task / "results.json").read_text()) == rows
        log = (tmp_path / "16s" / "log.csv").read_text()
        assert "semantic mean_iou" in log and "geometric pixel_accuracy" in log
        weights.load(SiftFlowFCN(stride=8), tmp_path / "siftflow-fcn8s.safetensors")
        assert recipe.main(recipe.Config(root=str(siftflow), out=str(tmp_path), resume=True, **QUICK)) == scores
    with pytest.raises(FileNotFoundError, match=r"split 'trainval' wants the list .*trainval\.txt"):
        (siftflow / "trainval.txt").rename(siftflow / "train.txt")
        recipe.main(recipe.Config(root=str(siftflow), out=str(tmp_path / "new"), **QUICK))


# CRF-RNN


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """VOC train a b, val c f; SBD train a d, val c e: bright things on dark ground, of which b, c and e are free."""
    root, rng = tmp_path_factory.mktemp("both"), np.random.default_rng(0)
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets" / "Segmentation", sbd / "img"):
        folder.mkdir(parents=True)
    (sbd / "cls").mkdir()
    for index, name in enumerate("abcdef"):
        labels = np.zeros((16, 24), np.uint8)
        labels[:, 8 + index :] = 7
        image = np.clip(60 + 150.0 * (labels[..., None] == 7) + rng.normal(0, 2, (16, 24, 3)), 0, 255).astype(np.uint8)
        if name in "abcf":
            Image.fromarray(image).save(voc / "JPEGImages" / f"{name}.jpg")
            images.write_labels(voc / "SegmentationClass" / f"{name}.png", labels)
        if name in "acde":
            Image.fromarray(image).save(sbd / "img" / f"{name}.jpg")
            scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels}})
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("b\n")
    for folder, lists in ((voc / "ImageSets" / "Segmentation", ("ab", "cf")), (sbd, ("ad", "ce"))):
        for split, names in zip(("train", "val"), lists, strict=True):
            (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    return voc, sbd


@pytest.fixture(scope="module")
def fcn8s(tmp_path_factory) -> Path:
    """An FCN-8s that calls what is bright class 7: its first channel is the brightness."""
    network = make(lambda: FCN8s(21), divisor=32)
    with torch.no_grad():
        for name, layer in network.trunk.vgg.named_modules():
            if isinstance(layer, nn.Conv2d) and name < "conv4":
                layer.weight.zero_()
                layer.weight[0, :, 1, 1] = 1 / 3 if name == "conv1_1" else torch.eye(layer.in_channels)[0]
        score = network.head.score_pool3
        score.bias.fill_(-9.0)
        score.bias[0], score.bias[7], score.weight[7, 0] = 0.0, -8.0, 0.2
    path = tmp_path_factory.mktemp("fcn8s") / "fcn8s.safetensors"
    weights.save(network, path)
    return path


@pytest.fixture
def crfrnn(both, fcn8s, tmp_path):
    """The recipe, and settings of two quick steps."""
    recipe = load("voc_crfrnn")
    tiny = dict(QUICK, voc=str(both[0]), sbd=str(both[1]), fcn8s=str(fcn8s), out=str(tmp_path), size=24, seed=0)
    del tiny["vgg16"]
    return recipe, tiny | {"held_out": 2, "guard_images": 2, "gradient_iterations": 2, "grid": Grid(
        (2.0, 4.0), (20.0,), (20.0,), rounds=0)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:CRF-RNN's (train|val) has")
@pytest.mark.parametrize("start", ["crfrnn", "search", "gradient"])
def test_crfrnn_from_every_start_and_the_same_again_when_resumed(crfrnn, tmp_path, start):
    recipe, tiny = crfrnn
    with slim(32):
        scores = recipe.main(recipe.Config(start=start, submission=str(tmp_path / "test"), **tiny))
        assert list(scores) == ["fcn8s", "crf" if start == "crfrnn" else "piecewise", "joint"]
        assert scores["fcn8s"]["mean_iou"] > 0.5  # or nothing could fall
        assert json.loads((tmp_path / "results.json").read_text()) == scores
        more = {"search": {"search.csv", "search.png"}, "gradient": {"gradient"}}.get(start, set())
        assert names_in(tmp_path) == FILES | {"joint", "crfrnn.safetensors", "test"} | more
        network = CRFRNN()
        weights.load(network, tmp_path / "crfrnn.safetensors")
        assert (network.crf.num_iterations, network.crf.num_iterations_eval) == (5, 10)
        assert recipe.main(recipe.Config(start=start, resume=True, **tiny)) == scores
    (labels,) = (tmp_path / "test").rglob("*.png")
    assert labels.name == "b.png" and set(np.unique(images.read_labels(labels))) == {0, 7}
    header, first, *_ = (tmp_path / "joint" / "log.csv").read_text().splitlines()
    assert {"mean_iou", "train_iou"} < set(header.split(",")) and first.startswith("0,")  # the start is measured


@pytest.mark.filterwarnings("ignore:CRF-RNN's (train|val) has")
def test_crfrnn_that_collapses_ends_as_it_started_and_says_so(crfrnn, tmp_path, capsys):
    recipe, tiny = crfrnn
    with slim(32):
        scores = recipe.main(
            recipe.Config(start="crfrnn", learning_rate=1e-2, weights_factor=1, compatibility_factor=1, **tiny)
        )
    said = capsys.readouterr().out
    assert said.count("not to be selected: train_iou 0.") == 1
    assert "no validation was better than the start by mean_iou" in said
    assert scores["joint"] == scores["crf"]


@pytest.mark.filterwarnings("ignore:CRF-RNN's (train|val) has")
def test_crfrnn_says_what_is_wrong(crfrnn, tmp_path):
    recipe, tiny = crfrnn
    for wrong, got in (
        ({"held_out": 4}, "4 and 2 of 5"),
        ({"held_out": 0}, "0 and 2"),
        ({"guard_images": 4}, "2 and 4"),
    ):
        # 3: what FCN-8s has learnt from is not held out
        with pytest.raises(ValueError, match=rf"held_out must be 1\.\.3, .* not in SBD's train, .*got {got}"):
            recipe.main(recipe.Config(**(tiny | wrong)))
    with pytest.raises(FileNotFoundError, match=r"fcn8s '.*none\.caffemodel' is missing: voc_fcn\.py writes"):
        recipe.main(recipe.Config(**(tiny | {"fcn8s": str(tmp_path / "none.caffemodel")})))
    with pytest.raises(PermissionError, match="comp6_test_cls: cannot be made or written"):
        recipe.main(recipe.Config(submission=__file__, **tiny))
    with pytest.raises(FileNotFoundError, match="no PASCAL VOC 2012 folder"):
        recipe.main(recipe.Config(**(tiny | {"voc": str(tmp_path)})))
