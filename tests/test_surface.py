"""The plot of a search, by where its cells, marks and texts are."""

import math
from dataclasses import astuple

import numpy as np
import pytest

from crfnet import plots, surface
from crfnet.plots import BOTTOM, COLOURS, INK, LEFT, Canvas, font
from crfnet.surface import MAP, SCALE, surface_plot
from crfnet.trials import Parameters, Trial
from crfnet.tuning import Search

COARSE = ((3.0, 5.0, 8.0), (30.0, 55.0, 100.0), (3.0, 6.0, 12.0), (3.0,), (1.0,))


def made_up(peak=(5.3, 60.0, 5.0, 3.0, 1.0), *, rounds=2, axes=COARSE, without=0.671, best=0.7134, steepness=1.0):
    """What a search finds on a smooth surface with its peak there; same rounds and order as `crfnet.tuning.search`."""

    def score(point):
        slopes = zip(point, peak, (0.012, 0.02, 0.03, 0.01, 0.01), strict=True)
        return best - steepness * sum(slope * math.log(value / top) ** 2 for value, top, slope in slopes)

    table = [Trial(Parameters(0.0, axes[1][0], axes[2][0], 0.0, axes[4][0]), without, 0)]
    ratios = [(max(axis) / min(axis)) ** (1 / (len(axis) - 1)) if len(axis) > 1 else 1.0 for axis in axes]
    for number in range(rounds + 1):
        for alpha in axes[1]:
            for beta in axes[2]:
                for w1 in axes[0]:
                    for w2 in axes[3]:
                        point = tuple(float(f"{value:.6g}") for value in (w1, alpha, beta, w2, axes[4][0]))
                        if Parameters(*point) not in {trial.parameters for trial in table}:
                            table.append(Trial(Parameters(*point), score(point), number))
        centre = astuple(max(table[1:], key=lambda trial: trial.mean_iou).parameters)
        steps = [ratio ** (0.5 ** (number + 1)) for ratio in ratios]
        axes = [(v,) if step == 1 else (v / step, v, v * step) for v, step in zip(centre, steps, strict=True)]
    return Search(max(table, key=lambda trial: trial.mean_iou), table)


W2 = (*COARSE[:3], (1.0, 3.0), (1.0,))
ONE = ((5.0,), (50.0,), (4.0,), (3.0,), (1.0,))
SEARCHES = {
    "middle": made_up(),
    "corner, two weights": made_up((12.0, 180.0, 18.0, 3.0, 1.0), axes=W2, without=0.7),
    "deep": made_up(rounds=4),
    "harmful": made_up(without=0.75),
    "flat": made_up(steepness=1e-4),  # numbers of five digits
    "steep": made_up(steepness=5.0),
    "equal": made_up(steepness=0.0),
    "one point": made_up(axes=ONE, rounds=0),
    "one row": made_up(axes=(*ONE[:1], COARSE[1], *ONE[2:])),
    "nought": made_up(best=0.0, steepness=0.0, without=0.0),
}


@pytest.fixture
def canvases(monkeypatch):
    """The canvases of the plots that a test draws."""
    kept: list[Canvas] = []

    class Kept(Canvas):
        def __init__(self, *size):
            super().__init__(*size)
            kept.append(self)

    monkeypatch.setattr(surface, "Canvas", Kept)
    return kept


def boxes(canvas):
    """(left, top, right, bottom) of every text's ink."""
    for (x, y), text, anchor, _, size, upwards in canvas.texts:
        left, top, right, bottom = font(size).getbbox(text, anchor="mm" if upwards else anchor)
        if upwards:
            left, top, right, bottom = top, -right, bottom, -left
        yield text, (x + left, y + top, x + right, y + bottom)


@pytest.mark.parametrize("name", SEARCHES)
def test_no_text_lies_on_another_or_leaves_the_picture(name, canvases):
    picture = surface_plot(SEARCHES[name])
    height, width, _ = picture.shape
    assert picture.dtype == np.uint8
    found = list(boxes(canvases[0]))
    for index, (text, (left, top, right, bottom)) in enumerate(found):
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, text
        for other, (a, b, c, d) in found[:index]:
            assert right <= a or c <= left or bottom <= b or d <= top, (text, other)


def places(canvas, text):
    return [point for point, said, *_ in canvas.texts if said == text]


def beside(picture, point):
    """The pixels between a number and the left edge of its cell, and the edge."""
    x, y = (round(value) for value in point)
    return [tuple(pixel) for pixel in picture[y, x - 19 : x - 15]]


def ringed(picture, points):
    return [point for point in points if INK in beside(picture, point)]


def test_cells_are_where_their_bandwidths_are_in_the_colour_of_their_score(canvases):
    found = SEARCHES["middle"]
    picture = surface_plot(found)
    top, left = picture.shape[0] - BOTTOM - MAP[1], LEFT
    xs, ys = ({float(said): point[k] for point, said, *_ in texts} for k, texts in enumerate(on_axes(canvases[0], top)))
    # the axes are logarithmic, and their coarse values have a tick
    assert {30, 55, 100} <= set(xs) and {3, 6, 12} <= set(ys)
    for at, low, middle, high in ((xs, 30, 55, 100), (ys, 3, 6, 12)):
        share = (at[middle] - at[low]) / (at[high] - at[low])
        assert share == pytest.approx(math.log(middle / low) / math.log(high / low))
    assert left < xs[30] < xs[100] < left + MAP[0] and top < ys[12] < ys[3] < top + MAP[1]
    best: dict[tuple[float, float], float] = {}
    for trial in found.table[1:]:
        pair = trial.parameters.theta_alpha, trial.parameters.theta_beta
        best[pair] = max(best.get(pair, 0), trial.mean_iou)
    for alpha in (30, 55, 100):
        for beta in (3, 6, 12):
            assert (xs[alpha], ys[beta]) in places(canvases[0], f"{100 * best[alpha, beta]:.1f}")
    worst = min(best, key=best.get)
    assert tuple(SCALE[0]) in beside(picture, (xs[worst[0]], ys[worst[1]]))
    chosen = place(xs, found.best.parameters.theta_alpha), place(ys, found.best.parameters.theta_beta)
    marked = ringed(picture, places(canvases[0], "71.3"))
    assert marked == [pytest.approx(chosen)] and len(places(canvases[0], "71.3")) > 1
    x, y = marked[0]
    assert tuple(picture[round(y) + 9, round(x)]) == tuple(SCALE[-1])  # under its number
    assert (picture[round(y) - 19 : round(y) - 12, round(x)] == COLOURS[2]).all(-1).any()  # the mark on its upper edge


def on_axes(canvas, top):
    """Texts of the ticks along x and along y."""
    x = [
        text
        for text in canvas.texts
        if text[2] == "mm" and text[0][1] == top + MAP[1] + 18 and text[0][0] < LEFT + MAP[0]
    ]
    return x, [text for text in canvas.texts if text[2] == "rm" and text[0][0] == LEFT - 9]


def place(at, value):
    """Where a value lies, from the ends of a logarithmic axis."""
    low, high = min(at), max(at)
    return at[low] + (at[high] - at[low]) * math.log(value / low) / math.log(high / low)


def test_a_second_weight_gets_a_curve():
    one, two = (surface_plot(SEARCHES[name]) for name in ("middle", "corner, two weights"))
    assert two.shape[1] - one.shape[1] == LEFT + surface.CURVE[0] + plots.RIGHT
    assert two.shape[0] == one.shape[0]


def test_curves_have_the_best_of_each_weight(monkeypatch):
    panels = []
    monkeypatch.setattr(plots, "draw_panel", lambda canvas, panel, *rest: panels.append(panel))
    found = SEARCHES["corner, two weights"]
    surface_plot(found)
    for panel, name in zip(panels, ("bilateral_weight", "spatial_weight"), strict=True):
        (values, best), (ends, level), (chosen, score) = panel.lines.values()
        assert values == sorted({getattr(trial.parameters, name) for trial in found.table[1:]})
        for value, top in zip(values, best, strict=True):
            assert top == 100 * max(t.mean_iou for t in found.table[1:] if getattr(t.parameters, name) == value)
        assert ends == [values[0], values[-1]] and level == [100 * found.without_crf.mean_iou] * 2
        assert chosen == [getattr(found.best.parameters, name)] and score == [100 * found.best.mean_iou] == [max(best)]


@pytest.mark.parametrize(("name", "said"), [("middle", "chosen"), ("harmful", "without CRF (chosen)")])
def test_the_legend_says_what_was_chosen(name, said, canvases):
    surface_plot(SEARCHES[name])
    assert [text for text in ("chosen", "without CRF (chosen)") if places(canvases[0], text)] == [said]


def test_of_equal_pairs_the_chosen_one_is_marked(canvases):
    """A pair that reached the best score later than another, though tried before it."""
    point = {"spatial_weight": 3.0, "theta_gamma": 1.0}
    trials = [
        Trial(Parameters(w, alpha, 4.0, *point.values()), score, 0)
        for w, alpha, score in ((3.0, 30.0, 0.6), (3.0, 60.0, 0.7), (5.0, 30.0, 0.7), (5.0, 60.0, 0.65))
    ]
    nothing = Trial(Parameters(0.0, 30.0, 4.0, 0.0, 1.0), 0.5, 0)
    picture = surface_plot(Search(trials[1], [nothing, *trials]))
    cells = sorted(places(canvases[0], "70.0"))[:2]
    assert ringed(picture, cells) == cells[1:]


def test_no_crf_alone_is_no_surface():
    nothing = Trial(Parameters(0.0, 30.0, 4.0, 0.0, 1.0), 0.5, 0)
    with pytest.raises(ValueError, match="must have a trial with a CRF"):
        surface_plot(Search(nothing, [nothing]))
