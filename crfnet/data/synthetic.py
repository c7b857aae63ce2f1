"""Procedural scenes in the folder layout of PASCAL VOC 2012: a data set without a download.

Seven of VOC's twenty classes are drawn (`CLASSES`) from a handful of parts each, in any colour and with any texture, so
that shape alone tells them apart; rocks and bushes of the same colours belong to the background. Scenes are drawn three
times larger than they are stored: pixels whose samples disagree about the object become void (255), as the thin border
around VOC's objects, and the colours of an edge are real mixtures. Legs, masts and wings are a few pixels wide,
well under the 8 pixels of a DCNN's output stride.

The layout is the one of the VOC development kit: ``VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets}``.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from crfnet.data.samples import VOID
from crfnet.images import PathLike, label_picture

Array = np.ndarray
Part = tuple[Array, int]  # where the part is (bool), and its tone: 0 body, 1 trim, 2 dark, 3 bright

Drawer = Callable[[Array, Array, np.random.Generator], list[Part]]

SAMPLES = 3  # samples per pixel and axis


def ellipse(u: Array, v: Array, x: float, y: float, rx: float, ry: float) -> Array:
    """Inside of an axis-parallel ellipse with centre (x, y) and radii (rx, ry)."""
    return ((u - x) / rx) ** 2 + ((v - y) / ry) ** 2 <= 1


def capsule(u: Array, v: Array, x0: float, y0: float, x1: float, y1: float, radius: float) -> Array:
    """All points within ``radius`` of the segment from (x0, y0) to (x1, y1): a rod with round ends."""
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((u - x0) * dx + (v - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
    return (u - x0 - along * dx) ** 2 + (v - y0 - along * dy) ** 2 <= radius**2


def polygon(u: Array, v: Array, *corners: tuple[float, float]) -> Array:
    """Inside of a polygon, convex or not, by the even-odd rule."""
    inside = np.zeros(np.broadcast(u, v).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
    return inside


def aeroplane(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Fuselage along u, one swept wing in front and one behind, a tail fin."""
    sweep = rng.uniform(0.15, 0.35)
    return [
        (polygon(u, v, (0.1, -0.08), (0.35, -0.08), (-sweep, -0.62), (-sweep - 0.16, -0.62)), 1),
        (polygon(u, v, (-0.95, -0.42), (-0.78, -0.42), (-0.5, -0.05), (-0.9, -0.05)), 1),
        (ellipse(u, v, 0.0, 0.0, 0.98, 0.16), 0),
        (ellipse(u, v, 0.72, -0.04, 0.12, 0.06), 2),
        (polygon(u, v, (0.05, 0.05), (0.38, 0.05), (-sweep, 0.66), (-sweep - 0.2, 0.66)), 1),
    ]


def boat(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Hull, a thin mast and two sails."""
    mast = rng.uniform(-0.12, 0.12)
    return [
        (capsule(u, v, mast, -0.95, mast, 0.5, 0.04), 2),
        (polygon(u, v, (mast + 0.07, -0.85), (mast + 0.07, 0.38), (0.78, 0.38)), 3),
        (polygon(u, v, (mast - 0.07, -0.65), (mast - 0.07, 0.38), (-0.6, 0.38)), 1),
        (polygon(u, v, (-0.95, 0.48), (0.98, 0.48), (0.66, 0.9), (-0.7, 0.9)), 0),
    ]


def bottle(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Body with round shoulders, a neck, a cap and a label."""
    width = rng.uniform(0.26, 0.34)
    return [
        (capsule(u, v, 0, -0.08, 0, 0.62, width), 0),
        (polygon(u, v, (-width, 0.4), (width, 0.4), (width, 0.96), (-width, 0.96)), 0),
        (polygon(u, v, (-0.11, -0.85), (0.11, -0.85), (0.11, 0.0), (-0.11, 0.0)), 0),
        (polygon(u, v, (-0.14, -0.97), (0.14, -0.97), (0.14, -0.8), (-0.14, -0.8)), 2),
        (polygon(u, v, (-width, 0.18), (width, 0.18), (width, 0.62), (-width, 0.62)), 3),
    ]


def car(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Body, cabin with windows, two wheels, an aerial."""
    roof = rng.uniform(-0.5, -0.4)
    return [
        (capsule(u, v, -0.6, -0.1, -0.75, -0.72, 0.025), 2),
        (polygon(u, v, (-0.62, 0.0), (-0.38, roof), (0.28, roof), (0.6, 0.0)), 0),
        (capsule(u, v, -0.82, 0.16, 0.82, 0.16, 0.17), 0),
        (polygon(u, v, (-0.48, -0.03), (-0.32, roof + 0.08), (-0.06, roof + 0.08), (-0.06, -0.03)), 2),
        (polygon(u, v, (0.04, -0.03), (0.04, roof + 0.08), (0.24, roof + 0.08), (0.46, -0.03)), 2),
        (ellipse(u, v, -0.5, 0.34, 0.2, 0.2), 2),
        (ellipse(u, v, 0.52, 0.34, 0.2, 0.2), 2),
        (ellipse(u, v, -0.5, 0.34, 0.09, 0.09), 3),
        (ellipse(u, v, 0.52, 0.34, 0.09, 0.09), 3),
    ]


def cat(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Round body, head with ears and eyes, four legs, a curved tail."""
    tail = rng.uniform(-0.8, -0.5)
    legs = [(capsule(u, v, x, 0.4, x + rng.uniform(-0.06, 0.06), 0.9, 0.075), 0) for x in (-0.48, -0.3, 0.2, 0.4)]
    return legs + [
        (capsule(u, v, -0.6, 0.2, -0.92, -0.1, 0.065), 0),
        (capsule(u, v, -0.92, -0.1, -0.78, tail, 0.065), 1),
        (ellipse(u, v, -0.05, 0.28, 0.66, 0.32), 0),
        (polygon(u, v, (0.34, -0.3), (0.38, -0.82), (0.62, -0.45)), 1),
        (polygon(u, v, (0.6, -0.45), (0.88, -0.8), (0.88, -0.28)), 1),
        (ellipse(u, v, 0.6, -0.2, 0.33, 0.3), 0),
        (ellipse(u, v, 0.5, -0.24, 0.05, 0.07), 3),
        (ellipse(u, v, 0.73, -0.24, 0.05, 0.07), 3),
    ]


def chair(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """Seat on four thin legs, a back of three bars."""
    lean = rng.uniform(0.02, 0.16)
    bars = [capsule(u, v, x - lean, -0.9, x, 0.1, 0.055) for x in (-0.5, -0.1, 0.3)]
    legs = [(capsule(u, v, x, 0.15, 1.1 * x, 0.95, 0.06), 2) for x in (-0.52, -0.2, 0.3, 0.62)]
    return legs + [
        (bars[0] | bars[1] | bars[2], 0),
        (capsule(u, v, -0.52 - lean, -0.88, 0.32 - lean, -0.88, 0.1), 0),
        (polygon(u, v, (-0.6, 0.05), (0.5, 0.05), (0.72, 0.27), (-0.5, 0.27)), 1),
    ]


def pottedplant(u: Array, v: Array, rng: np.random.Generator) -> list[Part]:
    """A pot with a fan of thin stems, a leaf at the end of each."""
    parts: list[Part] = []
    for angle in np.linspace(-1.15, 1.15, int(rng.integers(4, 7))) + rng.uniform(-0.12, 0.12):
        length = rng.uniform(0.75, 1.05)
        x, y = length * np.sin(angle), 0.25 - length * np.cos(angle)
        along, across = u * np.sin(angle) - (v - 0.25) * np.cos(angle), u * np.cos(angle) + (v - 0.25) * np.sin(angle)
        parts += [(capsule(u, v, 0, 0.3, x, y, 0.04), 0), (ellipse(along, across, 0.78 * length, 0, 0.27, 0.13), 0)]
    return parts + [
        (polygon(u, v, (-0.4, 0.3), (0.4, 0.3), (0.28, 0.95), (-0.28, 0.95)), 1),
        (polygon(u, v, (-0.47, 0.24), (0.47, 0.24), (0.47, 0.4), (-0.47, 0.4)), 3),
    ]


#: VOC's class index → the drawer of its parts, in coordinates u (right) and v (down) from -1 to 1
CLASSES: dict[int, Drawer] = {
    1: aeroplane, 4: boat, 5: bottle, 7: car, 8: cat, 9: chair, 16: pottedplant,
}  # fmt: skip


def _value_noise(height: int, width: int, cell: float, rng: np.random.Generator) -> Array:
    """Smooth random values in -1..1 whose bumps are about ``cell`` samples wide, (height, width)."""
    ys, xs = np.arange(height) / cell, np.arange(width) / cell
    grid = rng.uniform(-1, 1, (int(ys[-1]) + 2, int(xs[-1]) + 2))
    y, x = ys.astype(int), xs.astype(int)
    fy, fx = (t * t * (3 - 2 * t) for t in (ys - y, xs - x))
    rows = grid[y] * (1 - fy)[:, None] + grid[y + 1] * fy[:, None]
    return rows[:, x] * (1 - fx) + rows[:, x + 1] * fx


def _texture(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """One of five surface patterns, values about -1..1; ``u``, ``v`` are the object's own coordinates."""
    kind, pitch, angle = rng.integers(5), rng.uniform(9, 16), rng.uniform(0, np.pi)
    a, b = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    if kind == 0:
        return np.zeros_like(u)
    if kind == 1:
        return np.sign(np.sin(pitch * a))  # stripes
    if kind == 2:
        return np.sign(np.sin(pitch * a) * np.sin(pitch * b))  # checks
    if kind == 3:
        return np.where(np.sin(pitch * a) * np.sin(pitch * b) > 0.35, 1.0, -0.4)  # spots
    return np.sin(0.5 * pitch * a + 2 * np.sin(0.3 * pitch * b))  # waves


def _colour(rng: np.random.Generator, away_from: Array | None = None, distance: float = 0.0) -> Array:
    """A random colour (3,), 0..255, at least ``distance`` from another one (as far as 20 trials allow)."""
    best, best_distance = np.zeros(3), -1.0
    for _ in range(20):
        hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.25, 0.85), rng.uniform(70, 230)
        ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
        colour = value * (1 - saturation * (1 - ramp))
        if away_from is None:
            return colour
        gap = float(np.linalg.norm(colour - away_from))
        if gap > best_distance:
            best, best_distance = colour, gap
        if gap >= distance:
            break
    return best


def _paint_background(height: int, width: int, rng: np.random.Generator) -> Array:
    """Sky, hills and ground with their textures, (height, width, 3), 0..255; everything here is class 0."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    top, bottom = _colour(rng), _colour(rng)
    canvas = (1 - y[..., None]) * (0.5 * top + 110) + y[..., None] * (0.3 * bottom + 140) + np.zeros((1, width, 1))
    canvas += 10 * _value_noise(height, width, 70, rng)[..., None]
    for depth in np.sort(rng.uniform(0.25, 0.75, rng.integers(1, 4))):
        ridge = depth + rng.uniform(0.03, 0.12) * np.sin(rng.uniform(3, 9) * x + rng.uniform(0, 6))
        ground = _colour(rng) * 0.75 + 30
        grain = 14 * _value_noise(height, width, rng.uniform(6, 30), rng) + 8 * _value_noise(height, width, 4, rng)
        canvas = np.where((y > ridge)[..., None], ground + grain[..., None], canvas)
    return canvas


def _paint_rock(canvas: Array, u: Array, v: Array, rng: np.random.Generator) -> None:
    """One rock or bush, a blob of class 0 in the colours of the objects, painted in place."""
    angle = np.arctan2(v, u)
    outline = 0.8 + 0.12 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.07 * np.sin(7 * angle + rng.uniform(0, 6))
    inside = np.hypot(u, v) < outline
    shade = _colour(rng) - 26 * (v - u)[inside][:, None] + 16 * _texture(u, v, rng)[inside][:, None]
    canvas[inside] = shade


def _paint_object(canvas: Array, drawer: Drawer, u: Array, v: Array, rng: np.random.Generator) -> Array:
    """One object, painted in place; returns where it is, (height, width) bool."""
    parts = drawer(u, v, rng)
    where = np.logical_or.reduce([mask for mask, _ in parts])
    surroundings = canvas[where].mean(0) if where.any() else np.full(3, 128.0)
    body = _colour(rng, surroundings, rng.choice([35.0, 90.0], p=[0.25, 0.75]))
    tones = [body, _colour(rng, surroundings, 70.0), 0.25 * body + 12, 0.25 * body + 170]
    pattern = rng.uniform(8, 20) * _texture(u, v, rng) - 18 * (u + v)  # light from the upper left
    for mask, tone in parts:
        canvas[mask] = tones[tone] + pattern[mask][:, None] * (1.0 if tone < 2 else 0.3)
    return where


def draw_scene(rng: np.random.Generator, height: int = 96, width: int = 128) -> tuple[Array, Array]:
    """Draws one scene: image (height, width, 3) uint8 and labels (height, width) uint8, 255 = void."""
    tall, wide = SAMPLES * height, SAMPLES * width
    canvas = _paint_background(tall, wide, rng)
    owner = np.zeros((tall, wide), np.uint8)  # 0 background, n the n-th object
    classes = [0]
    y, x = np.arange(tall, dtype=np.float64)[:, None], np.arange(wide, dtype=np.float64)[None]

    def place(size: float, tilt: float) -> tuple[tuple[slice, slice], Array, Array]:
        # a window of the canvas that holds the whole object, and its own coordinates there
        cx, cy, flip = rng.uniform(0.12, 0.88) * wide, rng.uniform(0.2, 0.8) * tall, rng.choice([-1, 1])
        rows, columns = (slice(max(0, int(at - 1.5 * size)), int(at + 1.5 * size) + 1) for at in (cy, cx))
        c, s = np.cos(tilt) / size, np.sin(tilt) / size
        dy, dx = y[rows] - cy, x[:, columns] - cx
        return (rows, columns), flip * (dx * c + dy * s), dy * c - dx * s

    for _ in range(rng.integers(2, 5)):
        window, u, v = place(rng.uniform(0.08, 0.2) * tall, rng.uniform(-1, 1))
        _paint_rock(canvas[window], u, v, rng)
    for _ in range(rng.integers(1, 4)):
        label = int(rng.choice(list(CLASSES)))
        window, u, v = place(rng.uniform(0.24, 0.4) * tall, rng.normal(0, 0.12))
        where = _paint_object(canvas[window], CLASSES[label], u, v, rng)
        owner[window][where] = len(classes)
        classes.append(label)
    direction = rng.uniform(0, 2 * np.pi)
    slope = (x / wide - 0.5) * np.cos(direction) + (y / tall - 0.5) * np.sin(direction)
    canvas *= (1 + rng.uniform(0, 0.6) * slope)[..., None]  # a gradient of illumination

    cells = canvas.reshape(height, SAMPLES, width, SAMPLES, 3).mean((1, 3))
    cells += rng.normal(0, rng.uniform(3, 8), cells.shape)  # sensor noise
    # each pixel's samples and the first ones of its neighbours: two objects never touch without void between them
    edge = np.pad(owner, ((0, 1), (0, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(edge, (SAMPLES + 1, SAMPLES + 1))[::SAMPLES, ::SAMPLES]
    first = windows.min((2, 3))
    labels = np.where(first == windows.max((2, 3)), np.array(classes, np.uint8)[first], VOID).astype(np.uint8)
    return cells.clip(0, 255).round().astype(np.uint8), labels


def write_scenes(
    root: PathLike, *, num_train: int = 240, num_val: int = 60, height: int = 96, width: int = 128, seed: int = 0
) -> Path:
    """Writes a data set of scenes below ``root`` and returns the folder ``root/VOCdevkit/VOC2012``.

    The same arguments give the same scenes; a folder that is there already is kept if it was made with the same
    arguments. The folder appears whole or not at all.

    Raises:
        ValueError: a size or count that is too small.
        FileExistsError: the folder holds something else (real VOC, or scenes of other arguments).
    """
    if min(num_train, num_val) < 1 or min(height, width) < 16:
        raise ValueError(
            f"wanted num_train and num_val >= 1, height and width >= 16, got {num_train}, {num_val}, {height}, {width}"
        )
    target = Path(root) / "VOCdevkit" / "VOC2012"
    recipe = f"crfnet scenes 1: {num_train=} {num_val=} {height=} {width=} {seed=}\n"
    note = target / "scenes.txt"
    if target.exists():
        if note.is_file() and note.read_text() == recipe:
            return target
        raise FileExistsError(f"{target} holds other data; give another folder, or delete it to have it drawn again")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".scenes-", dir=target.parent))
    try:
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (draft / folder).mkdir(parents=True)
        names = [f"2012_{index:06d}" for index in range(num_train + num_val)]
        for index, name in enumerate(names):
            image, labels = draw_scene(np.random.default_rng([seed, index]), height, width)
            Image.fromarray(image).save(draft / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
            label_picture(labels).save(draft / "SegmentationClass" / f"{name}.png")
        lists = {"train": names[:num_train], "val": names[num_train:], "trainval": names}
        for split, members in lists.items():
            (draft / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(members) + "\n")
        (draft / "scenes.txt").write_text(recipe)
        draft.chmod(0o755)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
