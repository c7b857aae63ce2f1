"""A picture of what a search of CRF parameters found: the map of its bandwidths, and a curve over each weight.

Every trial is a point in five dimensions. The map has a cell for each tried pair of ``theta_alpha`` and ``theta_beta``
with the best mean IoU among all trials of that pair; a curve has, for each tried value of one weight, the best among
all trials of that value.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from crfnet import plots
from crfnet.images import Uint8
from crfnet.plots import BOTTOM, GREY, INK, LEFT, LIGHT, RIGHT, TOP, Canvas, Colour, Panel, Point, font
from crfnet.trials import Trial
from crfnet.tuning import Search

Key = TypeVar("Key")

MAP, CURVE = (600, 440), (330, 440)  # of the axes, in pixels
BAR_GAP, BAR, BAR_RIGHT = 22, 16, 64  # beside the map: space, colour bar, its numbers
TEXT, CELL_HEIGHT = 14, 26
# from low to high, growing lighter, so that it reads in grey too: five colours of matplotlib's viridis
SCALE = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
WEIGHTS = {"bilateral_weight": "w1, bilateral_weight", "spatial_weight": "w2, spatial_weight"}


def surface_plot(found: Search) -> Uint8:
    """The map of the bandwidths beside a curve over w1, and one over w2 where several were tried, (H, W, 3).

    The axes of the map are logarithmic, its numbers mean IoU in per cent. Where cells would lie on each other the best
    keep their place and number, the others become points below them. The score without a CRF is a line beside the
    curves; the best CRF is marked everywhere, and the legend says which of both the search chose.

    Raises:
        ValueError: the search has no trial with a CRF.
    """
    trials = found.table[1:]
    if not trials:
        raise ValueError("a search must have a trial with a CRF, got no CRF alone")
    best = found.best_crf
    helps = found.best == best
    names = ["best over all else", f"without CRF{'' if helps else ' (chosen)'}", "chosen" if helps else "best CRF"]
    panels = []
    for name, title in WEIGHTS.items():
        top = _best_by(trials, lambda trial, name=name: float(getattr(trial.parameters, name)))  # type: ignore[misc]
        values = sorted(top)
        if name == "bilateral_weight" or len(values) > 1:
            level = [100 * found.without_crf.mean_iou] * 2
            lines = {
                names[0]: (values, [100 * top[value].mean_iou for value in values]),
                names[1]: ([values[0], values[-1]], level),
                names[2]: ([getattr(best.parameters, name)], [100 * best.mean_iou]),
            }
            panels.append(Panel("Best mean IoU (%)", title, lines))

    map_width, curve_width = LEFT + MAP[0] + BAR_GAP + BAR + BAR_RIGHT, LEFT + CURVE[0] + RIGHT
    width = map_width + len(panels) * curve_width
    places, legend_height = plots.legend_places(names, width)
    canvas = Canvas(width, legend_height + TOP + MAP[1] + BOTTOM)
    plots.draw_legend(canvas, places)
    _draw_map(canvas, found, plots.style(2), (LEFT, legend_height + TOP))
    for k, panel in enumerate(panels):
        plots.draw_panel(canvas, panel, names, (map_width + k * curve_width + LEFT, legend_height + TOP), CURVE)
    return canvas.picture()


def _best_by(trials: Iterable[Trial], key: Callable[[Trial], Key]) -> dict[Key, Trial]:
    """For each key the best of its trials, the first of equals."""
    top: dict[Key, Trial] = {}
    for trial in trials:
        if key(trial) not in top or trial.mean_iou > top[key(trial)].mean_iou:
            top[key(trial)] = trial
    return top


def _draw_map(canvas: Canvas, found: Search, mark: tuple[Colour, str], corner: tuple[int, int]) -> None:
    (left, top), (width, height) = corner, MAP
    right, bottom = left + width, top + height
    pairs = _best_by(found.table[1:], lambda trial: (trial.parameters.theta_alpha, trial.parameters.theta_beta))
    scores = [100 * trial.mean_iou for trial in pairs.values()]
    levels = plots.ticks(min(scores), max(scores))
    low, high = (min(scores), max(scores)) if min(scores) < max(scores) else (levels[0], levels[-1])
    digits = max(1, len(plots.number(low, levels).partition(".")[2]))
    cell_width = max(font(TEXT).getlength(f"{score:.{digits}f}") for score in scores) + 10

    x_values, y_values = ([pair[k] for pair in pairs] for k in (0, 1))  # coarse ones first, as they were tried
    x_at = _logarithmic(x_values, left + cell_width, right - cell_width)
    y_at = _logarithmic(y_values, bottom - CELL_HEIGHT, top + CELL_HEIGHT)
    for value in _apart(x_values, x_at, lambda value: font(16).getlength(f"{value:.3g}") + 10):
        canvas.line([(x_at(value), top), (x_at(value), bottom)], LIGHT, 1)
        canvas.line([(x_at(value), bottom), (x_at(value), bottom + 5)], GREY, 1)
        canvas.text((x_at(value), bottom + 18), f"{value:.3g}", "mm", GREY)
    for value in _apart(y_values, y_at, lambda value: 20):
        canvas.line([(left, y_at(value)), (right, y_at(value))], LIGHT, 1)
        canvas.text((left - 9, y_at(value)), f"{value:.3g}", "rm", GREY)
    canvas.line([(left, top), (left, bottom), (right, bottom)], GREY, 1)
    title = f"Mean IoU (%) of the best weights; without CRF {100 * found.without_crf.mean_iou:.{digits}f}"
    canvas.text((left, top - 20), title, "lm", INK, 18)
    canvas.text(((left + right) / 2, bottom + 44), "theta_alpha (pixels)", "mm", INK)
    canvas.text((left - 58, (top + bottom) / 2), "theta_beta (intensity levels)", "mm", INK, upwards=True)

    ranked = sorted(pairs.items(), key=lambda item: (-item[1].mean_iou, item[1] != found.best_crf))
    cells: list[tuple[Point, Colour, str]] = []  # the best first; their centres
    points: list[tuple[Point, Colour]] = []
    for (alpha, beta), trial in ranked:
        x, y = x_at(alpha), y_at(beta)
        score = 100 * trial.mean_iou
        colour = _colour((score - low) / (high - low))
        if any(abs(x - a) < cell_width + 2 and abs(y - b) < CELL_HEIGHT + 2 for (a, b), _, _ in cells):
            points.append(((x, y), colour))
        else:
            cells.append(((x, y), colour, f"{score:.{digits}f}"))
    for point, colour in points:
        canvas.marker(point, colour, "circle", 5)
    for k, ((x, y), colour, text) in enumerate(cells):
        upper_left, rim = (x - cell_width / 2, y - CELL_HEIGHT / 2), None if k else INK
        canvas.box(upper_left, (cell_width, CELL_HEIGHT), colour, rim, width=2.5, radius=5)
        dark = np.dot(colour, (0.299, 0.587, 0.114)) < 115
        canvas.text((x, y), text, "mm", (255, 255, 255) if dark else INK, TEXT)
    x, y = cells[0][0]
    canvas.marker((x, y - CELL_HEIGHT / 2 - 3), *mark)

    x, step = right + BAR_GAP, height / 256
    for k in range(256):
        canvas.box((x, bottom - (k + 1) * step), (BAR, step + 0.5), _colour((k + 0.5) / 256))
    for level in (level for level in levels if low <= level <= high):
        y = bottom - (level - low) / (high - low) * height
        canvas.line([(x + BAR, y), (x + BAR + 5, y)], GREY, 1)
        canvas.text((x + BAR + 10, y), plots.number(level, levels), "lm", GREY)


def _logarithmic(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Where a value lies between two pixels, the least value at the first; one value alone lies in the middle."""
    low, high = np.log(min(values)), np.log(max(values))
    if low == high:
        return lambda value: (first + last) / 2
    return lambda value: float(first + (np.log(value) - low) / (high - low) * (last - first))


def _apart(values: Sequence[float], at: Callable[[float], float], room: Callable[[float], float]) -> list[float]:
    """Those values, in their order, that lie at least half of both rooms from the ones before: ticks one can read."""
    kept: list[float] = []
    for value in values:
        if all(abs(at(value) - at(other)) >= (room(value) + room(other)) / 2 for other in kept):
            kept.append(value)
    return kept


def _colour(share: float) -> Colour:
    """The colour of 0..1."""
    position = share * (len(SCALE) - 1)
    red, green, blue = (round(float(np.interp(position, range(len(SCALE)), SCALE[:, k]))) for k in range(3))
    return red, green, blue
