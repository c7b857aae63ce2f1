"""The whole job on a CPU against pydensecrf: build both kernels, 10 iterations, 21 classes, and the errors of both.

    python benchmarks/peers_cpu.py --threads 1 2 --json results/peers_cpu.json

The peer is pydensecrf's C++ (`pip install pydensecrf2==1.1`, which needs a C++ compiler); where it is missing the
benchmark says so and measures ours alone. Both get the same unaries (labels shrunk 8 times, noise, bilinear up) and the
same
model: Potts, weights 3 and 5, spatial bandwidth 3, normalised "after". Runs alternate, the peer's and ours; ratios
are of medians. Errors are relative L2 against float64: of one normalised bilateral message on random rows by brute
force, and of the final marginals of the image's centre against mean field with exact filters in float64, themselves
checked by brute force.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _measure import (
    bilateral_features,
    coarse_logits,
    environment,
    image_tensor,
    memory_mib,
    normalized_rows,
    once,
    procedural_scene,
    relative_error,
    reset_peak_memory,
    spread,
    voc_scene,
)
from torch import Tensor

import crfnet
from crfnet.ops import GaussianFilter, GridFilter

try:
    import pydensecrf.densecrf as peer
except ImportError:
    peer = None

CLASSES, ITERATIONS = 21, 10
CROP = 240  # side of the centre on which final marginals are compared: exact ones of a whole image take many minutes
SPATIAL_WEIGHT, BILATERAL_WEIGHT, THETA_GAMMA = 3.0, 5.0, 3.0


def ours(image: np.ndarray, logits: Tensor, alpha: float, beta: float) -> Tensor:  # (C, N)
    """The whole job with the lattice."""
    energy = crfnet.dense_crf(
        image_tensor(image),
        logits,
        theta_alpha=alpha,
        theta_beta=beta,
        theta_gamma=THETA_GAMMA,
        spatial_weight=SPATIAL_WEIGHT,
        bilateral_weight=BILATERAL_WEIGHT,
        num_iterations=ITERATIONS,
        engine="lattice",
    )
    return energy.softmax(1)[0].flatten(1)


def theirs(image: np.ndarray, logits: Tensor, alpha: float, beta: float, iterations: int = ITERATIONS) -> Tensor:
    """The whole job with pydensecrf, (C, N)."""
    height, width = image.shape[:2]
    crf = peer.DenseCRF2D(width, height, CLASSES)
    crf.setUnaryEnergy(-logits[0].flatten(1).numpy())
    after = peer.NORMALIZE_AFTER
    if iterations == ITERATIONS:
        crf.addPairwiseGaussian(sxy=THETA_GAMMA, compat=SPATIAL_WEIGHT, normalization=after)
    crf.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=image, compat=BILATERAL_WEIGHT, normalization=after)
    return torch.from_numpy(np.array(crf.inference(iterations)))


def their_message(image: np.ndarray, logits: Tensor, alpha: float, beta: float) -> Tensor:
    """One normalised bilateral message, (N, C), read off one iteration: log q + unary is 5 times it plus a constant."""
    log_q = theirs(image, logits, alpha, beta, iterations=1).double().log()
    message = (log_q - logits[0].flatten(1)) / BILATERAL_WEIGHT
    return (message - message.mean(0) + 1 / CLASSES).T  # messages sum to 1


def exact_marginals(image: np.ndarray, logits: Tensor, alpha: float, beta: float, rows: Tensor) -> Tensor:  # (C, N)
    """Mean field with exact filters in float64."""
    features = bilateral_features(image, alpha, beta).double()
    bilateral = GaussianFilter(features[None], method="exact", normalization="after", tolerance=1e-4)
    spatial = GridFilter(image.shape[:2], THETA_GAMMA, normalization="after")
    unary = logits.double().flatten(2).mT
    q = unary.softmax(2)
    error = relative_error(bilateral(q)[0, rows], normalized_rows(features, q[0], rows))
    if not error < 1e-5:
        raise SystemExit(f"the oracle's own filter is {error:.1e} off brute force")
    for _ in range(ITERATIONS):
        q = (unary + SPATIAL_WEIGHT * spatial(q) + BILATERAL_WEIGHT * bilateral(q)).softmax(2)
    return q[0].T


def errors(image: np.ndarray, logits: Tensor, alpha: float, beta: float, final: bool) -> dict[str, float]:
    """Relative errors of ours and theirs."""
    rows = torch.randperm(image.shape[0] * image.shape[1], generator=torch.Generator().manual_seed(0))[:512]
    features, q = bilateral_features(image, alpha, beta), logits.softmax(1)[0].flatten(1).T.contiguous()
    truth = normalized_rows(features, q, rows)
    message = GaussianFilter(features[None], method="lattice", normalization="after")(q[None])[0, rows]
    result = {"message": relative_error(message, truth)}
    if peer is not None:
        result["message_peer"] = relative_error(their_message(image, logits, alpha, beta)[rows], truth)
    if final:
        top, left = ((size - CROP) // 2 if size > CROP else 0 for size in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + CROP, left : left + CROP])
        logits = logits[..., top : top + CROP, left : left + CROP].contiguous()
        rows = torch.randperm(image.shape[0] * image.shape[1], generator=torch.Generator().manual_seed(0))[:512]
        truth = exact_marginals(image, logits, alpha, beta, rows)
        result["marginals"] = relative_error(ours(image, logits, alpha, beta), truth)
        if peer is not None:
            result["marginals_peer"] = relative_error(theirs(image, logits, alpha, beta), truth)
    return result


def peak_memory(who: str, scene: str, alpha: float, beta: float) -> float:
    """MiB by which the job raises the peak of a process of its own, which has loaded everything already."""
    command = [sys.executable, __file__, "--peak-memory-of", who, "--scenes", scene]
    command += ["--theta", f"{alpha}/{beta}", "--threads", "1"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Parse the command line, measure every setting, print the table."""
    scenes = {
        "procedural": lambda: procedural_scene(375, 500),
        "voc_2007_000346": lambda: voc_scene("voc_2007_000346"),
        "voc_2007_000332_321": lambda: voc_scene("voc_2007_000332", 321),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", choices=scenes, default=list(scenes))
    parser.add_argument("--theta", nargs="+", default=["67/3", "160/3", "80/13"], help="theta_alpha/theta_beta")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gain", type=float, default=8.0, help="of the unaries' logits, beside noise of 1")
    parser.add_argument("--no-marginals", action="store_true", help="skip the minutes that exact marginals take")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--peak-memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if peer is None:
        print("pydensecrf is missing (pip install pydensecrf2==1.1): measuring ours alone")
    results: list[dict[str, object]] = []
    for name in arguments.scenes:
        scene = scenes[name]()
        if scene is None:
            print(f"{name} is missing: CRFNET_DATA names the folder of images")
            continue
        image, logits = np.ascontiguousarray(scene[0]), coarse_logits(scene[1], CLASSES, gain=arguments.gain)
        for theta in arguments.theta:
            alpha, beta = (float(part) for part in theta.split("/"))
            job = {who: partial(run, image, logits, alpha, beta) for who, run in (("ours", ours), ("peer", theirs))}
            if arguments.peak_memory_of:
                small = np.ascontiguousarray(image[:64, :64]), logits[..., :64, :64].contiguous(), alpha, beta
                (ours if arguments.peak_memory_of == "ours" else theirs)(*small)  # loads and initialises everything
                reset_peak_memory()
                before = memory_mib("VmRSS")
                job[arguments.peak_memory_of]()
                print(memory_mib("VmHWM") - before)
                return
            torch.set_num_threads(max(arguments.threads))
            result: dict[str, object] = {"scene": name, "theta": theta, "pixels": image.shape[0] * image.shape[1]}
            result |= errors(image, logits, alpha, beta, not arguments.no_marginals)
            line = " ".join(f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float))
            print(f"{name} {theta}: relative error: {line}", flush=True)
            who = ["ours"] if peer is None else ["peer", "ours"]
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                seconds: dict[str, list[float]] = {key: [] for key in who}
                for repeat in range(arguments.repeats + 1):
                    for key in who:
                        spent = once(job[key])
                        if repeat:  # the first of each warms up
                            seconds[key].append(spent)
                times = {key: spread(value) for key, value in seconds.items()}
                result[f"seconds_{threads}_threads"] = times
                line = ", ".join(f"{key} {1e3 * value['median']:.0f} ms" for key, value in times.items())
                ratio = f", {times['peer']['median'] / times['ours']['median']:.2f} times as fast" if peer else ""
                print(f"{name} {theta}: {threads} threads: {line}{ratio}", flush=True)
            memory = {key: peak_memory(key, name, alpha, beta) for key in who}
            result["peak_memory_mib"] = memory
            print(
                f"{name} {theta}: peak memory: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in memory.items()), flush=True
            )
            results.append(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
