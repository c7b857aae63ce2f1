"""Panels where the command's tests do not reach: tiny maps, long names, sizes that differ."""

import numpy as np
import pytest

from crfnet.panels import comparison_picture, mistakes


def test_mistakes_of_one_pixel_each():
    called, truth = np.array([[1, 2, 0]], np.uint8), np.array([[1, 1, 7]], np.uint8)
    assert mistakes(called, truth, ignore_label=7).tolist() == [[[225] * 3, [213, 43, 30], [255] * 3]]


def test_one_pixel_is_magnified_and_a_long_name_cut():
    one = np.zeros((1, 1), np.uint8)
    picture = comparison_picture(one, {"a method with a name that is longer than its column is wide": one})
    assert picture.shape == (24 + 180 + 8 + 180, 180 + 8 + 180, 3)
    assert (picture[:24, 180:188] == 255).all() and (picture[:24, 188:] < 255).any()


def test_a_palette_of_its_own():
    palette = np.full((256, 3), 77, np.uint8)
    picture = comparison_picture(np.zeros((180, 4), np.uint8), {}, palette=palette)
    assert picture.shape == (24 + 180 + 8 + 180, 4, 3) and (picture[24:204] == 77).all()


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"truth's size \(2, 3\), got \[\(2, 2\)\]"):
        comparison_picture(np.zeros((2, 3), np.uint8), {"a": np.zeros((2, 2), np.uint8)})
