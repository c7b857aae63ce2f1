"""The recipes on crfnet.training, a few steps each on tiny data in the real formats."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from slim import slim

from crfnet import weights
from crfnet.data import write_voc
from crfnet.models import FCN8s
from crfnet.tuning import Grid

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def horses(tmp_path_factory) -> Path:
    """Six bright rectangles on dark ground, four to train."""
    root, rng, lines = tmp_path_factory.mktemp("horses"), np.random.default_rng(0), []
    for index in range(6):
        labels = np.zeros((28, 30 + index), np.uint8)
        labels[6:20, 4 + index : 18 + index] = 1
        image = np.clip(60 + 120.0 * labels[..., None] + rng.normal(0, 9, (*labels.shape, 3)), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(root / f"{index}.png")
        Image.fromarray(labels).save(root / f"{index}_labels.png")
        lines.append(f"{index}.png {index}_labels.png\n")
    (root / "train.txt").write_text("".join(lines[:4]))
    (root / "val.txt").write_text("".join(lines[4:]))
    return root


def test_horses_from_dcnn_to_joint_and_the_same_again_when_resumed(horses, tmp_path):
    recipe = load("horses")
    tiny = dict(
        root=str(horses), held_out=1, width=4, iterations=4, batch_size=2, crop=24, joint_iterations=4, guards=2,
        ablation_crop=16, ablation_iterations=4, grid=Grid((3.0,), (8.0,), (10.0, 20.0), rounds=0),
    )  # fmt: skip
    scores = recipe.main(recipe.Config(out=str(tmp_path), **tiny))
    assert list(scores) == ["dcnn", "piecewise", "gradient", "tuned", "joint", "crops", "crops_exact"]
    assert json.loads((tmp_path / "results.json").read_text()) == scores
    files = {"report.md", "trimap.png", "panel.png", "search.csv", "search.png"}
    assert all((tmp_path / name).stat().st_size for name in files)
    assert len((tmp_path / "search.csv").read_text().splitlines()) >= 4  # a heading, no CRF, two pairs of bandwidths
    assert recipe.main(recipe.Config(out=str(tmp_path), resume=True, **tiny)) == scores


@pytest.mark.filterwarnings("ignore:seg11valid has 2 images here")
@pytest.mark.parametrize("at_once", [False, True])
def test_fcn_from_32s_to_8s_and_the_same_again_when_resumed(tmp_path, at_once):
    recipe = load("voc_fcn")
    drawn = Path(write_voc(tmp_path / "voc", num_train=2, num_val=2, height=20, width=24))
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
        device="cpu", workers=0, checkpoint_every=1, validate_every=0,
    )  # fmt: skip
    with slim(32):
        scores = recipe.main(recipe.Config(**tiny))
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == scores
        assert all((tmp_path / "out" / name).stat().st_size for name in ("report.md", "trimap.png", "panel.png"))
        assert recipe.main(recipe.Config(resume=True, **tiny)) == scores
        network = FCN8s(21, at_once=at_once)
    assert list(scores) == (["8s-atonce"] if at_once else ["32s", "16s", "8s"])
    weights.load(network, tmp_path / "out" / f"fcn{list(scores)[-1]}.safetensors")
