"""recipes/camvid.py on a handful of tiny frames in SegNet's layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipe import load

from crfnet.data import camvid_files
from crfnet.tuning import Grid

TINY = dict(
    held_out=0.3, width=4, iterations=4, batch_size=2, crop=(20, 24), grid=Grid((1.0,), (8.0,), (10.0, 20.0), rounds=0),
    joint_iterations=4, joint_crop=(16, 16), guard_images=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load("camvid")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two drives of six frames to train, two to score: stripes of all eleven classes in their own grey."""
    root, rng = tmp_path_factory.mktemp("CamVid"), np.random.default_rng(0)
    names = {
        "train": [f"{drive}_{k:05}" for drive in ("0001TP", "0006R0") for k in range(6)],
        "val": ["0016E5_0", "0016E5_1"],
    }
    for split, members in names.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for name in members:
            labels = ((np.arange(33)[None] // 3 + rng.integers(11)) % 12).astype(np.uint8).repeat(24, 0)
            image = np.clip(20.0 * labels[..., None] + rng.normal(0, 9, (24, 33, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"{name}.png")
            Image.fromarray(labels).save(root / f"{split}annot" / f"{name}.png")
        lines = (f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n" for name in members)
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def test_all_rows_and_the_same_again_when_resumed(recipe, root, tmp_path):
    scores = recipe.main(recipe.Config(root=str(root), out=str(tmp_path), **TINY))
    assert list(scores) == ["dcnn", "hand", "piecewise", "gradient", "tuned", "joint"]
    assert json.loads((tmp_path / "results.json").read_text()) == scores
    text = (tmp_path / "report.md").read_text()
    assert "bicyclist" in text and "## joint against dcnn" in text
    assert recipe.main(recipe.Config(root=str(root), out=str(tmp_path), resume=True, **TINY)) == scores


def test_held_out_frames_are_whole_stretches_of_each_drive(recipe, root):
    files = camvid_files(root, "train")
    chosen = set()
    for seed in range(8):
        held_out, rest = recipe.hold_out_stretches(files, 0.3, seed)
        assert sorted(rest + held_out) == sorted(files) and len(held_out) == 4
        for drive in ("0001TP", "0006R0"):
            frames = sorted(int(image.stem[7:]) for image, _ in held_out if image.name.startswith(drive))
            assert frames == list(range(frames[0], frames[0] + 2))
            chosen.add((drive, frames[0]))
    assert len(chosen) > 4  # places differ by seed
