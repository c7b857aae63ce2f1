"""What recipes report, and the piecewise stage that several of them share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from crfnet import DenseCRF
from crfnet.curves import trimap_curve
from crfnet.data import Samples
from crfnet.data.samples import read_rgb
from crfnet.evaluation import evaluate
from crfnet.models import WithCRF
from crfnet.piecewise import fit
from crfnet.report import Report
from crfnet.tuning import Grid


class Threshold(nn.Module):
    """Two labels by brightness, with the certainty of ``sharp``; shifted sideways by some pixels."""

    def __init__(self, sharp: float = 0.02, shift: int = 0) -> None:
        super().__init__()
        self.sharp, self.shift = nn.Parameter(torch.tensor(sharp)), shift

    def forward(self, image: Tensor) -> Tensor:
        score = self.sharp * (image.mean(1).roll(self.shift, -1) - 110)
        return torch.stack([-score, score], 1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    """Noisy bright rectangles on dark ground, with a void border at the top."""
    root, rng, files = tmp_path_factory.mktemp("samples"), np.random.default_rng(0), []
    for index in range(5):
        labels = np.zeros((30, 40 + index), np.uint8)
        labels[8:20, 6 + index : 24 + index] = 1
        image = np.clip(80 + 60.0 * labels[..., None] + rng.normal(0, 40, (*labels.shape, 3)), 0, 255)
        labels[:2] = 255
        files.append((root / f"{index}.png", root / f"{index}_labels.png"))
        Image.fromarray(image.astype(np.uint8)).save(files[-1][0])
        Image.fromarray(labels).save(files[-1][1])
    return Samples(files, 2)


def test_scores_are_those_of_evaluate_and_of_the_trimap_curve(samples, tmp_path):
    report = Report(tmp_path / "new", samples, names=("ground", "thing"))
    network = Threshold().train()
    scores = report.add("plain", network)
    assert network.training  # as it was
    frozen = WithCRF(network, DenseCRF(2), frozen=True).train()
    report.add("frozen", frozen)
    assert frozen.training and frozen.crf.training and not network.training
    expected = evaluate(network, samples)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert report.curves["plain"].mean_iou() == trimap_curve(network, samples).mean_iou()
    report.add("shifted", Threshold(shift=4))
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == report.scores
    assert report.scores["shifted"]["mean_iou"] < report.scores["plain"]["mean_iou"]


def test_the_same_samples_read_otherwise_or_none(samples, tmp_path):
    report = Report(tmp_path, samples)
    brighter = Samples(samples.files, 2, read_image=lambda path: read_rgb(path) // 2 + 100)
    changed = report.add("brighter", Threshold(), brighter)
    assert changed["pixel_accuracy"] == evaluate(Threshold(), brighter)["pixel_accuracy"]
    assert changed["mean_iou"] != report.add("plain", Threshold())["mean_iou"]
    with pytest.raises(ValueError, match="must be those of the report, 5, read otherwise, got 4 of 2 classes"):
        report.add("fewer", Threshold(), Samples(samples.files[:4], 2))


def test_files_name_the_classes_and_show_evenly_spread_images(samples, tmp_path):
    report = Report(tmp_path, samples, names=("ground", "thing"), pictures=2)
    report.add("plain", Threshold())
    report.add("shifted", Threshold(shift=4))
    report.write()
    text = (tmp_path / "report.md").read_text()
    assert "| thing " in text and "shifted against plain" in text and "of 2 classes 0 gain, 2 pay" in text
    assert report.shown == [0, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "trimap.png", "panel.png"}
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width >= 6 * 4 * 44 and panel.height > 2 * 2 * 6 * 30  # magnified to 180 pixels


def test_a_fitted_crf_is_better_where_it_was_fitted_and_leaves_the_network(samples, tmp_path):
    network = Threshold()
    both, found = fit(network, samples, Grid((3.0,), (10.0, 20.0), (30.0, 60.0), rounds=0), tmp_path, count=4)
    assert found.best.mean_iou > found.without_crf.mean_iou + 0.05
    assert both.network is not network and not any(p.requires_grad for p in both.crf.parameters())
    chosen = [samples.files[k] for k in sorted(np.random.default_rng(10).permutation(5)[:4])]
    assert evaluate(both, Samples(chosen, 2))["mean_iou"] == pytest.approx(found.best.mean_iou, abs=0.002)
    fewer, found = fit(network, samples, Grid((3.0,), (10.0,), (30.0,), rounds=0, num_iterations=1), tmp_path, count=4)
    assert evaluate(fewer, Samples(chosen, 2))["mean_iou"] == pytest.approx(found.best_crf.mean_iou, abs=0.002)
    assert (tmp_path / "search.png").stat().st_size > 0


def test_a_search_goes_on_only_where_asked(samples, tmp_path):
    grid = Grid((3.0,), (10.0,), (30.0,), rounds=0)
    fit(Threshold(), samples, grid, tmp_path)
    before = (tmp_path / "search.csv").read_text()
    fit(Threshold(), samples, grid, tmp_path, resume=True)
    assert (tmp_path / "search.csv").read_text() == before
    with pytest.raises(ValueError, match=r"search\.csv"):
        fit(Threshold(0.03), samples, grid, tmp_path, resume=True)
    assert (tmp_path / "search.csv").read_text() == before
    fit(Threshold(0.03), samples, grid, Path(tmp_path))
    assert (tmp_path / "search.csv").read_text() != before
