import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crfnet import images


def gradient(height: int = 6, width: int = 9) -> np.ndarray:
    """A picture whose pixels all differ, so that any turn or shift shows."""
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def raw_grey_png(path: Path, rows: list[list[int]], bits: int) -> None:
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow itself cannot write."""
    per_byte = 8 // bits

    def pack(row: list[int]) -> bytes:
        padded = row + [0] * (-len(row) % per_byte)
        groups = [padded[k : k + per_byte] for k in range(0, len(padded), per_byte)]
        return bytes(sum(v << (8 - bits * (n + 1)) for n, v in enumerate(group)) for group in groups)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + pack(row) for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def truncated(path: Path, keep: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# The palette and label maps


def test_voc_palette_is_the_published_one():
    palette = images.voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(int(c) for c in palette[label]) for label in known} == known
    assert len(np.unique(palette, axis=0)) == 256


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 2**31), top=st.integers(1, 256))
def test_labels_survive_the_disk(tmp_path, shape, seed, top):
    labels = np.random.default_rng(seed).integers(0, top, shape)
    images.write_labels(tmp_path / "l.png", labels)
    again = images.read_labels(tmp_path / "l.png")
    assert again.dtype == np.uint8 and (again == labels).all()
    assert (
        images.read_image(tmp_path / "l.png") == images.voc_palette()[labels]
    ).all()  # and any viewer shows VOC's colours


def test_labels_take_another_palette(tmp_path):
    palette = images.voc_palette()[::-1]
    images.write_labels(tmp_path / "l.png", np.array([[0, 3]]), palette=palette)
    assert (images.read_image(tmp_path / "l.png")[0] == palette[[0, 3]]).all()
    assert images.read_labels(tmp_path / "l.png").tolist() == [[0, 3]]


@pytest.mark.parametrize(("bits", "rows"), [(1, [[0, 1, 1]]), (2, [[0, 1, 2, 3, 3]]), (4, [[0, 5, 15], [1, 2, 3]])])
def test_grey_labels_of_few_bits_are_not_stretched(tmp_path, bits, rows):
    raw_grey_png(tmp_path / "l.png", rows, bits)
    assert images.read_labels(tmp_path / "l.png").tolist() == rows


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_indexed_labels_of_few_bits(tmp_path, bits):
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette(images.voc_palette().tobytes())
    image.save(tmp_path / "l.png", bits=bits)
    assert images.read_labels(tmp_path / "l.png").tolist() == [[0, 1]]


def test_sixteen_bit_labels(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint16)).save(tmp_path / "fits.png")
    assert images.read_labels(tmp_path / "fits.png").tolist() == [[0, 255]]
    Image.fromarray(np.array([[0, 256]], np.uint16)).save(tmp_path / "l.png")
    with pytest.raises(ValueError, match=r"l\.png: values 0\.\.256; labels lie in 0\.\.255"):
        images.read_labels(tmp_path / "l.png")


def test_colours_become_labels_only_through_a_palette(tmp_path):
    labels = np.array([[0, 1, 2], [15, 20, 255]], np.uint8)
    Image.fromarray(images.voc_palette()[labels]).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb\.png: a label map is an indexed or grey PNG, got RGB without a palette"):
        images.read_labels(tmp_path / "rgb.png")
    assert (images.read_labels(tmp_path / "rgb.png", palette=images.voc_palette()) == labels).all()
    with pytest.raises(
        ValueError, match=r"rgb\.png: 1 pixels have colours outside the palette, the first \(224, 224, 192\)"
    ):
        images.read_labels(tmp_path / "rgb.png", palette=images.voc_palette()[:21])


def test_labels_in_jpeg_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "l.jpg")
    with pytest.raises(ValueError, match=r"l\.jpg: JPEG changes labels"):
        images.read_labels(tmp_path / "l.jpg")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros((2, 2)), "integers, got float64"),
        (np.zeros((2, 2, 1), np.uint8), r"shape \(2, 2, 1\)"),
        (np.zeros((0, 2), np.uint8), r"shape \(0, 2\)"),
        (np.array([[256]]), r"0\.\.255 to fit a palette, got 256\.\.256"),
        (np.array([[-1, 3]]), r"got -1\.\.3"),
    ],
)
def test_what_is_no_label_map_is_not_written(tmp_path, labels, said):
    with pytest.raises(ValueError, match=said):
        images.write_labels(tmp_path / "l.png", labels)
    with pytest.raises(ValueError, match=r"l\.jpg: the name must end in \.png"):
        images.write_labels(tmp_path / "l.jpg", np.zeros((2, 2), np.uint8))
    assert names(tmp_path) == []


# Pictures


def test_image_kinds(tmp_path):
    picture = gradient()
    grey = picture[..., 0]

    def back(image: Image.Image, name: str = "i.png", **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return images.read_image(tmp_path / name)

    assert (back(Image.fromarray(picture)) == picture).all()
    assert (back(Image.fromarray(grey)) == grey[..., None]).all()
    assert (back(Image.fromarray(grey > 20)) == 255 * (grey > 20)[..., None]).all()
    indexed = images.label_picture(grey)
    assert (back(indexed) == images.voc_palette()[grey]).all()
    assert (back(indexed, transparency=0)[grey == 0] == 255).all()  # the transparent index shows white
    opaque = np.dstack([picture, np.full(grey.shape, 255, np.uint8)])
    assert (back(Image.fromarray(opaque)) == picture).all()
    half = np.dstack([np.zeros_like(picture), np.full(grey.shape, 128, np.uint8)])
    assert (back(Image.fromarray(half)) == 127).all()  # black at 128/255 over white
    assert back(Image.new("CMYK", (4, 4)), "i.tif").tolist() == [[[255] * 3] * 4] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    picture = gradient()
    turns = [  # what each value of tag 274 asks a viewer to do (Exif 2.32)
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: a.swapaxes(0, 1)[:, ::-1],
        lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        lambda a: a.swapaxes(0, 1)[::-1],
    ]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(tmp_path / "i.png", exif=exif)
    assert (images.read_image(tmp_path / "i.png") == turns[orientation - 1](picture)).all()
    images.label_picture(picture[..., 0]).save(tmp_path / "l.png", exif=exif)
    assert (images.read_labels(tmp_path / "l.png") == turns[orientation - 1](picture[..., 0])).all()


def test_grey_of_more_than_eight_bits_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 1000]], np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: pixels of type I;16; convert"):
        images.read_image(tmp_path / "deep.png")
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "float.tif")
    for read in (images.read_image, images.read_labels):
        with pytest.raises(ValueError, match=r"float\.tif: pixels of type F"):
            read(tmp_path / "float.tif")


@pytest.mark.parametrize("read", [images.read_image, images.read_labels])
def test_files_that_cannot_be_used(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not an image in a format"):
        read(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: not an image"):
        read(tmp_path / "empty.png")
    images.write_labels(tmp_path / "large.png", np.zeros((30, 40), np.uint8))
    with pytest.raises(ValueError, match=r"large\.png: 40 x 30 = 1200 pixels, more than max_pixels .* = 1199$"):
        read(tmp_path / "large.png", max_pixels=1199)
    assert read(tmp_path / "large.png", max_pixels=1200).shape[:2] == (30, 40)


def test_a_bomb_is_refused_by_its_header(tmp_path):
    raw_grey_png(tmp_path / "bomb.png", [[0]], 1)
    header = (tmp_path / "bomb.png").read_bytes()
    # above our limit; and where Pillow refuses by itself
    for side, size in ((12_000, "12000 x 12000 = 144000000"), (60_000, "3600000000")):
        ihdr = b"IHDR" + struct.pack(">II", side, side) + header[24:29]
        (tmp_path / "bomb.png").write_bytes(header[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + header[33:])
        said = rf"bomb\.png: {size} pixels, more than max_pixels \(--max-pixels\) = 100000000$"
        with pytest.raises(ValueError, match=said):
            images.read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
def test_pillows_limit_is_not_ours_and_stays(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"i.{suffix}"
    Image.fromarray(gradient(30, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)  # Pillow refuses what is over twice as large
    assert images.read_image(path, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(ValueError, match=r"40 x 30 = 1200 pixels, more than max_pixels \(--max-pixels\) = 1199$"):
        images.read_image(path, max_pixels=1199)
    with pytest.raises(ValueError, match=r": 1200 pixels, more than max_pixels \(--max-pixels\) = 599$"):
        images.read_image(path, max_pixels=599)
    assert Image.MAX_IMAGE_PIXELS == 599


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
def test_truncated_pictures_name_the_file(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    images.read_image(path)
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: "):
        images.read_image(truncated(path))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.integers(0, 255), suffix=st.sampled_from(["png", "jpg", "tif", "bmp", "gif"]))
def test_damaged_bytes_give_a_picture_or_a_named_error(tmp_path, place, value, suffix):
    path = tmp_path / f"d.{suffix}"
    Image.fromarray(gradient(16, 16)).save(path)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] = value
    path.write_bytes(data)
    try:
        assert images.read_image(path).ndim == 3
    except ValueError as error:
        assert f"d.{suffix}: " in str(error)


# Panels


def test_panel_and_overlay():
    a, b = gradient(), gradient()[:, :4]
    both = images.panel([a, b], gap=3)
    assert both.shape == (6, 9 + 3 + 4, 3)
    assert (both[:, :9] == a).all() and (both[:, 9:12] == 255).all() and (both[:, 12:] == b).all()
    with pytest.raises(ValueError, match=r"one height, got heights \[5, 6\]"):
        images.panel([a, a[:5]])
    with pytest.raises(ValueError, match=r"heights \[\]"):
        images.panel([])
    labels = a[..., 0]
    assert (images.overlay(a, labels, opacity=0.0) == a).all()
    assert (images.overlay(a, labels, opacity=1.0) == images.voc_palette()[labels]).all()
    white = np.full((1, 1, 3), 255, np.uint8)
    assert images.overlay(white, np.array([[1]], np.uint8), opacity=0.5)[0, 0].tolist() == [192, 128, 128]


def test_write_image(tmp_path):
    images.write_image(tmp_path / "i.png", gradient())
    assert (images.read_image(tmp_path / "i.png") == gradient()).all()
    images.write_image(tmp_path / "i.jpg", gradient())
    with Image.open(tmp_path / "i.jpg") as image:
        assert image.format == "JPEG"
    with pytest.raises(ValueError, match=r"i\.gif: the name must end in \.png or \.jpg"):
        images.write_image(tmp_path / "i.gif", gradient())
    assert names(tmp_path) == ["i.jpg", "i.png"]


# Writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "f"
    target.write_bytes(b"old")
    for stop in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(stop), images.atomic_write(target) as stream:
            stream.write(b"new")
            assert target.read_bytes() == b"old" and len(names(tmp_path)) == 2
            raise stop
        assert target.read_bytes() == b"old" and names(tmp_path) == ["f"]
    with images.atomic_write(target) as stream:
        stream.write(b"new")
    assert target.read_bytes() == b"new" and names(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "f"
    target.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), images.atomic_write(target) as stream:
        stream.write(b"new")
    assert target.read_bytes() == b"old" and names(tmp_path) == ["f"]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"f\.png: there is no folder .*none"):
        images.write_labels(tmp_path / "none" / "f.png", np.zeros((1, 1), np.uint8))
    (tmp_path / "d.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"d\.png: is a folder"):
        images.write_labels(tmp_path / "d.png", np.zeros((1, 1), np.uint8))
    assert names(tmp_path) == ["d.png"] and names(tmp_path / "d.png") == []


def test_a_refusing_folder_is_told_of_by_the_wanted_name(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # a folder's mode would not stop root
    with pytest.raises(PermissionError) as caught, images.atomic_write(tmp_path / "f.png"):
        pass
    said = str(caught.value)
    assert said == f"{tmp_path / 'f.png'}: cannot write in folder {tmp_path.resolve()}: Permission denied"


@pytest.mark.skipif(os.name == "nt", reason="links and file modes are POSIX")
def test_links_are_written_through_and_the_umask_holds(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    previous = os.umask(0o027)
    try:
        with images.atomic_write(tmp_path / "link") as stream:
            stream.write(b"new")
    finally:
        os.umask(previous)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_real_label_maps(data_root):
    for path in sorted((data_root / "refine").glob("voc_*_labels.png")):
        labels = images.read_labels(path)
        picture = images.read_image(path.with_name(path.name.replace("_labels", "")))
        assert labels.shape == picture.shape[:2]
        assert set(np.unique(labels)) <= {*range(21), 255}
    assert set(np.unique(images.read_labels(data_root / "refine" / "scribble_1_anno.png"))) == {0, 1, 2}
