"""Data sets on disk: the drawn scenes, real folder layouts, transforms, and what happens when files are wrong."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from crfnet.data import VOID, Crop, Samples, image_sizes, pairs_files, read_sample, voc_files, write_scenes
from crfnet.data.samples import MEAN_COLOUR
from crfnet.data.synthetic import CLASSES, draw_scene
from crfnet.data.voc import voc_folder
from crfnet.images import read_image, voc_palette


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_scenes(root, num_train=6, num_val=3, height=48, width=64)
    return root


@pytest.fixture
def pairs(tmp_path):
    """Two images of different sizes with labels 0, 1 and 7 (no class)."""
    for index, (height, width) in enumerate([(12, 10), (6, 14)]):
        labels = np.zeros((height, width), np.uint8)
        labels[2:4, 3:], labels[0, 0] = 1, 7
        image = np.repeat(labels[..., None] * 90, 3, 2).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        Image.fromarray(labels).save(tmp_path / f"{index}_labels.png")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("0.png 0_labels.png\n\n/1.png 1_labels.png\n")
    return tmp_path


# scenes


def test_scenes_depend_on_the_seed_alone():
    first, again, other = (draw_scene(np.random.default_rng([seed, 5])) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_scenes_use_the_stated_classes_with_a_thin_void_border():
    labels = np.stack([draw_scene(np.random.default_rng([0, index]), 48, 64)[1] for index in range(40)])
    assert set(np.unique(labels)) == {0, VOID, *CLASSES}
    assert 0.03 < (labels == VOID).mean() < 0.15
    objects = (labels > 0) & (labels != VOID)
    assert 0.1 < objects.mean() < 0.5
    # between two labels there is always void, as in VOC
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        assert not ((a != b) & (a != VOID) & (b != VOID)).any()


def test_colour_alone_does_not_tell_the_classes():
    """Objects of one class differ in mean colour about as much as objects of different classes do."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in CLASSES}
    for index in range(80):
        image, labels = draw_scene(np.random.default_rng([3, index]), 48, 64)
        for label in CLASSES:
            if (labels == label).sum() > 30:
                colours[label].append(image[labels == label].mean(0))
    means = np.stack([np.mean(c, 0) for c in colours.values()])
    within = np.mean([np.std(c, 0).mean() for c in colours.values()])
    assert means.std(0).mean() < 0.5 * within


def test_scene_folder_is_voc(scenes):
    folder = scenes / "VOCdevkit" / "VOC2012"
    for root in (scenes, scenes / "VOCdevkit", folder):
        assert voc_folder(root) == folder
    files = voc_files(scenes, "train")
    assert len(files) == 6
    assert len(voc_files(scenes, "val")) == 3
    assert len(voc_files(scenes, "trainval")) == 9
    assert not set(files) & set(voc_files(scenes, "val"))
    with Image.open(files[0][1]) as label:
        assert label.mode == "P"
        assert label.getpalette() == voc_palette().ravel().tolist()
    with Image.open(files[0][0]) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
    assert image_sizes(files).tolist() == [[48, 64]] * 6


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_those_of_the_picture_as_it_is_read(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (9, 5)).save(tmp_path / name, exif=exif)
    (size,) = image_sizes([(tmp_path / name, tmp_path / "labels.png")]).tolist()
    assert tuple(size) == read_image(tmp_path / name).shape[:2]


def test_sizes_come_from_the_head_of_a_png_alone(tmp_path):
    Image.effect_noise((64, 48), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:100])
    assert image_sizes([(tmp_path / "a.png", tmp_path / "a.png")]).tolist() == [[48, 64]]


def test_void_is_what_the_file_says(tmp_path):
    labels = np.array([[0, 1, 9, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    files = [(tmp_path / "a.png", tmp_path / "a.png")]
    with pytest.raises(ValueError, match=r"holds the labels \[255\]; wanted 0\.\.1 and ignore_index 9"):
        Samples(files, 2, ignore_index=9)[0]
    own = Samples(files, 2, ignore_index=9, read_labels=lambda path: labels)  # of a reader 255 is void by contract
    assert own[0][1].tolist() == [[0, 1, VOID, VOID]]


def test_scene_folder_is_kept_or_refused(scenes):
    settings = dict(num_train=6, num_val=3, height=48, width=64)
    note = write_scenes(scenes, **settings) / "scenes.txt"
    time = note.stat().st_mtime_ns
    assert (write_scenes(scenes, **settings) / "scenes.txt").stat().st_mtime_ns == time
    with pytest.raises(FileExistsError, match="holds other data"):
        write_scenes(scenes, **{**settings, "num_val": 4})
    with pytest.raises(ValueError, match="num_train"):
        write_scenes(scenes / "new", num_train=0)


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("crfnet.data.synthetic.draw_scene", fails)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, num_train=1, num_val=1)
    assert list((tmp_path / "VOCdevkit").iterdir()) == []


# folders


def test_missing_voc_parts_are_named(scenes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no PASCAL VOC 2012 folder: looked for .*ImageSets"):
        voc_files(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"lists there: \['train', 'trainval', 'val'\]"):
        voc_files(scenes, "test")
    with pytest.raises(FileNotFoundError, match="its label .*SegmentationClassAug.* is missing"):
        voc_files(scenes, "train", labels="SegmentationClassAug")


def test_pairs_are_read_in_order(pairs):
    files = pairs_files(pairs, "train")
    assert [path.name for pair in files for path in pair] == ["0.png", "0_labels.png", "1.png", "1_labels.png"]
    image, labels, inside = Samples(files, 2, ignore_index=7)[0]
    assert (image.shape, image.dtype, labels.shape, labels.dtype) == ((3, 12, 10), torch.float32, (12, 10), torch.int64)
    assert labels.unique().tolist() == [0, 1, VOID]
    assert labels[0, 0] == VOID
    assert inside.all()


@pytest.mark.parametrize(
    ("listing", "error", "message"),
    [
        (None, FileNotFoundError, "train.txt"),
        ("", ValueError, "empty"),
        ("0.png\n", ValueError, "line 1: wanted two paths"),
        ("0.png 0_labels.png\n2.png 0_labels.png\n", FileNotFoundError, r"line 2: the image .*2\.png is missing"),
        ("0.png 9.png\n", FileNotFoundError, r"line 1: the label .*9\.png is missing"),
    ],
)
def test_wrong_lists_are_named(pairs, listing, error, message):
    (pairs / "train.txt").unlink()
    if listing is not None:
        (pairs / "train.txt").write_text(listing)
    with pytest.raises(error, match=message):
        pairs_files(pairs, "train")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*is no folder"):
        pairs_files(tmp_path / "nowhere", "train")


def test_wrong_files_are_named(pairs):
    with pytest.raises(ValueError, match=r"0_labels\.png holds the labels \[7\].*num_classes is 2"):
        read_sample(pairs / "0.png", pairs / "0_labels.png", 2)
    with pytest.raises(ValueError, match=r"1_labels\.png is 14x6 pixels.*10x12"):
        read_sample(pairs / "0.png", pairs / "1_labels.png", 8)
    data = (pairs / "0.png").read_bytes()
    (pairs / "0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"0\.png"):
        read_sample(pairs / "0.png", pairs / "0_labels.png", 8)
    (pairs / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png"):
        image_sizes(pairs_files(pairs, "train"))


# transforms


def ramp(height: int, width: int):
    """A sample whose labels and inside can be read off its image."""
    pixel = torch.arange(height * width).view(height, width)
    return pixel.float().expand(3, -1, -1), pixel % 7, pixel >= 0


@pytest.mark.parametrize("size", [(5, 6), (20, 6), (5, 30), (20, 30)])
def test_crop_keeps_image_and_labels_together(size):
    for seed in range(8):
        image, labels, inside = Crop(size)(ramp(12, 16), np.random.default_rng(seed))
        assert image.shape[1:] == labels.shape == inside.shape == size
        assert torch.equal(labels[inside], image[0][inside].long() % 7)
        assert (labels[~inside] == VOID).all()
        assert inside.sum() == min(size[0], 12) * min(size[1], 16)
        if not inside.all():
            assert image[:, ~inside].unique(dim=1).squeeze(1).tolist() == pytest.approx(MEAN_COLOUR)


def test_crop_without_size_only_mirrors():
    image, labels, inside = ramp(12, 16)
    found = {Crop(None)((image, labels, inside), np.random.default_rng(seed))[0][0, 0, 0].item() for seed in range(20)}
    assert found == {0, 15}
    assert Crop(None)((image, labels, inside), np.random.default_rng(0))[1].shape == (12, 16)


def test_crop_resizes_image_and_labels_together():
    """Blocks of 16x16 pixels whose grey value is ten times their label stay so, whatever the scale."""
    labels = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0)).repeat_interleave(16, 0)
    labels = labels.repeat_interleave(16, 1)
    sample = (10.0 * labels.expand(3, -1, -1), labels, labels >= 0)
    areas = []
    for seed in range(10):
        image, called, inside = Crop((200, 170), scale=(0.5, 2.0))(sample, np.random.default_rng(seed))
        areas.append(int(inside.sum()) / labels.numel())
        assert set(called[inside].tolist()) <= set(labels.unique().tolist())
        assert (called[~inside] == VOID).all()
        # at scale 0.5 a block has 8x8 pixels, of which the blended rim leaves 6x6 at least: 56 %
        assert ((image[0] / 10 - called).abs()[inside] < 0.5).float().mean() > 0.5
    assert 0.25 <= min(areas) < 0.8 and 1.2 < max(areas) <= 4
    with pytest.raises(ValueError, match="scale"):
        Crop((4, 4), scale=(2.0, 1.0))


def test_crop_reaches_every_place_and_both_directions():
    corners, mirrored = set(), set()
    for seed in range(100):
        image, _, _ = Crop((10, 14))(ramp(12, 16), np.random.default_rng(seed))
        mirrored.add(bool(image[0, 0, 1] < image[0, 0, 0]))
        corners.add(int(image[0, 0].min()))
    assert mirrored == {False, True}
    assert len(corners) == 9
    assert {
        Crop((12, 16), mirror=False)(ramp(12, 16), np.random.default_rng(s))[0][0, 0, 0].item() for s in range(9)
    } == {0}


def test_same_samples_from_any_number_of_workers(scenes):
    def draw(workers: int, epoch: int, keep: bool) -> list[torch.Tensor]:
        samples = Samples(voc_files(scenes, "train"), 21, transform=Crop((32, 32)), seed=3, keep=keep)
        pairs = [[(epoch, k), (epoch, k + 1)] for k in range(0, len(samples), 2)]
        return [torch.cat([image.flatten(1), labels[:, None].flatten(1), inside.flatten(1)], 1)
                for image, labels, inside in DataLoader(samples, batch_sampler=pairs, num_workers=workers)]  # fmt: skip

    alone, together, next_epoch = draw(0, 0, True), draw(2, 0, False), draw(0, 1, True)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, next_epoch, strict=True))


def test_kept_samples_are_not_changed_by_the_transform(scenes):
    samples = Samples(voc_files(scenes, "train"), 21, transform=Crop((60, 70)), keep=True)
    first = samples[1]
    assert all(torch.equal(a, b) for a, b in zip(first, samples[1], strict=True))
    assert len(list(samples)) == 6
    with pytest.raises(IndexError):
        samples[6]


def test_real_folders(data_root):
    for name, classes, ignore, sizes in (("horses", 2, 255, (209, 53)), ("camvid", 11, 11, (367, 101))):
        for split, size in zip(("train", "val"), sizes, strict=True):
            files = pairs_files(data_root / name, split)
            assert len(files) == size
            samples = Samples(files[:3], classes, ignore_index=ignore)
            for image, labels, _ in samples:
                assert image.shape[1:] == labels.shape
                assert 0 <= image.min() < image.max() <= 255
                assert set(labels.unique().tolist()) <= {*range(classes), VOID}
