"""Coarse unaries of four VOC images refined: mean IoU before and after.

    CRFNET_DATA=../shared/data python benchmarks/refine_voc.py

Unaries: every eighth label, with noise, and bilinear up again; void pixels are not scored. The parameters are one set
for all images, of the kind DeepLab's search finds: spatial kernel 3 at 3 pixels, bilateral kernel 5 at 50/5.
"""

import argparse

import numpy as np
import torch
from _measure import DATA, coarse_logits, image_tensor, voc_scene

import crfnet
from crfnet.metrics import ConfusionMatrix

NAMES = ("voc_2007_000129", "voc_2007_000332", "voc_2007_000346", "voc_2007_001284")


def mean_iou(logits: torch.Tensor, labels: np.ndarray) -> float:
    """Over the classes in this image."""
    matrix = ConfusionMatrix(logits.shape[1])
    matrix.add(logits.argmax(1), torch.from_numpy(labels.astype(np.int64))[None])
    return matrix.mean_iou


def main() -> None:
    """Parse the command line and print one line an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="lattice", choices=["lattice", "exact"])
    parser.add_argument("--gain", type=float, nargs="+", default=[3.0, 4.0], help="of the unaries' logits")
    parser.add_argument("--theta-alpha", type=float, default=50.0)
    parser.add_argument("--theta-beta", type=float, default=5.0)
    arguments = parser.parse_args()
    for name in NAMES:
        scene = voc_scene(name)
        if scene is None:
            print(f"{name} is missing in {DATA}: CRFNET_DATA names the folder of images")
            continue
        for gain in arguments.gain:
            logits = coarse_logits(scene[1], 21, gain=gain)
            refined = crfnet.dense_crf(
                image_tensor(scene[0]),
                logits,
                theta_alpha=arguments.theta_alpha,
                theta_beta=arguments.theta_beta,
                engine=arguments.engine,
            )
            before, after = mean_iou(logits, scene[1]), mean_iou(refined, scene[1])
            print(f"{name} gain {gain:g}: mean IoU {before:.4f} -> {after:.4f} ({100 * (after - before):+.2f} points)")


if __name__ == "__main__":
    main()
