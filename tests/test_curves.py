"""Trimap curves against one confusion matrix a width, and their plots by where the ink is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crfnet import plots
from crfnet.curves import WIDTHS, TrimapCurve, trimap_curve, trimap_plot
from crfnet.data import Samples, voc_files, write_scenes
from crfnet.metrics import ConfusionMatrix, trimap_band
from crfnet.plots import Panel, draw, ticks


def scene(seed: int, height: int = 24, width: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    """What was called and the truth: blocks of 4 labels with some void."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (3, 3), generator=generator).repeat_interleave(8, 0).repeat_interleave(11, 1)
    truth = truth[:height, :width].contiguous()
    truth[torch.rand(truth.shape, generator=generator) < 0.01] = 255
    return torch.randint(0, 4, truth.shape, generator=generator), truth


@pytest.mark.parametrize("seed", range(5))
def test_every_width_has_the_matrix_of_its_band(seed):
    curve = TrimapCurve(4)
    alone = [ConfusionMatrix(4) for _ in WIDTHS]
    for image in range(2):
        called, truth = scene(seed + image)
        curve.add(called, truth)
        for width, matrix in zip(WIDTHS, alone, strict=True):
            matrix.add(called, truth, trimap_band(truth, width))
    assert WIDTHS == tuple(range(1, 41)) == curve.widths
    for got, wanted in zip(curve.matrices(), alone, strict=True):
        assert torch.equal(got.counts, wanted.counts)
    np.testing.assert_array_equal(curve.mean_iou(), [matrix.mean_iou for matrix in alone])
    np.testing.assert_array_equal(curve.pixel_accuracy(), [matrix.pixel_accuracy for matrix in alone])


def test_some_widths_are_those_of_the_whole_curve():
    whole, some = TrimapCurve(4), TrimapCurve(4, widths=(2, 7, 50))
    for seed in range(3):
        called, truth = scene(seed)
        whole.add(called, truth)
        some.add(called, truth)
    assert some.mean_iou()[:2] == [whole.mean_iou()[1], whole.mean_iou()[6]]
    # 50 pixels reach every pixel of these maps
    assert int(some.matrices()[2].counts.sum()) == sum(int((scene(seed)[1] != 255).sum()) for seed in range(3))


def test_counts_of_parts_add_up():
    whole, parts = TrimapCurve(4), [TrimapCurve(4), TrimapCurve(4)]
    for seed in range(4):
        whole.add(*scene(seed))
        parts[seed % 2].add(*scene(seed))
    assert torch.equal(whole.counts, parts[0].counts + parts[1].counts)


@pytest.mark.parametrize("label", [1, 255])
def test_no_boundary_no_score(label):
    curve = TrimapCurve(3, widths=(1, 40))
    curve.add(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), label))
    curve.add(torch.zeros(5, 4, dtype=torch.long), torch.full((5, 4), label))
    assert not curve.counts.any() and all(map(math.isnan, curve.mean_iou() + curve.pixel_accuracy()))
    with pytest.raises(ValueError, match="no line with a finite point"):
        trimap_plot({"a": curve})


def test_curve_errors():
    for widths in ((), (0, 1), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="widths must be ascending"):
            TrimapCurve(3, widths=widths)
    with pytest.raises(ValueError, match="num_classes"):
        TrimapCurve(0)
    curve = TrimapCurve(2)
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 3\), \(3, 2\)\]"):
        curve.add(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"predicted must be 0\.\.1, got 2\.\.2"):
        curve.add(torch.tensor([[2, 2]]), torch.tensor([[0, 1]]))
    assert not curve.counts.any()


def test_curve_of_a_predictor(tmp_path):
    write_scenes(tmp_path, num_train=1, num_val=3, height=32, width=40)
    samples = Samples(voc_files(tmp_path, "val"), 21, keep=True)

    def background(image):
        return torch.nn.functional.one_hot(torch.zeros(1, *image.shape[2:], dtype=torch.long), 21).movedim(-1, 1)

    by_hand = TrimapCurve(21, widths=(1, 3))
    for index in range(len(samples)):
        by_hand.add(torch.zeros_like(samples[index][1]), samples[index][1])
    assert torch.equal(trimap_curve(background, samples, widths=(1, 3)).counts, by_hand.counts)


# Plots


def inked(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(row, column) of the pixels of exactly one colour."""
    return np.argwhere((picture == colour).all(-1))


def test_lines_are_where_their_numbers_are():
    picture = draw([Panel("y", "x", {"falling": ([1, 40], [100.0, 0.0]), "flat": ([1, 40], [50.0, 50.0])})])
    height, width, _ = picture.shape
    assert width == plots.LEFT + plots.PANEL[0] + plots.RIGHT
    top, bottom = height - plots.BOTTOM - plots.PANEL[1], height - plots.BOTTOM
    for colour, share in ((plots.COLOURS[0], lambda x: x), (plots.COLOURS[1], lambda x: 0.5 + 0 * x)):
        rows, columns = inked(picture, colour)[inked(picture, colour)[:, 0] >= top].T
        inside = (columns > plots.LEFT + 10) & (columns < width - plots.RIGHT - 10)  # off the markers at the ends
        rows, columns = rows[inside], columns[inside]
        assert len(np.unique(columns)) > 0.9 * (plots.PANEL[0] - 20)
        expected = top + share((columns + 0.5 - plots.LEFT) / plots.PANEL[0]) * (bottom - top)
        # a line 2.4 pixels wide at most 36 degrees steep, and half a pixel of rounding
        assert np.abs(rows + 0.5 - expected).max() <= 1.2 / np.cos(np.radians(36)) + 0.5


def test_lines_of_one_name_look_alike_in_all_panels_and_the_legend_grows():
    lines = {f"method {k} with a long name": ([1, 2, 3], [k, k + 1.0, k + 2.0]) for k in range(8)}
    one, two = draw([Panel("a", "x", lines)]), draw([Panel("a", "x", lines)] * 2)
    assert two.shape[1] == 2 * one.shape[1] and two.shape[0] < one.shape[0]  # fewer rows of legend where it is wide
    for index in range(len(plots.COLOURS)):
        assert len(inked(one, plots.COLOURS[index])) > 0


def test_gaps_stay_open_and_lonely_points_are_marked():
    nan = math.nan
    picture = draw([Panel("y", "x", {"a": (list(range(1, 41)), [nan] * 9 + [1.0] + [nan] * 20 + [2.0] * 10)})])
    top = picture.shape[0] - plots.BOTTOM - plots.PANEL[1]
    ink = inked(picture, plots.COLOURS[0])
    columns = np.unique(ink[ink[:, 0] >= top][:, 1])
    at = [plots.LEFT + (x - 10) / 30 * plots.PANEL[0] for x in (10, 31)]  # the axis begins where the data do
    assert abs(columns.min() - at[0]) <= 5 and columns[columns > at[0] + 10].min() >= at[1] - 6


def test_one_width_alone_can_be_drawn():
    assert draw([Panel("y", "x", {"a": ([3], [0.5])})]).dtype == np.uint8


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_round_and_hold_the_data(low, span):
    high = low + span
    places = ticks(low, high)
    step = places[1] - places[0]
    assert places[0] <= low + 1e-6 * step and places[-1] >= high - 1e-6 * step and 2 <= len(places) <= 11
    mantissa = step / 10.0 ** math.floor(math.log10(step * (1 + 1e-9)))
    assert min(abs(mantissa - factor) for factor in (1, 2, 5, 10)) < 1e-3
    np.testing.assert_allclose(np.diff(places), step, rtol=1e-3)


def test_ticks_of_one_value_stay_within_fractions():
    assert ticks(100, 100)[-1] == 100 and ticks(0, 0)[0] == 0


def test_plot_errors():
    with pytest.raises(ValueError, match="at least one line"):
        draw([])
    with pytest.raises(ValueError, match="'a' must have as many x as y, got 2 and 1"):
        draw([Panel("y", "x", {"a": ([1, 2], [1.0])})])
