"""Scores and pictures of a set, with predictors whose scores are known."""

import numpy as np
import pytest
import torch

from crfnet.data import Samples, voc_files, write_voc
from crfnet.evaluation import comparison, evaluate
from crfnet.images import voc_palette
from crfnet.metrics import ConfusionMatrix, trimap_band


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_voc(root, num_train=1, num_val=5, height=32, width=40)
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


def test_comparison_shows_image_truth_and_labels_side_by_side(samples):
    picture = comparison(samples, [background], count=2)
    # rows of 32 pixels magnified 6 times; three columns of 40 pixels, 8 apart before magnifying
    assert picture.shape == (2 * 192 + 8, 6 * (3 * 40 + 2 * 8), 3)
    image, labels, _ = samples[0]
    row = picture[:192:6, ::6]
    assert np.array_equal(row[:, :40], image.permute(1, 2, 0).byte().numpy())
    assert np.array_equal(row[:, 48:88], voc_palette()[labels.numpy()])
    assert not row[:, 96:].any()  # class 0 is black
    with torch.no_grad():
        assert comparison(samples, [], count=9).shape[0] == 5 * 192 + 4 * 8
