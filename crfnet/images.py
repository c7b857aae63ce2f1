"""Pictures and label maps on disk: read with care, written whole or not at all.

A label map is an 8-bit indexed PNG: the index is the label, the palette only colours it for the eye. In VOC's palette,
bit 7 - i of the (red, green, blue) of label L is bit (0, 1, 2) of L >> 3 i, for i = 0..7.

A file with the wrong contents raises ValueError, what the system refuses (missing, no rights, disk full) OSError; both
name the file.
"""

import os
import re
import secrets
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Uint8 = NDArray[np.uint8]
PathLike = str | os.PathLike[str]

MAX_PIXELS = 100_000_000  # above any usual camera; a small file can unpack to gigabytes
_COLOUR_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})
_PILLOW_LIMIT = threading.Lock()  # held while Pillow's own limit, a global of its module, is another
_GREY_STEP = {"L;2": 85, "L;4": 17}  # Pillow stretches grey of 2 and 4 bits to 0..255; labels must not be stretched


def voc_palette() -> Uint8:
    """Colours of the labels 0..255 in PASCAL VOC, (256, 3): black, dark red, dark green, ...; 255 (void) is cream."""
    label = np.arange(256)[:, None]
    bits = (label >> (3 * np.arange(8))[:, None, None] + np.arange(3)) & 1  # (8, 256, 3)
    return (bits << (7 - np.arange(8))[:, None, None]).sum(0).astype(np.uint8)


@contextmanager
def opened(path: PathLike, max_pixels: int) -> Iterator[Image.Image]:
    """A Pillow image, its size checked before any pixel is unpacked; whatever Pillow raises becomes a ValueError."""
    with open(path, "rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels takes its place
        try:
            with _pillow_limit(max_pixels):
                image = Image.open(stream)
            with image:
                width, height = image.size
                if width * height > max_pixels:
                    size = f"{width} x {height} = {width * height} pixels"
                    raise ValueError(f"{size}, more than max_pixels (--max-pixels) = {max_pixels}")
                yield image
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not an image in a format that Pillow reads") from None
        # Pillow's decoders raise all of these on damaged files
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from error
        except Image.DecompressionBombError as error:  # over twice the limit
            found = re.search(r"\d+ pixels", str(error))
            said = f"{found[0] if found else error}, more than max_pixels (--max-pixels) = {max_pixels}"
            raise ValueError(f"{path}: {said}") from None


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Raise Pillow's own limit to ``max_pixels`` where it is lower; not off: some formats allocate when opened."""
    with _PILLOW_LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if limit is None else max(limit, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def load_pixels(image: Image.Image, max_pixels: int) -> None:
    """Unpack the pixels; only pictures over Pillow's limit, which some decoders ask again, wait for one another."""
    with _PILLOW_LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        image.load()
        return
    with _pillow_limit(max_pixels):
        image.load()


def read_image(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> Uint8:
    """The picture as RGB, (H, W, 3), turned upright by its EXIF orientation; of an animation, the first frame.

    Grey, palette and CMYK pictures become RGB; transparent pixels are laid over white; 16 bits a colour lose the low 8.

    Raises:
        ValueError: not a picture, damaged or truncated, over ``max_pixels``, or of 16-bit or float grey, where only the
            owner knows which range should become 0..255.
    """
    with opened(path, max_pixels) as image:
        load_pixels(image, max_pixels)
        if image.mode not in _COLOUR_MODES | _ALPHA_MODES:
            raise ValueError(f"pixels of type {image.mode}; convert them to 8-bit grey or RGB first")
        image = ImageOps.exif_transpose(image)
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def read_labels(path: PathLike, *, palette: Uint8 | None = None, max_pixels: int = MAX_PIXELS) -> Uint8:
    """The label map, (H, W): the indices of a palette picture, or the values of a grey one.

    Args:
        path: an indexed or grey picture, of 1 to 16 bits; not JPEG, which changes labels.
        palette: (K, 3), colours to look up when the picture is RGB.
        max_pixels: refuse larger pictures before unpacking them.

    Raises:
        ValueError: not a picture, damaged, too large, JPEG, values over 255, RGB without a palette, colours not in it.
    """
    with opened(path, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            raise ValueError("JPEG changes labels when it compresses them; a label map is an indexed or grey PNG")
        tiles = getattr(image, "tile", [])  # gone once the pixels are loaded
        step = _GREY_STEP.get(str(tiles[0][3]), 1) if tiles else 1
        load_pixels(image, max_pixels)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGB", "RGBA"):
            if palette is None:
                raise ValueError(f"a label map is an indexed or grey PNG, got {image.mode} without a palette")
            return _labels_of_colours(np.asarray(image.convert("RGB")), np.asarray(palette))
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ValueError(f"pixels of type {image.mode}; a label map is an indexed or grey PNG")
        values = np.asarray(image)
        if values.dtype != np.bool_ and (values.min() < 0 or values.max() > 255):
            raise ValueError(f"values {values.min()}..{values.max()}; labels lie in 0..255")
        return values.astype(np.uint8) // np.uint8(step)


def _labels_of_colours(picture: Uint8, palette: Uint8) -> Uint8:
    """The first palette index of each pixel's colour, (H, W, 3) → (H, W)."""

    def code(colours: Uint8) -> NDArray[np.int64]:
        return colours.astype(np.int64) @ np.array([65536, 256, 1])

    known, first = np.unique(code(palette), return_index=True)
    wanted = code(picture)
    place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    strange = known[place] != wanted
    if strange.any():
        colour = tuple(int(c) for c in picture[strange][0])
        raise ValueError(f"{strange.sum()} pixels have colours outside the palette, the first {colour}")
    return first[place].astype(np.uint8)


def write_labels(path: PathLike, labels: ArrayLike, *, palette: Uint8 | None = None) -> None:
    """Write labels 0..255, (H, W), as an indexed PNG of 8 bits, coloured by ``palette`` (256, 3), VOC's by default.

    Raises:
        ValueError: not (H, W) integers in 0..255 with at least one pixel, or a name that does not end in .png.
    """
    _want_suffix(path, (".png",))
    with atomic_write(path) as stream:
        label_picture(labels, palette=palette).save(stream, "PNG")


def label_picture(labels: ArrayLike, *, palette: Uint8 | None = None) -> Image.Image:
    """The indexed Pillow image that `write_labels` saves."""
    array = np.asarray(labels)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "uib":
        raise ValueError(f"labels must be (H, W) integers, got {array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"labels must lie in 0..255 to fit a palette, got {array.min()}..{array.max()}")
    image = Image.frombytes("P", (array.shape[1], array.shape[0]), array.astype(np.uint8).tobytes())
    image.putpalette((voc_palette() if palette is None else np.asarray(palette, np.uint8)).tobytes())
    return image


def write_image(path: PathLike, picture: Uint8) -> None:
    """Write an RGB picture, (H, W, 3), as PNG or JPEG by the name's ending, whole or not at all."""
    suffix = _want_suffix(path, (".png", ".jpg", ".jpeg"))
    with atomic_write(path) as stream:
        Image.fromarray(picture).save(stream, "PNG" if suffix == ".png" else "JPEG", quality=95)


def _want_suffix(path: PathLike, suffixes: Sequence[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{path}: the name must end in {' or '.join(suffixes)}")
    return suffix


def overlay(picture: Uint8, labels: Uint8, *, palette: Uint8 | None = None, opacity: float = 0.6) -> Uint8:
    """The picture (H, W, 3) with the colours of its labels (H, W) laid over it."""
    colours = (voc_palette() if palette is None else palette)[labels]
    return (picture * (1.0 - opacity) + colours * opacity).round().astype(np.uint8)


def panel(pictures: Sequence[Uint8], *, gap: int = 8) -> Uint8:
    """Pictures (H, W, 3) of one height side by side, ``gap`` white pixels apart.

    Raises:
        ValueError: no picture, or several heights.
    """
    heights = sorted({picture.shape[0] for picture in pictures})
    if len(heights) != 1:
        raise ValueError(f"pictures must be at least one and of one height, got heights {heights}")
    bar = np.full((heights[0], gap, 3), 255, np.uint8)
    strips = [strip for picture in pictures for strip in (bar, picture)]
    return np.concatenate(strips[1:], axis=1)


@contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """A binary stream that becomes the file ``path`` when the block ends, and vanishes when the block raises.

    The bytes go to a hidden file in that folder, reach the disk (fsync), and take the name in one step (os.replace),
    so a reader, or a crash, finds the old file or the new one. A link is written through, not replaced.

    Raises:
        OSError: the folder is missing, ``path`` is a folder, or the disk refuses.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    # opened by hand, as tempfile's would be unreadable to others whatever the umask says
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        file = open(temporary, "xb")  # noqa: SIM115  closed below; opened apart, so that only its own errors are caught
    except OSError as error:  # it names the temporary file, which nobody asked for
        raise type(error)(f"{path}: cannot write in folder {target.parent}: {error.strerror}") from error
    try:
        with file as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
