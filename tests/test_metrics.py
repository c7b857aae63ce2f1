"""Scores against their formulas on cases small enough to count by hand, then properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crfnet.metrics import FAR, ConfusionMatrix, boundary_distance, trimap_band


def test_scores_of_a_case_counted_by_hand():
    matrix = ConfusionMatrix(3)
    truth = torch.tensor([[0, 0, 0, 1], [1, 255, 0, 1]])
    called = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    matrix.add(called, truth)
    # true 0: two right, one called 1, one called 2; true 1: two right, one called 0; class 2 never true
    assert matrix.counts.tolist() == [[2, 1, 1], [1, 2, 0], [0, 0, 0]]
    assert matrix.pixel_accuracy == pytest.approx(4 / 7)
    assert matrix.mean_accuracy == pytest.approx((2 / 4 + 2 / 3) / 2)
    iou = matrix.per_class_iou()
    assert iou[:2].tolist() == pytest.approx([2 / 5, 2 / 4])
    assert math.isnan(iou[2])  # absent from the truth: no part of the mean, though it was called
    assert matrix.mean_iou == pytest.approx((2 / 5 + 2 / 4) / 2)
    assert matrix.frequency_weighted_iou == pytest.approx((4 * 2 / 5 + 3 * 2 / 4) / 7)


def test_scores_are_of_the_set_not_means_over_images():
    matrix = ConfusionMatrix(2)
    matrix.add(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    matrix.add(torch.tensor([1]), torch.tensor([1]))
    assert matrix.mean_iou == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_only_pixels_inside_where_count():
    matrix = ConfusionMatrix(2)
    matrix.add(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 255]), torch.tensor([False, True, True]))
    assert matrix.counts.tolist() == [[0, 1], [0, 0]]


@given(st.integers(0, 2**31))
def test_one_set_or_many_batches_give_the_same_counts(seed):
    generator = torch.Generator().manual_seed(seed)
    truth, called = (torch.randint(0, 4, (5, 6), generator=generator) for _ in range(2))
    whole, parts = ConfusionMatrix(4, ignore_index=3), ConfusionMatrix(4, ignore_index=3)
    whole.add(called, truth)
    for row in range(5):
        parts.add(called[row], truth[row])
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts[3].sum() == 0
    assert whole.counts.sum() == (truth != 3).sum()


def test_an_empty_matrix_has_no_score():
    assert math.isnan(ConfusionMatrix(2).mean_iou)
    assert math.isnan(ConfusionMatrix(2).pixel_accuracy)


def test_confusion_matrix_errors():
    with pytest.raises(ValueError, match="one shape"):
        ConfusionMatrix(2).add(torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"predicted must be 0\.\.1, got 2\.\.2"):
        ConfusionMatrix(2).add(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels must be 0\.\.1"):
        ConfusionMatrix(2).add(torch.tensor([0]), torch.tensor([5]))
    with pytest.raises(ValueError, match="num_classes"):
        ConfusionMatrix(0)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_scores_are_their_formulas(seed, classes):
    """Loops over pixels and classes in plain Python, with classes that are absent and void."""
    random = np.random.default_rng(seed)
    truth = random.choice([*random.integers(0, classes, 3), 255], (5, 7))
    called = random.integers(0, classes, (5, 7))
    called[truth == 255] = 255  # not counted, so not looked at
    matrix = ConfusionMatrix(classes)
    matrix.add(torch.from_numpy(called), torch.from_numpy(truth))
    right, total, accuracies, ious, weighted = 0, 0, [], [], 0.0
    for c in range(classes):
        hit = miss = false = 0
        for t, p in zip(truth.ravel(), called.ravel(), strict=True):
            if t != 255:
                hit += t == c and p == c
                miss += t == c and p != c
                false += t != c and p == c
        assert matrix.counts[c].sum() == hit + miss and matrix.counts[:, c].sum() == hit + false
        if hit + miss:
            right, total = right + hit, total + hit + miss
            accuracies.append(hit / (hit + miss))
            ious.append(hit / (hit + miss + false))
            weighted += (hit + miss) * ious[-1]
            assert float(matrix.per_class_accuracy()[c]) == pytest.approx(accuracies[-1])
        else:
            assert math.isnan(matrix.per_class_accuracy()[c]) and math.isnan(matrix.per_class_iou()[c])
    if not total:
        assert all(map(math.isnan, matrix.scores().values()))
        return
    assert matrix.scores() == pytest.approx(
        {
            "pixel_accuracy": right / total,
            "mean_accuracy": np.mean(accuracies),
            "mean_iou": np.mean(ious),
            "frequency_weighted_iou": weighted / total,
        }
    )


def brute_band(labels: torch.Tensor, width: int) -> torch.Tensor:
    """The definition, pixel by pixel: another label, or void, in the square around it."""
    H, W = labels.shape
    band = torch.zeros(H, W, dtype=torch.bool)
    for i in range(H):
        for j in range(W):
            window = labels[max(i - width, 0) : i + width + 1, max(j - width, 0) : j + width + 1]
            band[i, j] = labels[i, j] != 255 and bool((window != labels[i, j]).any())
    return band


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_band_is_its_definition(seed, width):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (3, 4), generator=generator).repeat_interleave(4, 0).repeat_interleave(3, 1)
    labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
    assert torch.equal(trimap_band(labels, width), brute_band(labels, width))


def test_band_with_a_void_border_is_the_dilated_border():
    """VOC: objects are always apart by void, so the band is void dilated by the square, without void itself."""
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[5:15, 5:15], labels[6:14, 6:14] = 255, 3
    void = (labels == 255).float()[None, None]
    dilated = torch.nn.functional.max_pool2d(void, 5, 1, 2)[0, 0] > 0
    assert torch.equal(trimap_band(labels, 2), dilated & (labels != 255))


def test_band_without_void_is_as_wide_on_either_side():
    labels = torch.zeros(2, 5, 12, dtype=torch.long)
    labels[:, :, 6:] = 1
    assert trimap_band(labels, 3).sum(-1).unique().tolist() == [6]
    assert not trimap_band(torch.zeros(4, 4, dtype=torch.long), 2).any()


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.0, 0.01, 0.2]))
def test_distance_gives_the_band_of_every_width(seed, height, width, void):
    """From single pixels to maps with more blocks than labels, with and without void."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (2, height, width), generator=generator)
    side = int(torch.randint(1, 8, (), generator=generator))
    labels = coarse.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]
    labels = torch.where(torch.rand(labels.shape, generator=generator) < void, 255, labels)
    distance = boundary_distance(labels)
    assert distance.dtype == torch.int32 and distance.shape == labels.shape and int(distance.min()) >= 1
    for reach in range(1, 41):
        assert torch.equal(distance <= reach, trimap_band(labels, reach)), reach


def test_distance_is_a_kings_walk_around_corners():
    labels = torch.zeros(1, 6, 6, dtype=torch.uint8)
    labels[0, 0, 0] = 7
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    expected = torch.maximum(i, j)
    expected[0, 0] = 1
    assert torch.equal(boundary_distance(labels)[0].long(), expected)


def test_distance_without_a_boundary_is_far():
    for labels in (torch.full((3, 4), 2), torch.full((3, 4), 255), torch.zeros(1, 1, dtype=torch.long)):
        assert (boundary_distance(labels) == FAR).all()
    assert boundary_distance(torch.tensor([[255, 0]])).tolist() == [[FAR, 1]]  # void borders, but is in no band
    assert boundary_distance(torch.tensor([[3, 0]]), ignore_index=3).tolist() == [[FAR, 1]]
    with pytest.raises(ValueError, match="labels"):
        boundary_distance(torch.zeros(4))


def test_band_errors():
    with pytest.raises(ValueError, match="width"):
        trimap_band(torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match="labels"):
        trimap_band(torch.zeros(4), 1)
