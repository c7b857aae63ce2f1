"""What a recipe reports: scores of each stage on one set, trimap curves, who gains and who pays, pictures.

report = Report(Path("runs/x"), val, names=VOC_CLASSES)
report.add("dcnn", dcnn)                                writes results.json
report.add("joint", joint)
report.write()                                          writes report.md, trimap.png and panel.png
"""

import json
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crfnet.curves import TrimapCurve, trimap_plot
from crfnet.data import Samples
from crfnet.evaluation import in_eval_mode
from crfnet.images import Uint8, atomic_write, write_image
from crfnet.metrics import ConfusionMatrix
from crfnet.panels import comparison_picture
from crfnet.processes import add_up, rank, world_size
from crfnet.tables import class_table, gain_table, score_table, trimap_table

TRIMAP = 3  # pixels, the width that results.json has
LARGEST = 1024  # pixels, of a picture in the panel
TABLE_WIDTHS = (1, 2, 3, 5, 10, 20, 40)  # pixels


class Report:
    """Scores of several networks on one set of samples, and its files.

    Of several processes every one must make it and call its methods; each predicts its share of the images, and the
    first writes.

    Args:
        folder: for the files; made if need be.
        samples: what is scored, never what anything was chosen on.
        names: of the classes, their numbers unless given.
        palette: (256, 3) colours of the labels, VOC's unless given.
        pictures: images in panel.png, evenly spread over the samples; of those larger than 1024 pixels every second,
            third, ... pixel.
        device: of the networks.
    """

    def __init__(
        self,
        folder: Path,
        samples: Samples,
        *,
        names: Sequence[str] | None = None,
        palette: Uint8 | None = None,
        pictures: int = 4,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder, self.samples, self.names, self.palette, self.device = folder, samples, names, palette, device
        count = min(pictures, len(samples))
        self.pictured = [int(index) for index in np.linspace(0, len(samples) - 1, count).round()]
        self.scores: dict[str, dict[str, float]] = {}
        self.matrices: dict[str, ConfusionMatrix] = {}
        self.curves: dict[str, TrimapCurve] = {}
        self.called: dict[str, dict[int, Uint8]] = {}

    @torch.no_grad()
    def add(self, row: str, network: nn.Module, samples: Samples | None = None) -> dict[str, float]:
        """Scores a network, from images (1, G, H, W) to logits (1, L, H, W), in evaluation mode; rewrites results.json.

        Args:
            row: its name in all files.
            network: on the device of the report.
            samples: the same ones read otherwise, for a network that takes other channels.

        Returns:
            mean_iou, pixel_accuracy, mean_accuracy, frequency_weighted_iou, trimap_iou_3px: fractions, NaN where there
            is no such pixel (null in results.json).

        Raises:
            ValueError: other samples than those of the report.
        """
        samples = self.samples if samples is None else samples
        if len(samples) != len(self.samples) or samples.num_classes != self.samples.num_classes:
            got = f"{len(samples)} of {samples.num_classes} classes"
            raise ValueError(f"samples must be those of the report, {len(self.samples)}, read otherwise, got {got}")
        matrix, curve = ConfusionMatrix(self.samples.num_classes), TrimapCurve(self.samples.num_classes)
        self.called[row] = {}
        with in_eval_mode(network):
            for index in range(len(samples)):
                if index % world_size() != rank() and (rank() or index not in self.pictured):
                    continue
                image, labels, _ = samples[index]
                called = network(image[None].to(self.device)).argmax(1)[0].cpu()
                if index in self.pictured:
                    self.called[row][index] = called.byte().numpy()
                if index % world_size() == rank():
                    matrix.add(called, labels)
                    curve.add(called, labels)
        matrix.counts, curve.counts = (add_up(c.counts.to(self.device)).cpu() for c in (matrix, curve))
        self.matrices[row], self.curves[row] = matrix, curve
        narrow = curve.mean_iou()[curve.widths.index(TRIMAP)]
        self.scores[row] = {**matrix.scores(), f"trimap_iou_{TRIMAP}px": narrow}
        plain = {name: {k: None if isnan(v) else v for k, v in scores.items()} for name, scores in self.scores.items()}
        self._write("results.json", (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode())
        if not rank():
            line = ", ".join(f"{name} {100 * value:.2f}" for name, value in self.scores[row].items())
            print(f"{row}: {line}", flush=True)
        return self.scores[row]

    def write(self) -> None:
        """The tables as Markdown, the trimap curves, where the labels have a boundary, and the pictures."""
        if rank():
            return
        first, *others = self.matrices
        parts = [score_table(self.matrices, markdown=True), trimap_table(self.curves, TABLE_WIDTHS, markdown=True)]
        parts.append(f"## {first}\n\n{class_table(self.matrices[first], self.names, markdown=True)}")
        for row in others:
            table = gain_table(self.matrices[first], self.matrices[row], self.names, markdown=True)
            parts.append(f"## {row} against {first}\n\n{table}")
        self._write("report.md", ("\n\n".join(parts) + "\n").encode())
        if all(bool(curve.counts.any()) for curve in self.curves.values()):  # there are boundaries
            write_image(self.folder / "trimap.png", trimap_plot(self.curves))
        else:
            (self.folder / "trimap.png").unlink(missing_ok=True)
        write_image(self.folder / "panel.png", self._panel())

    def _panel(self) -> Uint8:
        """The pictures below each other, (H, W, 3)."""
        rows = []
        for index in self.pictured:
            image, labels, _ = self.samples[index]
            step = -(-max(labels.shape) // LARGEST)
            few = (slice(None, None, step), slice(None, None, step))
            photo = image.permute(1, 2, 0)[few].round().clamp(0, 255).byte().numpy()
            called = {row: maps[index][few] for row, maps in self.called.items()}
            rows.append(comparison_picture(labels[few].byte().numpy(), called, photo=photo, palette=self.palette))
        width = max(row.shape[1] for row in rows)
        framed = [np.pad(row, ((0, 16), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        return np.concatenate(framed)[:-16]

    def _write(self, name: str, content: Any) -> None:
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name) as stream:
            stream.write(content)
