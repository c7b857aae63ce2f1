"""What recipes report: scores, tables and pictures of several networks on the same samples."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from threshold import Threshold, rectangles

from crfnet import DenseCRF, images
from crfnet.curves import trimap_curve
from crfnet.data import Samples
from crfnet.data.samples import read_rgb
from crfnet.evaluation import evaluate
from crfnet.models import WithCRF
from crfnet.report import Report


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    return rectangles(tmp_path_factory.mktemp("samples"))


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


def test_labels_without_a_boundary_have_scores_and_no_curve(tmp_path):
    Image.new("RGB", (8, 6), "white").save(tmp_path / "a.png")
    images.write_labels(tmp_path / "labels.png", np.ones((6, 8), np.uint8))
    report = Report(tmp_path / "out", Samples([(tmp_path / "a.png", tmp_path / "labels.png")], 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trimap.png").write_bytes(b"of a run before")
    assert math.isnan(report.add("plain", Threshold())["trimap_iou_3px"])
    report.write()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["plain"]["trimap_iou_3px"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.md", "panel.png"}


def test_large_images_are_shown_smaller(samples, tmp_path, monkeypatch):
    sizes = []
    for largest in (1024, 12):
        monkeypatch.setattr("crfnet.report.LARGEST", largest)
        report = Report(tmp_path / str(largest), samples, pictures=1)
        report.add("plain", Threshold())
        report.write()
        with Image.open(tmp_path / str(largest) / "panel.png") as panel:
            sizes.append(panel.size)
    labels = samples[0][1]
    assert max(labels.shape) > 12 and sizes[0] != sizes[1]


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
    assert report.pictured == [0, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "trimap.png", "panel.png"}
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width >= 6 * 4 * 44 and panel.height > 2 * 2 * 6 * 30  # magnified to 180 pixels
