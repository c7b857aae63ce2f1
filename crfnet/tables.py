"""Scores as tables, plain or Markdown, and what each class gains or pays between two confusion matrices of one truth.

change_i = IoU_i(after) - IoU_i(before)        rival_i = the class whose confusions with i, n_ij + n_ji, changed most
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crfnet.curves import TrimapCurve
from crfnet.metrics import ConfusionMatrix

SCORES = {
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "mean_iou": "mean IoU",
    "frequency_weighted_iou": "frequency-weighted IoU",
}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows of text under headings, the first column flush left and the others right."""
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        headings = [heading.replace("|", "\\|") for heading in headings]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        [cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(row, widths))]  # noqa: B905
        for row in (headings, *rows)
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def score_table(matrices: Mapping[str, ConfusionMatrix], *, markdown: bool = False) -> str:
    """The four scores, a column a method, in percent."""
    columns = [matrix.scores() for matrix in matrices.values()]
    rows = [[words, *(percent(scores[key]) for scores in columns)] for key, words in SCORES.items()]
    return table(["%", *matrices], rows, markdown=markdown)


def class_table(matrix: ConfusionMatrix, names: Sequence[str] | None = None, *, markdown: bool = False) -> str:
    """IoU and accuracy of each class in percent, its pixels in the truth and those called it; "-" where it has none.

    Args:
        matrix: the counts; of classes neither in the truth nor called, only those with a name in ``names`` get a row.
        names: of the classes, by default their numbers.
        markdown: a Markdown table instead of plain columns.
    """
    iou, accuracy = matrix.per_class_iou().tolist(), matrix.per_class_accuracy().tolist()
    truth, called = matrix.counts.sum(1).tolist(), matrix.counts.sum(0).tolist()
    rows = [
        [name, percent(iou[label]), percent(accuracy[label]), str(truth[label]), str(called[label])]
        for label, name in enumerate(class_names(matrix, names))
        if names is not None or truth[label] or called[label]
    ]
    return table(["class", "IoU %", "accuracy %", "pixels", "called"], rows, markdown=markdown)


def trimap_table(curves: Mapping[str, TrimapCurve], widths: Sequence[int], *, markdown: bool = False) -> str:
    """Mean IoU and pixel accuracy in percent in the bands of some widths, two columns a method."""
    headings, columns = ["trimap width"], []
    for name, curve in curves.items():
        of = f"{name}: " if len(curves) > 1 else ""
        headings += [f"{of}mean IoU %", f"{of}pixel accuracy %"]
        columns += [
            dict(zip(curve.widths, scores, strict=True)) for scores in (curve.mean_iou(), curve.pixel_accuracy())
        ]
    rows = [[f"{width} px", *(percent(column[width]) for column in columns)] for width in widths]
    return table(headings, rows, markdown=markdown)


class Gain(NamedTuple):
    """What one class gains, or with a negative change pays."""

    label: int
    before: float  # IoU
    after: float
    change: float
    rival: int | None  # the class it is confused less with, or more; None where nothing changed that way


def gains(before: ConfusionMatrix, after: ConfusionMatrix) -> list[Gain]:
    """The change of every class of the truth, the largest gain first.

    Raises:
        ValueError: the two are not of the same truth.
    """
    if before.counts.shape != after.counts.shape or not before.counts.sum(1).equal(after.counts.sum(1)):
        raise ValueError(
            "before and after must be of one truth, got "
            f"{before.num_classes} and {after.num_classes} classes, "
            f"{int(before.counts.sum())} and {int(after.counts.sum())} pixels"
        )
    moved = after.counts - before.counts
    moved = moved + moved.T  # more confusions of i and j, either way
    moved.fill_diagonal_(0)
    found = []
    for label, (old, new) in enumerate(
        zip(before.per_class_iou().tolist(), after.per_class_iou().tolist(), strict=True)
    ):
        if not math.isnan(old):
            towards = -moved[label] if new > old else moved[label]
            rival = int(towards.argmax()) if new != old and towards.max() > 0 else None
            found.append(Gain(label, old, new, new - old, rival))
    return sorted(found, key=lambda gain: (-gain.change, gain.label))


def gain_table(
    before: ConfusionMatrix, after: ConfusionMatrix, names: Sequence[str] | None = None, *, markdown: bool = False
) -> str:
    """Who gains and who pays: a row a class of the truth, the largest gain first, and a line that counts them."""
    found, known = gains(before, after), class_names(before, names)
    rows = [
        [
            known[gain.label],
            percent(gain.before),
            percent(gain.after),
            f"{100 * gain.change:+.2f}",
            "" if gain.rival is None else f"{'less' if gain.change > 0 else 'more'} {known[gain.rival]}",
        ]
        for gain in found
    ]
    count = [sum(gain.change > 0 for gain in found), sum(gain.change < 0 for gain in found)]
    summary = f"of {len(found)} classes {count[0]} gain, {count[1]} pay, {len(found) - sum(count)} stay"
    headings = ["class", "IoU % before", "after", "change", "confused with"]
    return table(headings, rows, markdown=markdown) + f"\n\n{summary}"


def class_names(matrix: ConfusionMatrix, names: Sequence[str] | None) -> list[str]:
    """A name for each class, its number unless given.

    Raises:
        ValueError: another number of names than of classes.
    """
    if names is None:
        return [str(label) for label in range(matrix.num_classes)]
    if len(names) != matrix.num_classes:
        raise ValueError(f"names must be one for each of {matrix.num_classes} classes, got {len(names)}")
    return list(names)


def percent(fraction: float) -> str:
    """Two decimals, or "-" for NaN."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
