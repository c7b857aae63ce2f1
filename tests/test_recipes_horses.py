"""recipes/horses.py, a few steps of every stage on six tiny pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipe import load

from crfnet.tuning import Grid


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
        root=str(horses), held_out=1, width=4, iterations=4, batch_size=2, crop=24, joint_iterations=4, guard_images=2,
        ablation_crop=16, ablation_iterations=4, grid=Grid((3.0,), (8.0,), (10.0, 20.0), rounds=0),
    )  # fmt: skip
    scores = recipe.main(recipe.Config(out=str(tmp_path), **tiny))
    assert list(scores) == ["dcnn", "piecewise", "gradient", "tuned", "joint", "crops", "crops_exact"]
    assert json.loads((tmp_path / "results.json").read_text()) == scores
    files = {"report.md", "trimap.png", "panel.png", "search.csv", "search.png"}
    assert all((tmp_path / name).stat().st_size for name in files)
    assert len((tmp_path / "search.csv").read_text().splitlines()) >= 4  # a heading, no CRF, two pairs of bandwidths
    assert recipe.main(recipe.Config(out=str(tmp_path), resume=True, **tiny)) == scores
