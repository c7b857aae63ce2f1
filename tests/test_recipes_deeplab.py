"""recipes/voc_deeplab.py, run whole on a handful of tiny scenes."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from recipe import RECIPES, load
from slim import slim

from crfnet import DenseCRF, images, weights
from crfnet.data import Samples, voc_files, write_scenes
from crfnet.evaluation import evaluate
from crfnet.models import DeepLabV1MSc, SmallDeepLab, WithCRF
from crfnet.tuning import Grid

TINY = {
    "held_out": 2, "width": 4, "iterations": 4, "batch_size": 2, "joint_iterations": 4, "guard_images": 2,
    "grid": Grid((2.0,), (50.0,), (10.0, 20.0), rounds=0),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load("voc_deeplab")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, num_train=6, num_val=2, height=32, width=40)
    lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "test.txt").write_text((lists / "val.txt").read_text())
    return root


@pytest.fixture(scope="module")
def run(recipe, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    scores = recipe.main(recipe.Config(dataset="voc", root=str(scenes), out=str(out), **TINY))
    return out, scores


def test_results_hold_three_scores_of_three_stages(run):
    out, scores = run
    results = json.loads((out / "results.json").read_text())
    assert results == scores
    assert list(results) == ["dcnn", "piecewise", "joint"]
    for stage in results.values():
        assert {"mean_iou", "pixel_accuracy", "trimap_iou_3px"} <= set(stage)
        assert all(0 <= score <= 1 for score in stage.values())


def test_tables_plots_and_logs_are_there_and_nothing_half_written(run):
    out, _ = run
    files = {
        "config.json",
        "results.json",
        "report.md",
        "trimap.png",
        "panel.png",
        "search.csv",
        "search.png",
        "networks.pt",
    }
    assert {path.name for path in out.iterdir()} == files | {"dcnn", "joint"}
    with open(out / "joint" / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["iteration"] for row in rows] == ["0", "2", "4"]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("mean_iou", "train_iou"))
    assert [path.name for path in (out / "joint").iterdir()] == ["log.csv"]  # no checkpoints were asked for


def test_checkpoint_gives_the_networks_back(scenes, run):
    out, scores = run
    checkpoint = torch.load(out / "networks.pt", weights_only=True)
    dcnn = SmallDeepLab(21, width=4)
    dcnn.load_state_dict(checkpoint["joint_dcnn"])
    crf = DenseCRF(21)
    crf.load_state_dict(checkpoint["joint_crf"])
    val = Samples(voc_files(scenes, "val"), 21)
    assert evaluate(WithCRF(dcnn, crf).eval(), val)["mean_iou"] == pytest.approx(scores["joint"]["mean_iou"])


def test_the_same_seed_gives_the_same_scores(recipe, scenes, run, tmp_path):
    again = recipe.main(recipe.Config(dataset="voc", root=str(scenes), out=str(tmp_path), **TINY))
    assert again == run[1]
    states = [torch.load(out / "networks.pt", weights_only=True) for out in (run[0], tmp_path)]
    for name in ("dcnn", "joint_dcnn", "joint_crf"):
        assert all(torch.equal(states[0][name][key], states[1][name][key]) for key in states[0][name])


def test_pairs_with_another_ignore_index(recipe, tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for index in range(5):
        labels = np.zeros((24, 20 + index), np.uint8)
        labels[6:16, 4:14], labels[:2] = 1, 2
        image = np.clip(60 + 100.0 * (labels == 1)[..., None] + rng.normal(0, 9, (*labels.shape, 3)), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{index}.png")
        Image.fromarray(labels).save(tmp_path / f"{index}_labels.png")
        lines.append(f"{index}.png {index}_labels.png\n")
    (tmp_path / "train.txt").write_text("".join(lines[:4]))
    (tmp_path / "val.txt").write_text(lines[4])
    settings = {**TINY, "held_out": 1, "out": str(tmp_path / "out"), "root": str(tmp_path), "dataset": "pairs"}
    scores = recipe.main(recipe.Config(num_classes=2, ignore_index=2, **settings))
    assert set(scores) == {"dcnn", "piecewise", "joint"}
    with pytest.raises(ValueError, match=r"_labels\.png holds the labels \[2\]"):
        recipe.main(recipe.Config(num_classes=2, ignore_index=255, **settings))


def test_wrong_settings_say_what_is_wanted(recipe, scenes, tmp_path):
    with pytest.raises(ValueError, match="--root"):
        recipe.main(recipe.Config(dataset="voc", out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"held_out: count must be 1\.\.5 of 6 files, got 6"):
        recipe.main(recipe.Config(dataset="voc", root=str(scenes), out=str(tmp_path), held_out=6))
    with pytest.raises(FileNotFoundError, match="no PASCAL VOC 2012 folder"):
        recipe.main(recipe.Config(dataset="voc", root=str(tmp_path), out=str(tmp_path)))
    for wrong in ("guard_images", "joint_iterations"):
        with pytest.raises(ValueError, match=f"{wrong} must be a whole number, 1 or more, got 0"):
            recipe.main(recipe.Config(root=str(scenes), out=str(tmp_path), **{**TINY, wrong: 0}))
    (tmp_path / "maps" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls").mkdir(parents=True)
    (tmp_path / "maps" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="label maps of other images, the first x.png"):  # before anything is trained
        recipe.main(recipe.Config(root=str(scenes), out=str(tmp_path), submission=str(tmp_path / "maps"), **TINY))
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(ValueError, match="sbd adds to VOC, got data set 'pairs'"):
        recipe.main(recipe.Config(dataset="pairs", root=str(tmp_path), out=str(tmp_path), sbd=str(tmp_path)))


def test_recipe_imports_without_tyro_and_tqdm():
    """Neither is among the core dependencies; only the command line's flags need tyro."""
    code = (
        "import sys, runpy; sys.modules['tyro'] = sys.modules['tqdm'] = None\n"
        f"names = runpy.run_path({str(RECIPES / 'voc_deeplab.py')!r}, run_name='recipe')\n"
        "print(sorted(names['Config']().__dict__)[0], list(names['bar']('x')(range(3))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "average [0, 1, 2]"


def test_a_root_alone_is_a_voc_folder_and_is_left_as_it_was(recipe, scenes, tmp_path):
    before = sorted(scenes.rglob("*"))
    submission = tmp_path / "submission"
    recipe.main(recipe.Config(root=str(scenes), out=str(tmp_path / "out"), submission=str(submission), **TINY))
    assert sorted(scenes.rglob("*")) == before
    assert not list((tmp_path / "out").glob("scenes-*"))
    maps = list((submission / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls").iterdir())
    assert len(maps) == 2 and all(images.read_labels(path).shape == (32, 40) for path in maps)


def test_scenes_are_never_drawn_into_a_given_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match="dataset 'synthetic' wants no root"):
        recipe.main(recipe.Config(dataset="synthetic", root=str(tmp_path), out=str(tmp_path / "out"), **TINY))
    with pytest.raises(ValueError, match="submission is of VOC's test images, got data set 'synthetic'"):
        recipe.main(recipe.Config(submission=str(tmp_path / "maps"), out=str(tmp_path / "out"), **TINY))


def test_largefov_then_its_msc_branches(recipe, scenes, tmp_path):
    """Two rows of the paper's table 1, on a thirty-second of the channels."""
    tiny = {**TINY, "dataset": "voc", "root": str(scenes), "crop": 33, "iterations": 2}
    with slim(32):
        recipe.main(recipe.Config(network="largefov", out=str(tmp_path / "a"), **tiny))
        start = tmp_path / "a" / "dcnn.safetensors"
        scores = recipe.main(recipe.Config(network="largefov-msc", weights=str(start), out=str(tmp_path / "b"), **tiny))
        network = DeepLabV1MSc(21)
        base = {name: value.clone() for name, value in network.base.state_dict().items()}
        weights.load(network.base, start)
        trained = DeepLabV1MSc(21)
        weights.load(trained, tmp_path / "b" / "dcnn.safetensors")
    assert list(scores) == ["dcnn", "piecewise", "joint"]
    assert all(torch.equal(a, b) for a, b in zip(network.base.parameters(), trained.base.parameters(), strict=True))
    assert not all(torch.equal(value, base[name]) for name, value in network.base.state_dict().items())
