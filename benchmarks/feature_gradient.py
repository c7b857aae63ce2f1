"""Two gradients of the lattice to its features, against the exact one in float64.

    CRFNET_DATA=../shared/data python benchmarks/feature_gradient.py

"filtered" is the exact kernel's formula with the lattice for K, which the engine implements; "slope" that of the
piecewise linear function it computes, by central differences small enough to stay inside every simplex. Loss: the
normalised message ("after") of noisy unaries, times q minus the true label, on a crop of each picture.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from _measure import bilateral_features, coarse_logits, procedural_scene, relative_error, voc_scene
from torch import Tensor

from crfnet.ops.exact import ExactEngine
from crfnet.ops.lattice import LatticeEngine
from crfnet.ops.simplex import elevation

Gradient = Callable[[Tensor, Tensor], Tensor]


def of_normalized_message(gradient: Gradient, apply: Callable[[Tensor], Tensor], v: Tensor, g: Tensor) -> Tensor:
    """d/dF of sum g (K v) / (K 1)."""
    ones = torch.ones_like(v[:, :1])
    n, received = apply(ones), apply(v)
    return gradient(v, g / n) + gradient(ones, -(g * received).sum(1, keepdim=True) / n.square())


def slope(engine: LatticeEngine) -> Gradient:
    """Gradient of the implemented function: through the barycentric weights, linear in the features."""
    D1 = engine.dimension + 1

    def by_weights(lattice: Tensor, g: Tensor) -> Tensor:  # (P, D + 1)
        vertices = engine._vertices.view(-1, D1).long()
        return torch.stack([(lattice[vertices[:, v]] * g).sum(1) for v in range(D1)], 1)

    def gradient(v: Tensor, g: Tensor) -> Tensor:
        weights = by_weights(engine.send(v), g) + by_weights(engine.send(g, transpose=True), v)
        by_rank = torch.stack([weights[:, D1 - 1 - k] - weights[:, (D1 - k) % D1] for k in range(D1)])
        return (by_rank.gather(0, engine._rank) / D1).T @ elevation(D1 - 1).to(weights)

    return gradient


def main() -> None:
    """Parse the command line and print one line a picture and pair of bandwidths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--theta", nargs="+", default=["160/3", "67/3", "80/13"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenes = {"procedural": procedural_scene(375, 500)}
    scenes |= {name: s for name in ("voc_2007_000346", "voc_2007_000332") if (s := voc_scene(name)) is not None}
    for name, (image, labels) in scenes.items():
        part = slice(150, 150 + arguments.crop), slice(200, 200 + arguments.crop)
        q = coarse_logits(labels, 21).softmax(1)[0].permute(1, 2, 0)[part].reshape(-1, 21)
        truth = torch.from_numpy(np.where(labels < 21, labels, 0)[part].reshape(-1).astype(np.int64))
        g = q - torch.nn.functional.one_hot(truth, 21)
        for theta in arguments.theta:
            features = bilateral_features(image[part], *(float(t) for t in theta.split("/")))
            exact = ExactEngine(features.double(), [len(features)], 1e-9)
            lattice = LatticeEngine(features, [len(features)])
            wanted = of_normalized_message(exact.feature_gradient, exact.apply, q.double(), g.double())
            line = f"{name} {theta}:"
            for kind, gradient in (("filtered", lattice.feature_gradient), ("slope", slope(lattice))):
                got = of_normalized_message(gradient, lattice.apply, q, g).double()
                cosine = float((got * wanted).sum() / got.norm() / wanted.norm())
                line += f" {kind} error {relative_error(got, wanted):.3f} cosine {cosine:.3f};"
            print(line, flush=True)


if __name__ == "__main__":
    main()
