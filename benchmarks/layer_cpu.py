"""The layer on a CPU: what backward costs beside forward, peak memory, and how time grows with the image.

    python benchmarks/layer_cpu.py --threads 1 --json results/layer_cpu.json

Backward: a 500x375 photograph (a procedural scene where CRFNET_DATA has none), 21 classes, 5 iterations, spatial and
bilateral kernel, lattice, CRF-RNN's parameters; gradients to logits, weights and compatibility, and then to bandwidths
and image as well, which takes further filters of 6 times as many channels as carry something of their own.
Growth: inference (10 iterations) and one training step on procedural images from 0.1 to 4 megapixels, 5 classes; the
slope is that of log time over log pixels, 1 for linear.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import (
    coarse_logits,
    environment,
    image_tensor,
    memory_mib,
    once,
    procedural_scene,
    reset_peak_memory,
    spread,
    voc_scene,
)

import crfnet


def alone(*arguments: Any) -> tuple[dict[str, float], dict[str, float], float]:
    """`step_times` in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(step_times, *arguments).result()


def step_times(
    crf: crfnet.DenseCRF, scene: tuple[np.ndarray, np.ndarray], classes: int, repeats: int, guide: bool
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds of forward and of backward, and the peak MiB of one step."""
    logits = coarse_logits(scene[1], classes).requires_grad_()
    image = image_tensor(scene[0]).requires_grad_(guide)
    target = torch.from_numpy(scene[1].astype(np.int64))[None].clamp(max=classes - 1)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(torch.nn.functional.cross_entropy(crf(logits, image), target))

    seconds: list[tuple[float, float]] = []
    before = memory_mib("VmRSS")
    reset_peak_memory()
    for _ in range(repeats + 1):
        seconds.append((once(forward), once(lambda: losses.pop().backward())))
    there, back = zip(*seconds[1:], strict=True)  # the first warms up
    return spread(list(there)), spread(list(back)), memory_mib("VmHWM") - before


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, object] = {"environment": environment()}
    photograph = voc_scene("voc_2007_000346")
    scene = photograph or procedural_scene(375, 500)
    report["scene"] = "voc_2007_000346" if photograph else "procedural"
    print(f"scene: {report['scene']}")
    for name, learn, guide in (
        ("logits, weights, compatibility", ("weights", "compatibility"), False),
        ("and bandwidths, image", ("weights", "compatibility", "bandwidths"), True),
    ):
        for checkpoint in (False, True):
            crf = crfnet.DenseCRF(21, learn=learn, engine="lattice", checkpoint=checkpoint)
            forward, backward, memory = alone(crf, scene, 21, arguments.repeats, guide)
            ratio = backward["median"] / forward["median"]
            kind = name + (", recomputed" if checkpoint else "")
            report[kind] = {"forward": forward, "backward": backward, "ratio": ratio, "peak_memory_mib": memory}
            print(
                f"gradients to {kind}: forward {forward['median']:.3f} s, backward {backward['median']:.3f} s, "
                f"ratio {ratio:.2f}, peak {memory:.0f} MiB",
                flush=True,
            )
    sizes, inference, training = [], [], []
    for megapixels in arguments.megapixels:
        height = round((megapixels * 1e6 * 0.75) ** 0.5)
        scene = procedural_scene(height, round(height / 0.75))
        image, logits = image_tensor(scene[0]), coarse_logits(scene[1], 5)
        seconds = spread([once(lambda: crfnet.dense_crf(image, logits, engine="lattice")) for _ in range(2)])["min"]  # noqa: B023
        crf = crfnet.DenseCRF(5, engine="lattice", num_iterations=2)
        forward, backward, memory = step_times(crf, scene, 5, 1, False)
        sizes.append(scene[1].size)
        inference.append(seconds)
        training.append(forward["min"] + backward["min"])
        print(f"{scene[1].size / 1e6:.2f} megapixels: inference {seconds:.2f} s, step {training[-1]:.2f} s", flush=True)
    for name, seconds_by_size in (("inference", inference), ("step", training)):
        slope = float(np.polyfit(np.log(sizes), np.log(seconds_by_size), 1)[0])
        report[f"{name} growth"] = {"pixels": sizes, "seconds": seconds_by_size, "slope": slope}
        print(f"{name}: time grows as pixels to the power {slope:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
