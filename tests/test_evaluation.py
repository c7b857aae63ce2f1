"""Scores of a set, with predictors whose scores are known."""

import pytest
import torch

from crfnet.data import Samples, voc_files, write_scenes
from crfnet.evaluation import evaluate
from crfnet.metrics import ConfusionMatrix, trimap_band


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, num_train=1, num_val=5, height=32, width=40)
    return Samples(voc_files(root, "val"), 21, keep=True)


def background(image):
    """Class 0 everywhere."""
    return torch.nn.functional.one_hot(torch.zeros(1, *image.shape[2:], dtype=torch.long), 21).movedim(-1, 1).float()


def test_the_truth_scores_one_and_background_what_it_covers(samples):
    labels = iter([samples[index][1] for index in range(len(samples))])

    def truth(image):
        clean = next(labels)
        clean = torch.where(clean == 255, 0, clean)
        return torch.nn.functional.one_hot(clean[None], 21).movedim(-1, 1).float()

    assert evaluate(truth, samples) == {"mean_iou": 1.0, "pixel_accuracy": 1.0, "trimap_iou_3px": 1.0}

    whole, band = ConfusionMatrix(21), ConfusionMatrix(21)
    for index in range(len(samples)):
        _, truth_map, _ = samples[index]
        whole.add(torch.zeros_like(truth_map), truth_map)
        band.add(torch.zeros_like(truth_map), truth_map, trimap_band(truth_map, 2))
    scores = evaluate(background, samples, trimap_width=2)
    assert scores == {
        "mean_iou": whole.mean_iou,
        "pixel_accuracy": whole.pixel_accuracy,
        "trimap_iou_2px": band.mean_iou,
    }
    assert 0 < scores["mean_iou"] < 0.5
