"""Tables of scores, and who gains and who pays between two matrices counted by hand."""

import math

import pytest
import torch

from crfnet.curves import TrimapCurve
from crfnet.metrics import ConfusionMatrix
from crfnet.tables import class_table, gain_table, gains, score_table, table, trimap_table


def matrix(counts: list[list[int]]) -> ConfusionMatrix:
    made = ConfusionMatrix(len(counts))
    made.counts = torch.tensor(counts)
    return made


BEFORE = matrix([[8, 2, 0, 0], [1, 5, 4, 0], [0, 0, 0, 0], [0, 0, 0, 6]])
AFTER = matrix([[9, 1, 0, 0], [4, 5, 1, 0], [0, 0, 0, 0], [0, 0, 0, 6]])


def test_class_table_plain_and_markdown():
    # class 0: IoU 8 / 11, accuracy 8 / 10; class 1: 5 / 12; class 2: never true, called 4 times; class 3: all right
    assert class_table(BEFORE, ["sky", "a | b", "cow", "road"]).splitlines() == [
        "class   IoU %  accuracy %  pixels  called",
        "sky     72.73       80.00      10       9",
        "a | b   41.67       50.00      10       7",
        "cow         -           -       0       4",
        "road   100.00      100.00       6       6",
    ]
    assert class_table(BEFORE, ["sky", "a | b", "cow", "road"], markdown=True).splitlines()[:4] == [
        "| class  |  IoU % | accuracy % | pixels | called |",
        "| ------ | -----: | ---------: | -----: | -----: |",
        "| sky    |  72.73 |      80.00 |     10 |      9 |",
        "| a \\| b |  41.67 |      50.00 |     10 |      7 |",
    ]


def test_classes_that_never_occur_show_only_by_name():
    empty = matrix([[3, 0], [0, 0]])
    assert len(class_table(empty).splitlines()) == 2
    assert class_table(empty, ["a", "b"]).splitlines()[-1] == "b           -           -       0       0"
    with pytest.raises(ValueError, match="one for each of 2 classes, got 1"):
        class_table(empty, ["a"])


def test_score_table_has_a_column_a_method():
    lines = score_table({"DCNN": BEFORE, "+ CRF": AFTER}).splitlines()
    assert lines[0].split() == ["%", "DCNN", "+", "CRF"]
    assert lines[1].split()[-2:] == [f"{100 * 19 / 26:.2f}", f"{100 * 20 / 26:.2f}"]
    assert len(lines) == 5


def test_who_gains_and_who_pays():
    found = gains(BEFORE, AFTER)
    # class 0: 8 / 11 → 9 / 14; class 1: 5 / 12 → 5 / 11; class 3 stays; class 2 is not in the truth
    assert [gain.label for gain in found] == [1, 3, 0]
    assert [gain.change for gain in found] == pytest.approx([5 / 11 - 5 / 12, 0, 9 / 14 - 8 / 11])
    assert (found[2].before, found[2].after) == pytest.approx((8 / 11, 9 / 14))
    # 1 is confused with 2 three times less, with 0 twice more; 0 with 1 twice more
    assert [gain.rival for gain in found] == [2, None, 1]
    assert gain_table(BEFORE, AFTER, ["a", "b", "c", "d"]).splitlines() == [
        "class  IoU % before   after  change  confused with",
        "b             41.67   45.45   +3.79         less c",
        "d            100.00  100.00   +0.00",
        "a             72.73   64.29   -8.44         more b",
        "",
        "of 3 classes 1 gain, 1 pay, 1 stay",
    ]


def test_gains_are_of_one_truth():
    with pytest.raises(ValueError, match="of one truth, got 4 and 4 classes, 26 and 1 pixels"):
        gains(BEFORE, matrix([[1, 0, 0, 0]] + [[0] * 4] * 3))
    with pytest.raises(ValueError, match="of one truth"):
        gains(BEFORE, matrix([[1]]))


def test_trimap_table_names_methods_only_where_there_are_several():
    curve = TrimapCurve(2, widths=(1, 2, 3))
    curve.add(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 1]]))
    # 1 px: pixels 1 and 2, one right, IoU 1 / 2 and 0; 2 px: all four, three right, IoU 2 / 3 and 1 / 2
    assert trimap_table({"a": curve}, (1, 2)).splitlines() == [
        "trimap width  mean IoU %  pixel accuracy %",
        "1 px               25.00             50.00",
        "2 px               58.33             75.00",
    ]
    assert trimap_table({"a": curve, "b": curve}, (2,)).splitlines()[0].count("b: ") == 2


def test_absent_scores_are_dashes():
    assert math.isnan(ConfusionMatrix(2).mean_iou)
    assert score_table({"a": ConfusionMatrix(2)}).splitlines()[1].split() == ["pixel", "accuracy", "-"]
    assert table(["a", "b"], []) == "a  b"
