"""Scores and losses against their formulas on cases small enough to count by hand, then properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crfnet.losses import cross_entropy
from crfnet.metrics import ConfusionMatrix, trimap_band


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


def test_band_errors():
    with pytest.raises(ValueError, match="width"):
        trimap_band(torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match="labels"):
        trimap_band(torch.zeros(4), 1)


def test_cross_entropy_is_the_mean_over_labelled_pixels():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = 255
    p = logits.softmax(1)
    terms = [
        -p[b, labels[b, i, j], i, j].log()
        for b in range(2)
        for i in range(4)
        for j in range(5)
        if labels[b, i, j] != 255
    ]
    assert len(terms) == 30
    # double precision, 30 summands
    assert cross_entropy(logits, labels).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-12)


def test_cross_entropy_without_any_label_is_zero_not_nan():
    logits = torch.randn(1, 3, 4, 4).requires_grad_()
    loss = cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_cross_entropy_wants_shapes_that_belong_together():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 5, 4\)"):
        cross_entropy(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, dtype=torch.long))
