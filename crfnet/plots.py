"""Line plots drawn with Pillow: panels side by side under one legend; and what other plots are drawn from.

Shapes are drawn ``FINE`` times as large and then reduced, which smooths their edges; text is drawn at its own size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crfnet.images import Uint8

Line = tuple[Sequence[float], Sequence[float]]  # x ascending, y; NaN leaves a gap
Colour = tuple[int, int, int]
Point = tuple[float, float]

FINE = 4
PANEL = (560, 400)  # of the axes, in pixels
LEFT, RIGHT, TOP, BOTTOM, LEGEND = 74, 26, 44, 64, 34  # around the axes; height of a row of the legend
INK, GREY, LIGHT = (40, 40, 40), (110, 110, 110), (228, 228, 228)
# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell the lines apart without any colour
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (60, 60, 60))
MARKERS = ("circle", "square", "triangle", "diamond")
MARKED = 8  # markers a line, about


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    lines: Mapping[str, Line]  # by name


def draw(panels: Sequence[Panel]) -> Uint8:
    """The picture, (H, W, 3); lines of one name look alike in all panels.

    Raises:
        ValueError: no panel, a line whose x and y differ in number, or a panel without a finite point.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    if not names:
        raise ValueError("a plot wants at least one panel with at least one line, got none")
    width = len(panels) * (LEFT + PANEL[0] + RIGHT)
    places, legend_height = legend_places(names, width)
    canvas = Canvas(width, legend_height + TOP + PANEL[1] + BOTTOM)
    draw_legend(canvas, places)
    for k, panel in enumerate(panels):
        draw_panel(canvas, panel, names, (k * (LEFT + PANEL[0] + RIGHT) + LEFT, legend_height + TOP))
    return canvas.picture()


def style(index: int) -> tuple[Colour, str]:
    """Colour and marker of a line, by its place in the legend."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def legend_places(names: Sequence[str], width: int) -> tuple[dict[str, Point], int]:
    """Where the sample of each line begins, in as many rows as it takes, and the height of all."""
    places: dict[str, Point] = {}
    x, y = float(LEFT), 30.0
    for name in names:
        takes = 46 + font(16).getlength(name) + 34
        if x > LEFT and x + takes > width:
            x, y = LEFT, y + LEGEND
        places[name] = (x, y)
        x += takes
    return places, round(y + LEGEND / 2)


def draw_legend(canvas: "Canvas", places: Mapping[str, Point]) -> None:
    """A sample of each line with its name."""
    for index, (name, (x, y)) in enumerate(places.items()):
        colour, marker = style(index)
        canvas.line([(x, y), (x + 36, y)], colour)
        canvas.marker((x + 18, y), colour, marker)
        canvas.text((x + 46, y), name, "lm", INK)


def draw_panel(
    canvas: "Canvas", panel: Panel, names: Sequence[str], corner: tuple[int, int], size: tuple[int, int] = PANEL
) -> None:
    """Axes of one size with their upper left corner there; ``names`` are those of the legend, in its order.

    Raises:
        ValueError: a line whose x and y differ in number, or no finite point.
    """
    (left, top), (width, height) = corner, size
    right, bottom = left + width, top + height
    for name, (x, y) in panel.lines.items():
        if len(x) != len(y):
            raise ValueError(f"line {name!r} must have as many x as y, got {len(x)} and {len(y)}")
    points = [(a, b) for x, y in panel.lines.values() for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not points:
        raise ValueError(f"{panel.title!r} has no line with a finite point")
    x_points, y_points = zip(*points, strict=True)
    x_low, x_high = min(x_points), max(x_points)
    xs, ys = ticks(x_low, x_high), ticks(min(y_points), max(y_points))
    # an axis ends on ticks along y, and where its data end along x
    y_low, y_high = ys[0], ys[-1]
    if x_low == x_high:
        x_low, x_high = xs[0], xs[-1]
    elif x_low not in xs and xs[1] - x_low > (xs[1] - xs[0]) / 2:
        xs[0] = x_low  # room for the number where the data begin

    def at(x: float, y: float) -> Point:
        return left + (x - x_low) / (x_high - x_low) * width, bottom - (y - y_low) / (y_high - y_low) * height

    for value in ys:
        _, y_there = at(x_low, value)
        canvas.line([(left, y_there), (right, y_there)], LIGHT, 1)
        canvas.text((left - 9, y_there), number(value, ys), "rm", GREY)
    for value in (value for value in xs if x_low <= value <= x_high):
        x_there, _ = at(value, y_low)
        canvas.line([(x_there, bottom), (x_there, bottom + 5)], GREY, 1)
        canvas.text((x_there, bottom + 18), number(value, xs), "mm", GREY)
    canvas.line([(left, top), (left, bottom), (right, bottom)], GREY, 1)
    canvas.text((left, top - 20), panel.title, "lm", INK, 18)
    canvas.text(((left + right) / 2, bottom + 44), panel.x_label, "mm", INK)
    for name, (x_values, y_values) in panel.lines.items():
        colour, marker = style(names.index(name))
        placed = [at(x, y) if math.isfinite(y) else None for x, y in zip(x_values, y_values, strict=True)]
        for run in _runs(placed):
            canvas.line(run, colour)
        step = max(1, len(placed) // MARKED)
        for index, point in enumerate(placed):
            alone = all(placed[k] is None for k in (index - 1, index + 1) if 0 <= k < len(placed))
            if point is not None and ((index + 1) % step == 0 or alone):  # for widths 1..40: 5, 10, ...
                canvas.marker(point, colour, marker)


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, from one not above ``low`` to one not below ``high``."""
    if low == high:
        low, high = (low - 1, high) if low > 0 else (low, high + 1)  # fractions stay within 0..1
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float, among: Sequence[float]) -> str:
    """The value with as many digits as tell the ticks apart."""
    digits = max(0, -math.floor(math.log10(among[-1] - among[-2]) + 1e-9))
    return f"{value:.{digits}f}"


def _runs(points: Sequence[Point | None]) -> list[list[Point]]:
    """The stretches without a gap, of at least two points."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if len(run) > 1]


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, for text of so many pixels."""
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    return own


class Canvas:
    """Shapes on a fine white picture, text kept for the reduced one; all positions in pixels of the latter."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.fine = Image.new("RGB", (FINE * width, FINE * height), "white")
        self.shapes = ImageDraw.Draw(self.fine)
        self.texts: list[tuple[Point, str, str, Colour, int, bool]] = []

    def line(self, points: Sequence[Point], colour: Colour, width: float = 2.4) -> None:
        """A line through the points."""
        fine = [(FINE * x, FINE * y) for x, y in points]
        self.shapes.line(fine, colour, round(FINE * width), joint="curve")

    def box(
        self,
        corner: Point,
        size: Point,
        fill: Colour,
        outline: Colour | None = None,
        *,
        width: float = 0,
        radius: float = 0,
    ) -> None:
        """A rectangle from its upper left corner, its outline inside, with round corners of a radius."""
        (x, y), (w, h) = corner, size
        # a pixel at the end of Pillow's boxes belongs to them
        fine = (FINE * x, FINE * y, FINE * (x + w) - 1, FINE * (y + h) - 1)
        self.shapes.rounded_rectangle(fine, FINE * radius, fill, outline, round(FINE * width))

    def marker(self, point: Point, colour: Colour, kind: str, radius: float = 4.5) -> None:
        """One of ``MARKERS`` around a point."""
        x, y = FINE * point[0], FINE * point[1]
        # a white rim keeps markers on each other apart
        for fill, r in (("white", FINE * (radius + 1)), (colour, FINE * radius)):
            if kind == "circle":
                self.shapes.ellipse((x - r, y - r, x + r, y + r), fill)
            else:
                corners = {
                    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
                    "triangle": [(0, -1.2), (1.1, 0.85), (-1.1, 0.85)],
                    "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
                }[kind]
                self.shapes.polygon([(x + r * a, y + r * b) for a, b in corners], fill)

    def text(
        self, point: Point, text: str, anchor: str, colour: Colour, size: int = 16, *, upwards: bool = False
    ) -> None:
        """Text at a point, by Pillow's anchors; read upwards, it has the point in its middle."""
        self.texts.append((point, text, anchor, colour, size, upwards))

    def picture(self) -> Uint8:
        """All of it, (H, W, 3)."""
        image = self.fine.resize(self.size, Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        for point, text, anchor, colour, size, upwards in self.texts:
            if upwards:
                length, height = math.ceil(font(size).getlength(text)), 2 * size
                lying = Image.new("L", (length, height))
                ImageDraw.Draw(lying).text((length / 2, height / 2), text, 255, font(size), "mm")
                standing = lying.transpose(Image.Transpose.ROTATE_90)
                image.paste(colour, (round(point[0] - height / 2), round(point[1] - length / 2)), standing)
            else:
                pen.text(point, text, colour, font(size), anchor)
        return np.array(image)
