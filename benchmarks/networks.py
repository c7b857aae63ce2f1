"""Every full-size network: a forward pass at 500x500 and a training step, time and peak memory, on a CPU or a GPU.

    python benchmarks/networks.py                           all; writes results/networks_cpu.json or networks_cuda.json
    python benchmarks/networks.py --only FCN-8s CRF-RNN     these alone

Each network runs in processes of its own, so that peak memory is its own. On a CPU it is measured as plain float32; on
a GPU as that and with channels last, autocast to bfloat16 and torch.compile. A step is forward, loss, backward and SGD
with momentum, as the network is trained: FCN and CRF-RNN with a loss at every pixel, DeepLab with one at the scores, on
the largest crop within --size that puts them on pixels. Nothing is timed before its check: shapes, finite logits and
gradients, and in other modes logits as in float32. Weights are drawn, not trained, which times a network as well; but a
CRF has more to do the less sure its unaries are, and here the winners have 0.5 to 0.8 on average.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import environment, image_tensor, memory_mib, once, procedural_scene, reset_peak_memory, spread
from _networks import NETWORKS, Network, draw, outputs
from torch import Tensor, nn

from crfnet import models
from crfnet.images import atomic_write

# root mean square difference over the spread: weights and activations of 100 layers, each rounded to half a unit,
# add up to sqrt(200) of them; in float32 it is the order of long sums that counts
TOLERANCE = {"none": 1e-4, "float16": 14 * 2**-11, "bfloat16": 14 * 2**-8}
CRF_GAIN = 4.0  # more of it: where two labels are even, regions follow a rounding
WARM_UP = 65  # pixels an axis of a CPU's step before the timed ones: a whole one would take half of the run
LIMIT = 300.0  # seconds after which a process is given up
PAPERS = (
    "For orientation, the papers' own figures on their own hardware, not ours: DeepLab v1 (2014; Titan GPU, 306x306)\n"
    "about 8 frames a second at test and 3 in training; FCN-8s (2014; Tesla K40c, 500x500) about 175 ms a frame."
)
PLAIN = {"channels_last": False, "autocast": "none", "compile": False}


# One network, in a process of its own


def relative_difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square over the spread, the larger of two tasks'; what all labels of a pixel share says nothing."""
    pairs = [(a.log_softmax(1), b.log_softmax(1)) for a, b in zip(got, wanted, strict=True)]
    return max(float((a - b).square().mean().sqrt() / b.std()) for a, b in pairs)


def check_logits(network: Network, got: list[Tensor], size: int) -> None:
    """Raise unless they are logits of every label, as large as the image, and numbers."""
    shapes, wanted = [tuple(task.shape) for task in got], [(1, labels, size, size) for labels in network.labels]
    if shapes != wanted:
        raise ValueError(f"logits must be {wanted}, got {shapes}")
    if not all(bool(task.isfinite().all()) for task in got):
        raise ValueError("logits are not finite")


def check_gradients(part: nn.Module, loss: Tensor) -> None:
    """Raise unless all that is trained has a gradient, and all are numbers."""
    gradients = {name: p.grad for name, p in part.named_parameters() if p.requires_grad}
    wrong = [name for name, grad in gradients.items() if grad is None or not bool(grad.isfinite().all())]
    if wrong or not math.isfinite(float(loss)):
        raise ValueError(f"loss {float(loss):g}; gradients missing or not finite: {wrong}")


def timed(function: Callable[[], object], device: torch.device, most: int, until: float) -> dict[str, float]:
    """Seconds from an idle device to the end of the work, as often as there is time for, once at least; peak memory."""
    cuda = device.type == "cuda"

    def finished() -> None:
        function()
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_memory()
    seconds = [once(finished)]
    while len(seconds) < most and time.monotonic() + seconds[-1] < until:
        seconds.append(once(finished))
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory_mib("VmHWM")
    times = spread(seconds)
    return times | {"repeats": len(seconds), "per_second": 1 / times["median"], "peak_mib": peak}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Checks and times of one network in one mode."""
    begun, idle = time.monotonic(), memory_mib("VmRSS")
    network, device, size, mode = NETWORKS[task["name"]], torch.device(task["device"]), task["size"], task["mode"]
    torch.manual_seed(0)
    torch.set_num_threads(task["threads"])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # plain float32 is float32
    scene = procedural_scene(size, size)
    image = torch.cat([image_tensor(scene[0])] * (network.channels // 3), 1).to(device)
    labels = torch.from_numpy(scene[1]).long()[None].to(device)
    crop = network.largest_crop(size)
    whole = draw(network, image)
    dtype = None if mode["autocast"] == "none" else getattr(torch, mode["autocast"])
    with torch.no_grad():
        reference = outputs(whole(image))
        check_logits(network, reference, size)
    if mode["channels_last"]:
        whole, image = whole.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = whole.get_submodule(network.trained)
    compiled = partial(torch.compile, dynamic=False) if mode["compile"] else lambda module: module
    fast, trained = compiled(whole), compiled(part)

    def infer() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return outputs(fast(image))

    optimizer = torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=1e-8, momentum=0.9)

    def step(pixels: int) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = network.loss(trained, image[..., :pixels, :pixels], labels[..., :pixels, :pixels])
        loss.backward()
        optimizer.step()
        return loss.detach()

    error = 0.0
    if mode != PLAIN:  # else the reference was the warm-up
        got = infer()
        check_logits(network, got, size)
        error = relative_difference(got, reference)
        most = TOLERANCE[mode["autocast"]] * (CRF_GAIN if isinstance(whole, models.WithCRF) else 1.0)
        if not error <= most:
            raise ValueError(f"logits differ by {error:.1e} of their spread from plain float32, at most {most:.1e} may")
        del got
    del reference
    inference = timed(infer, device, task["repeats"], begun + task["share"] / 3)
    part.train()
    one_size = device.type == "cuda" or mode["compile"]  # as what is tuned or compiled
    check_gradients(part, step(crop if one_size else network.largest_crop(min(size, WARM_UP))))
    training = timed(lambda: step(crop), device, task["repeats"], begun + task["share"])
    parameters = sum(p.numel() for p in whole.parameters())
    row = {"parameters": parameters, "crop": crop, "idle_mib": idle, "error": error}
    return row | {"inference": inference, "training": training}


def alone(task: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own; RuntimeError with what it last said where it fails."""
    command = [sys.executable, __file__, "--alone", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# All of them


def line(name: str, mode: str, row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """A row of the table: seconds are medians (least to greatest), and how many times as fast as plain float32."""

    def cell(what: str) -> str:
        r = row[what]
        ratio = f", {plain[what]['median'] / r['median']:.2f}x" if plain else ""
        return f"{r['median']:.3g} ({r['min']:.3g} to {r['max']:.3g}{ratio})"

    there, back = row["inference"], row["training"]
    return (
        f"| {name} | {row['parameters'] / 1e6:.1f} | {mode} | {cell('inference')} | {there['per_second']:.3g} "
        f"| {there['peak_mib']:.0f} | {row['crop']} | {cell('training')} | {back['peak_mib']:.0f} |"
    )


def save(report: dict[str, Any], out: Path) -> None:
    """Write it whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as stream:
        stream.write((json.dumps(report, indent=2) + "\n").encode())


def main() -> None:
    """Parse the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("channels-last", "compile"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--autocast", choices=tuple(TOLERANCE), help="default: bfloat16 on a GPU, else none")
    parser.add_argument("--size", type=int, default=500, help="pixels an axis")
    parser.add_argument("--repeats", type=int, help="at most; default: 20 on a GPU, else 3")
    parser.add_argument("--seconds", type=float, default=660.0, help="for all; what is left for a network sets repeats")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--out", type=Path, help="JSON with all figures; default: results/networks_{cpu,cuda}.json")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone)))
        return
    cuda = arguments.device == "cuda"
    torch.set_num_threads(arguments.threads)
    given = {key: getattr(arguments, key) for key in PLAIN}
    default = {"channels_last": True, "autocast": "bfloat16", "compile": True} if cuda else PLAIN
    mode = {key: default[key] if value is None else value for key, value in given.items()}
    modes = {"plain": PLAIN} | ({} if mode == PLAIN else {"fast": mode})
    common = {key: getattr(arguments, key) for key in ("device", "size", "threads")}
    common["repeats"] = arguments.repeats or (20 if cuda else 3)
    out = arguments.out or Path(__file__).parent / "results" / f"networks_{arguments.device}.json"
    where = environment() | ({"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if cuda else {})
    settings = common | {"seconds": arguments.seconds, "modes": modes, "tolerance": TOLERANCE, "crf_gain": CRF_GAIN}
    rows: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"environment": where, "settings": settings, "networks": rows, "failed": {}}
    print(f"{where}\n{settings}\n\n{PAPERS}\n", flush=True)
    columns = "network, M parameters, mode, forward in s, frames/s, peak MiB, crop, training step in s, peak MiB"
    print(f"| {columns.replace(', ', ' | ')} |\n|{' --- |' * 9}", flush=True)
    tasks = [(name, kind) for name in arguments.only for kind in modes]
    begun = time.monotonic()
    for done, (name, kind) in enumerate(tasks):
        share = (begun + arguments.seconds - time.monotonic()) / (len(tasks) - done)
        row = rows.setdefault(name, {})
        try:
            row[kind] = alone(common | {"name": name, "mode": modes[kind], "share": share})
            print(line(name, kind, row[kind], row.get("plain") if kind != "plain" else None), flush=True)
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as failure:  # the others go on
            report["failed"][f"{name}/{kind}"] = str(failure)
            print(f"FAILED: {name}, {kind}: {failure}", flush=True)
        report["seconds"] = time.monotonic() - begun
        save(report, out)
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
