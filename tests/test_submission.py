"""Folders for the test servers, from a predictor that sees the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crfnet import data, images
from crfnet.data.cityscapes import CITYSCAPES_LABEL_IDS
from crfnet.submission import check_voc_test, write_cityscapes_test, write_voc_test

SIZES = {"2008_000006": (6, 9), "2008_000011": (1, 1)}


@pytest.fixture
def voc(tmp_path) -> Path:
    """The test split of a VOC folder: a list and images, no labels anywhere."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "test.txt").write_text("2008_000011\n2008_000006\n")
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height), (40, 40, 40)).save(folder / "JPEGImages" / f"{name}.jpg")
    return tmp_path


def predictor(classes: int):
    """Class 20 or the last on the left, 3 on the right; fails where the image is not as a network wants it."""

    def predict(image):
        assert image.dtype == torch.float32 and image.shape[:2] == (1, 3) and not torch.is_grad_enabled()
        assert 39 <= float(image.mean()) <= 41  # grey levels, not fractions; a JPEG may be one off
        logits = torch.zeros(1, classes, *image.shape[2:])
        logits[:, classes - 1] = 1
        logits[:, 3, :, 4:] = 2
        return logits

    return predict


def test_voc_folder_has_a_map_for_every_image(voc):
    listed = data.voc_images(voc)
    assert [path.stem for path in listed] == ["2008_000011", "2008_000006"]  # in the order of the list
    written = write_voc_test(predictor(21), listed, voc / "out")
    folder = voc / "out" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    assert written == [folder / "2008_000011.png", folder / "2008_000006.png"]
    assert sorted(folder.iterdir()) == sorted(written)
    for name, (height, width) in SIZES.items():
        expected = np.where(np.arange(width) < 4, 20, 3)[None].repeat(height, 0)
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.mode == "P" and picture.getpalette() == images.voc_palette().ravel().tolist()
            assert np.array_equal(np.asarray(picture), expected)
    assert write_voc_test(predictor(21), listed, voc / "out") == written  # again, in place


def test_voc_folder_errors(voc):
    listed = data.voc_images(voc, "test")
    write_voc_test(predictor(21), listed, voc / "out")
    with pytest.raises(ValueError, match=r"holds 1 label maps of other images, the first 2008_000006\.png"):
        write_voc_test(predictor(21), listed[:1], voc / "out")
    with pytest.raises(ValueError, match="images must be at least one"):
        write_voc_test(predictor(21), [], voc / "new")
    with pytest.raises(ValueError, match=r"names of their own, got several for 2008_000011\.png"):
        write_voc_test(predictor(21), [*listed, listed[0]], voc / "new")
    with pytest.raises(ValueError, match=r"2008_000006\.jpg: .* \(1, 21, 6, 9\), got \(1, 21, 3, 4\)"):
        write_voc_test(lambda image: torch.zeros(1, 21, 3, 4), listed[1:], voc / "new")
    with pytest.raises(ValueError, match=r"2008_000006\.jpg: the predictor must return a finite logit"):
        write_voc_test(lambda image: torch.full((1, 21, 6, 9), torch.nan), listed[1:], voc / "new")
    with pytest.raises(ValueError, match="must return a finite logit in every pixel, and no NaN"):
        write_voc_test(lambda image: torch.full((1, 21, 6, 9), -torch.inf), listed[1:], voc / "new")
    for wrong in (7, 22):
        with pytest.raises(ValueError, match=rf"must return logits \(1, 21, 1, 1\), got \(1, {wrong}, 1, 1\)"):
            write_voc_test(predictor(wrong), listed, voc / "new")
    (voc / "file").write_text("")
    with pytest.raises(PermissionError, match=r"comp6_test_cls: cannot be made or written, as .*file is a file"):
        check_voc_test(listed, voc / "file" / "new")
    assert not (voc / "new").exists()
    with pytest.raises(FileNotFoundError, match="lists there: "):
        data.voc_images(voc, "none")
    listed[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt, line 1: the image .*2008_000011\.jpg is missing"):
        data.voc_images(voc)


def test_voc_images_are_those_of_voc_files(tmp_path):
    data.write_scenes(tmp_path, num_train=1, num_val=2, height=16, width=16)
    assert data.voc_images(tmp_path, "val") == [image for image, _ in data.voc_files(tmp_path, "val")]


FRAMES = ("berlin_000000_000019", "bonn_000001_000019")


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    for frame in FRAMES:
        folder = tmp_path / "leftImg8bit" / "test" / frame.split("_")[0]
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 4), (40, 40, 40)).save(folder / f"{frame}_leftImg8bit.png")
    return tmp_path


def test_cityscapes_folder_has_label_ids(cityscapes):
    listed = data.cityscapes_images(cityscapes)
    written = write_cityscapes_test(predictor(19), listed, cityscapes / "out")
    assert [path.name for path in written] == [f"{frame}_labelIds.png" for frame in FRAMES]
    assert sorted((cityscapes / "out").iterdir()) == written
    for path in written:
        with Image.open(path) as picture:
            expected = np.where(np.arange(8) < 4, CITYSCAPES_LABEL_IDS[18], CITYSCAPES_LABEL_IDS[3])
            assert picture.mode == "L" and np.array_equal(np.asarray(picture), expected[None].repeat(4, 0))
    with pytest.raises(ValueError, match=r"the first bonn_000001_000019_labelIds\.png"):
        write_cityscapes_test(predictor(19), listed[:1], cityscapes / "out")
    with pytest.raises(ValueError, match=r"must return logits \(1, 19, 4, 8\), got \(1, 20, 4, 8\)"):
        write_cityscapes_test(predictor(20), listed, cityscapes / "new")


def test_cityscapes_images_want_no_labels_but_names(cityscapes):
    with pytest.raises(FileNotFoundError, match="its label"):
        data.cityscapes_files(cityscapes, "test")
    with pytest.raises(FileNotFoundError, match=r"splits there: \['test'\]"):
        data.cityscapes_images(cityscapes, "val")
    Image.new("RGB", (8, 4)).save(cityscapes / "leftImg8bit" / "test" / "bonn" / "berlin_000000_000019_leftImg8bit.png")
    with pytest.raises(ValueError, match="lies in the folder of 'bonn'"):
        data.cityscapes_images(cityscapes)
