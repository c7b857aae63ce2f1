"""Pictures to judge label maps by eye: photo, truth and each method's labels, and below these where they are wrong."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crfnet.images import Uint8, voc_palette

HEIGHT = 180  # pixels, about: small maps are magnified to it
HEADING, GAP = 24, 8  # pixels
RIGHT, WRONG, VOID = (225, 225, 225), (213, 43, 30), (255, 255, 255)


def mistakes(called: Uint8, truth: Uint8, *, ignore_label: int = 255) -> Uint8:
    """Where labels (H, W) are wrong: red, right ones grey, void white; (H, W, 3)."""
    colours = np.array([RIGHT, WRONG, VOID], np.uint8)
    kind = np.where(truth == ignore_label, 2, called != truth)
    return colours[kind]


def comparison_picture(
    truth: Uint8,
    called: Mapping[str, Uint8],
    *,
    photo: Uint8 | None = None,
    ignore_label: int = 255,
    palette: Uint8 | None = None,
) -> Uint8:
    """One image's labels side by side under their names, mistakes below; (H', W', 3).

    Args:
        truth: labels (H, W).
        called: labels (H, W) of each method by its name.
        photo: (H, W, 3), to come first.
        ignore_label: void in the truth.
        palette: (256, 3) colours of the labels, VOC's by default.

    Raises:
        ValueError: sizes differ.
    """
    sizes = [labels.shape for labels in called.values()] + ([] if photo is None else [photo.shape[:2]])
    if any(size != truth.shape for size in sizes):
        raise ValueError(f"photo and labels must have the truth's size {truth.shape}, got {sizes}")
    colours = voc_palette() if palette is None else palette
    blank = np.full((*truth.shape, 3), 255, np.uint8)
    tops = [] if photo is None else [("image", photo)]
    tops += [("truth", colours[truth]), *((name, colours[labels]) for name, labels in called.items())]
    below = [mistakes(labels, truth, ignore_label=ignore_label) for labels in called.values()]
    below = [blank] * (len(tops) - len(below)) + below
    return _grid([name for name, _ in tops], [[picture for _, picture in tops], below])


def _grid(headings: Sequence[str], rows: Sequence[Sequence[Uint8]]) -> Uint8:
    """Pictures of one size in rows and columns, magnified by whole pixels, a heading on each column."""
    zoom = max(1, round(HEIGHT / rows[0][0].shape[0]))
    height, width = (zoom * n for n in rows[0][0].shape[:2])
    size = (len(headings) * (width + GAP) - GAP, HEADING + len(rows) * (height + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for k, heading in enumerate(headings):
        left = k * (width + GAP)
        pen.text((left, HEADING // 2), _fitting(heading, font, width), (40, 40, 40), font, "lm")
        for j, row in enumerate(rows):
            picture = Image.fromarray(row[k].repeat(zoom, 0).repeat(zoom, 1))
            canvas.paste(picture, (left, HEADING + j * (height + GAP)))
    return np.array(canvas)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the text as ``width`` pixels hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""
