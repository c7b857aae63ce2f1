"""The GPU engines: correctness first, then every stage, inference and training against their floors. Under 10 minutes.

    python benchmarks/gpu.py                       on a GPU; writes results/gpu.json
    python benchmarks/gpu.py --interpret           a dry run anywhere: tiny sizes, in Triton's interpreter

Peaks (bytes copied, fp32, tf32 and fp16 products, powers of two) are measured on the device; a floor is the least time
that the counted bytes, flops and powers of two can take at those peaks. Times are medians by CUDA events. "called" is
as Python calls, from an idle device; "graph" is the same work replayed from a CUDA graph with a head start, so that
launches are no part of it. Ratios and targets go by the graph where there is one. Stages start with an empty cache;
splat, blur and slice are their kernels' times as the profiler has them. What --budget does not leave time for is listed
as skipped, the least important first; some time later the run ends wherever it is. The file is written after every
section, and says what failed.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import numpy as np
import torch
from _device import Clock, causes, kernel_seconds, memory, peaks
from _floors import (
    Work,
    blur_work,
    build_work,
    exact_gradient_work,
    exact_work,
    floor,
    grid_work,
    inference_work,
    splat_work,
    step_work,
    total,
    training_work,
)
from _gpu_check import check, oracle
from _gpu_problems import (
    PRECISIONS,
    THETA,
    Problem,
    brute_force,
    draw,
    exact_engine,
    exact_inference,
    inference,
    lattice_engine,
    problem,
    training,
)
from _measure import environment, once, relative_error, spread
from torch import Tensor

from crfnet.ops import GridFilter, gpu
from crfnet.ops.gpu import tune
from crfnet.ops.step import step

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4)  # of the exact engine, tried from the left until the error is small enough
WANTED_ERROR = 1e-3
KERNELS = {
    "splat": ("splat", "carry"),
    "blur": ("blur",),
    "slice": ("slice",),
}  # stages by what their kernels are called
GRACE = 70.0  # seconds after the budget that what was begun may still take
CPU_SECONDS = 30.0  # a megapixel that the CPU's section is expected to take, at most
TARGETS = {"lattice inference": 2e-3, "lattice training": 5e-3, "exact inference": 15e-3}  # seconds, on an H200


@dataclass(frozen=True)
class Plan:
    """What to run: sizes (width, height) and classes, the first of each the main ones."""

    sizes: tuple[tuple[int, int], ...] = ((500, 375), (321, 321), (1024, 512), (2048, 1024))
    classes: tuple[int, ...] = (21, 2, 81, 171)
    iterations: int = 10
    training_iterations: int = 5
    rows: int = 512  # compared with the oracle
    growth: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # megapixels
    brute_rows: int = 16384  # that brute force is timed on, and scaled


TINY = Plan(((11, 7), (8, 8)), (3,), 1, 1, 16, (5e-5, 8e-5), 32)


class Overdue(BaseException):
    """Budget and grace are over; no `Exception`, so that no section takes it for a failure of its own."""


class Run:
    """A run under way: where, until when, with which peaks, and what was found.

    Args:
        plan: what to run.
        device: where.
        budget: seconds after which nothing new is begun.
        out: the JSON, or None.
    """

    def __init__(self, plan: Plan, device: torch.device, budget: float, out: Path | None = None) -> None:
        self.plan, self.device, self.ends, self.out = plan, device, time.monotonic() + budget, out
        self.clock = Clock(device) if device.type == "cuda" else Clock(device, least=1, most=1)
        self.peak: dict[str, float] = {}
        self.report: dict[str, Any] = {"skipped": [], "failed": {}}
        self.report |= {"peaks": self.peak, "errors": {}, "networks": {}, "stages": {}, "cpu": {}}

    def due(self, what: str, needs: float = 0.0) -> bool:
        """Whether so many seconds are left for it; else it is noted as skipped."""
        if time.monotonic() + needs < self.ends:
            return True
        self.report["skipped"].append(what)
        return False

    def attempt(self, path: str, section: Callable[[], Any], needs: float = 0.0) -> None:
        """`always`, if so many seconds are left."""
        if self.due(path, needs):
            self.always(path, section)

    def always(self, path: str, section: Callable[[], Any]) -> None:
        """Put ``section()`` at this path of the report, such as "networks/500x375x21", and write the report.

        Without memory for it, it is noted as skipped; a failure is noted and waits for the end.
        """
        *above, last = path.split("/")
        place = self.report
        for key in above:
            place = place[key]
        try:
            place[last] = section()
        except torch.OutOfMemoryError:
            self.report["skipped"].append(f"{path} (out of memory)")
        except Exception:  # the figures of an hour's wait for a GPU are not thrown away for one section
            self.report["failed"][path] = traceback.format_exc()
        self.save()

    def save(self) -> None:
        """Write the report as far as it goes, whole or not at all."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            beside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
            beside.write_text(json.dumps(self.report, indent=2) + "\n")
            os.replace(beside, self.out)

    def rows(self, N: int) -> Tensor:
        """Points compared with brute force, the same on every run."""
        return torch.randperm(N, generator=torch.Generator().manual_seed(1))[: self.plan.rows].to(self.device)

    def against_floor(self, times: dict[str, Any], work: Work) -> dict[str, Any]:
        """The times, with the floor in seconds, what sets it, and how many times as long it took.

        Where measuring a peak failed, which is noted, there are the times alone.
        """
        if not set(work) <= set(self.peak):
            return times
        least, bound = floor(work, self.peak)
        return times | {"floor": least, "bound": bound, "ratio": median(times) / least}


def median(times: dict[str, Any]) -> float:
    """Seconds that count: of the graph where there is one."""
    return float(times.get("graph", times)["median"])


# Sections, the most important first


def networks(run: Run, size: tuple[int, int], classes: int) -> dict[str, Any]:
    """Lattice: inference and a training step, as called and as a graph, with floors and peak memory."""
    p = problem(size, classes, run.device)
    N, M = len(p.features), int(lattice_engine(p.features).num_vertices)
    result: dict[str, Any] = {"scene": p.name, "N": N, "M": M, "C": classes}
    for what, make, work, iterations in (
        ("inference", inference, inference_work, run.plan.iterations),
        ("training", training, training_work, run.plan.training_iterations),
    ):
        function = make(p, "lattice", iterations)
        with memory(run.device) as held:
            function()
        times = run.clock.both(function) | {"peak_bytes": held.peak}
        result[what] = run.against_floor(times, work(N, M, classes, THETA[2], iterations))
    return result


def exact(run: Run) -> dict[str, Any]:
    """The exact engine: the loosest tolerance that gives the wanted error, its stages there, and inference with it."""
    p = problem(run.plan.sizes[0], run.plan.classes[0], run.device)
    N, D, C = *p.features.shape, run.plan.classes[0]
    v, g = draw(N, C, run.device)
    rows = run.rows(N)
    truth, _, _ = oracle(p.features, v, g, rows)
    result: dict[str, Any] = {"scene": p.name}
    for precision in PRECISIONS:
        for tolerance in TOLERANCES:
            engine = exact_engine(p.features, tolerance, precision)
            error = relative_error(engine.apply(v)[rows], truth)
            if error <= WANTED_ERROR:
                break
        pairs = float(engine.kept_fraction) * N * N
        apply = run.clock.both(lambda: engine.apply(v))  # noqa: B023
        backward = run.clock(lambda: engine.feature_gradient(v, g))  # noqa: B023
        infer = exact_inference(p, tolerance, precision, run.plan.iterations)
        with memory(run.device) as held:
            infer()
        result[precision] = {
            "tolerance": tolerance,
            "error": error,
            "kept_fraction": pairs / N / N,
            "build": run.clock(lambda: exact_engine(p.features, tolerance, precision)),  # noqa: B023
            "apply": run.against_floor(apply, exact_work(pairs, N, D, C, precision)),
            "feature_gradient": run.against_floor(backward, exact_gradient_work(pairs, N, D, C)),
            "inference": run.clock.both(infer) | {"peak_bytes": held.peak},
        }
    return result


def dense(run: Run) -> dict[str, Any]:
    """All pairs, none to be skipped since every point hears every other, against the floor of the units."""
    p = problem(run.plan.sizes[0], run.plan.classes[0], run.device)
    features, C = 0.01 * p.features, run.plan.classes[0]
    N, D = features.shape
    v, _ = draw(N, C, run.device)
    result: dict[str, Any] = {}
    for precision in PRECISIONS:
        engine = exact_engine(features, 1e-6, precision)
        kept = float(engine.kept_fraction)
        if kept < 1.0:
            raise RuntimeError(f"dense: only {kept:.2%} of the pairs are there")
        times = run.clock(lambda: engine.apply(v), most=5)  # noqa: B023
        result[precision] = run.against_floor(times, exact_work(1.0 * N * N, N, D, C, precision))
    return result


def all_gradients(run: Run) -> dict[str, Any]:
    """A training step whose gradients reach image and bandwidths as well, by each engine."""
    p = problem(run.plan.sizes[0], run.plan.classes[0], run.device)
    result: dict[str, Any] = {}
    for engine in ("lattice", "exact"):
        function = training(p, engine, run.plan.training_iterations, guide=True)
        with memory(run.device) as held:
            function()
        result[engine] = run.clock.both(function) | {"peak_bytes": held.peak}
    return result


def stages(run: Run, size: tuple[int, int], classes: int) -> dict[str, Any]:
    """The lattice's parts, the grid's passes and the step, from an empty cache, each with its floor."""
    p = problem(size, classes, run.device)
    N, D = p.features.shape
    v, g = draw(N, classes, run.device)
    engine = lattice_engine(p.features)
    M, C, clock = int(engine.num_vertices), classes, run.clock
    result: dict[str, Any] = {"scene": p.name, "M": M}

    def add(what: str, function: Callable[[], object], work: Work) -> None:
        result[what] = run.against_floor(clock.both(function, cold=True), work)

    result["lattice kernels"] = found = kernel_seconds(lambda: engine.apply(v), run.device)
    parts = {"splat": splat_work(N, M, D, C), "blur": blur_work(M, D, C), "slice": splat_work(N, M, D, C)}
    for part, work in parts.items():
        seconds = sum(spent for kernel, spent in found.items() if any(name in kernel for name in KERNELS[part]))
        if seconds:
            result[f"lattice {part}"] = run.against_floor({"median": seconds}, work)
    add("lattice build", lambda: lattice_engine(p.features), build_work(N, M, D))
    result["lattice build kernels"] = kernel_seconds(lambda: lattice_engine(p.features), run.device)
    add("lattice apply", lambda: engine.apply(v), total(*parts.values()))
    add("lattice transposed", lambda: engine.apply(v, True), total(*parts.values()))
    wide = 2 * C * (D + 1)
    by_features = (splat_work(N, M, D, wide), blur_work(M, D, wide), splat_work(N, M, D, wide))
    add("lattice feature gradient", lambda: engine.feature_gradient(v, g), total(*by_features))
    theta = torch.tensor(THETA[2], dtype=torch.float64, device=run.device)
    grid = GridFilter((size[1], size[0]), theta)
    add("grid", lambda: grid(v[None]), grid_work(N, C, THETA[2]))
    result |= step_stages(run, p, v, g)
    return result


def step_stages(run: Run, p: Problem, v: Tensor, g: Tensor) -> dict[str, Any]:
    """The step, its backward, and one after the other, from an empty cache.

    A backward on its own runs on the stream of its forward, which no graph of another stream can hold: in a graph its
    time is that of both less the forward's, and what the forward leaves in the cache is its gain.
    """
    strengths = [v.new_full((v.shape[1],), weight) for weight in (3.0, 5.0)]
    leaves = [tensor.clone().requires_grad_() for tensor in (p.unary, v[None], g[None])]
    works = [step_work(len(v), v.shape[1], 2, backward) for backward in (False, True)]

    def forward() -> Tensor:
        return step(leaves[0], leaves[1:], [None, None], strengths, marginals=True)

    with torch.no_grad():
        ahead = run.clock.both(forward, cold=True)
    both = run.clock.both(lambda: torch.autograd.grad(forward(), leaves, g[None]), cold=True)
    q = forward()  # only now: while it lives, its leaves' gradients belong to this stream, in any graph
    back: dict[str, Any] = dict(
        run.clock(lambda: torch.autograd.grad(q, leaves, g[None], retain_graph=True), cold=True)
    )
    if "graph" in both and "graph" in ahead:
        back["graph"] = {"median": both["graph"]["median"] - ahead["graph"]["median"]}
    names = ("step", "step backward", "step and its backward")
    return {
        name: run.against_floor(times, work)
        for name, times, work in zip(names, (ahead, back, both), (*works, total(*works)), strict=True)
    }


def alternatives(run: Run) -> dict[str, Any]:
    """One message by brute force in PyTorch on the same device, all rows as far as ``brute_rows`` tells."""
    p = problem(run.plan.sizes[0], run.plan.classes[0], run.device)
    v, _ = draw(len(p.features), run.plan.classes[0], run.device)
    rows = min(len(v), run.plan.brute_rows)
    result: dict[str, Any] = {"rows": rows, "scaled_to": len(v)}
    for precision in ("highest", "high"):  # float32, tf32 for the values
        times = run.clock(lambda: brute_force(p.features, v, rows, precision), most=3)  # noqa: B023
        result[precision] = {key: times[key] * len(v) / rows for key in ("median", "min", "max")}
    return result


def growth(run: Run) -> dict[str, Any]:
    """Inference by the lattice from small pictures to large ones of the same kind, and the slope in logarithms."""
    sizes, seconds, called, held = [], [], [], []
    for megapixels in run.plan.growth:
        if run.due(f"growth at {megapixels} megapixels"):
            height = round((megapixels * 1e6 * 0.75) ** 0.5)
            p = problem((round(height / 0.75), height), 5, run.device)
            function = inference(p, "lattice", run.plan.iterations)
            with memory(run.device) as used:
                function()
            sizes.append(len(p.features))
            times = run.clock.both(function)
            seconds.append(median(times))
            called.append(times["median"])
            held.append(used.peak)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(sizes) > 1 else math.nan
    large = float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0]) if len(sizes) > 3 else math.nan
    slopes = {"slope": slope, "slope of the largest": large}
    return {"pixels": sizes, "seconds": seconds, "called": called, "peak_bytes": held} | slopes


def tuned(run: Run) -> dict[str, Any]:
    """Defaults against what autotuning chooses, at the main size; and what it chooses."""
    p = problem(run.plan.sizes[0], run.plan.classes[0], run.device)
    v, g = draw(len(p.features), run.plan.classes[0], run.device)
    engine = exact_engine(p.features, 3e-4, "tf32")
    functions = {
        "lattice inference": inference(p, "lattice", run.plan.iterations),
        "lattice training": training(p, "lattice", run.plan.training_iterations),
        "exact apply": lambda: engine.apply(v),
        "exact feature gradient": lambda: engine.feature_gradient(v, g),
    }
    result: dict[str, Any] = {}
    for what, function in functions.items():
        if run.due(f"autotuning {what}"):
            default = run.clock.both(function)
            with tune.autotuning():
                result[what] = {"default": default, "tuned": run.clock.both(function)}
    result["chosen"] = {device: dict(choices) for device, choices in tune._chosen.items()}
    return result


def on_the_cpu(run: Run, size: tuple[int, int]) -> dict[str, Any]:
    """The same inference and training step, by the CPU engines of this machine; twice where there is time."""
    p = problem(size, run.plan.classes[0], torch.device("cpu"))
    calls = {
        "inference": inference(p, "lattice", run.plan.iterations),
        "training": training(p, "lattice", run.plan.training_iterations),
    }
    result: dict[str, Any] = {}
    seconds = [0.0]
    for what, function in calls.items():
        if run.due(f"CPU {what} {p.name}", 2 * seconds[0]):
            seconds = [once(function)]
            if time.monotonic() + seconds[0] < run.ends:
                seconds.append(once(function))
            result[what] = spread(seconds) | {"repeats": len(seconds)}
    return result


# The whole


def measure(run: Run, expected: Tensor) -> None:
    """All that needs the kernels; no times after an error that is too large."""
    plan, report = run.plan, run.report
    size, C = main = (plan.sizes[0], plan.classes[0])
    run.always("peaks", lambda: peaks(run.clock, run.peak))
    p = problem(size, C, run.device)
    rows = run.rows(len(p.features))
    run.always("errors", lambda: check(p, expected, rows, plan.iterations, report["errors"]))
    if "errors" in report["failed"] or any("errors" in what for what in report["skipped"]):
        return
    run.attempt(f"networks/{named(*main)}", lambda: networks(run, *main))
    run.attempt("exact", lambda: exact(run))
    run.attempt("dense", lambda: dense(run))
    run.attempt(f"stages/{named(*main)}", lambda: stages(run, *main))
    run.attempt("growth", lambda: growth(run))
    run.attempt("tuned", lambda: tuned(run))
    run.attempt("brute force", lambda: alternatives(run))
    run.attempt("all gradients", lambda: all_gradients(run))
    rest = [(size, C) for C in plan.classes for size in plan.sizes if (size, C) != main]
    for case in sorted(rest, key=lambda case: case[0][0] * case[0][1] * case[1]):  # small ones first
        run.attempt(f"networks/{named(*case)}", lambda: networks(run, *case))  # noqa: B023
    for case in ((plan.sizes[-1], C), (size, plan.classes[-1])):
        run.attempt(f"stages/{named(*case)}", lambda: stages(run, *case))  # noqa: B023


def everything(run: Run, interpret: bool) -> None:
    """What the GPU does, then the same by the CPU."""
    plan = run.plan
    small = problem(plan.sizes[0], plan.classes[0], torch.device("cpu"))
    expected = inference(small, "lattice", plan.iterations)().softmax(1)  # before the interpreter is anyone's engine
    with gpu.interpreted() if interpret else contextlib.nullcontext():
        measure(run, expected)
    if "errors" not in run.report["failed"]:
        for width, height in plan.sizes:
            path, needs = f"cpu/{named((width, height), plan.classes[0])}", CPU_SECONDS * width * height / 2**20
            run.attempt(path, lambda: on_the_cpu(run, (width, height)), needs)  # noqa: B023


def named(size: tuple[int, int], classes: int) -> str:
    """Of a case."""
    return f"{size[0]}x{size[1]}x{classes}"


def table(report: dict[str, Any]) -> Iterator[str]:
    """What to look at first."""

    def line(name: str, r: dict[str, Any]) -> str:
        graph = f"{1e3 * r['graph']['median']:9.3f}" if "graph" in r else f"{'-':>9}"
        called = f"{1e3 * r['median']:9.3f}"
        against = f"{1e3 * r['floor']:9.3f} {r['ratio']:6.1f} {r['bound']:>6}" if "floor" in r else f"{'-':>23}"
        held = f"{r['peak_bytes'] / 2**20:7.0f}" if "peak_bytes" in r else ""
        return f"{name:<44} {called} {graph} {against} {held}"

    yield f"{'milliseconds':<44} {'called':>9} {'graph':>9} {'floor':>9} {'ratio':>6} {'bound':>6} {'MiB':>7}"
    for case, r in report["networks"].items():
        for what in ("inference", "training"):
            yield line(f"lattice {what} {case}", r[what])
    for precision in PRECISIONS:
        if precision in report.get("exact", {}):
            r = report["exact"][precision]
            label = f"exact {precision}, {r['kept_fraction']:.1%} of pairs"
            yield line(f"{label}, inference", r["inference"])
            yield line(f"{label}, apply", r["apply"])
            yield line(f"{label}, to features", r["feature_gradient"])
        if precision in report.get("dense", {}):
            yield line(f"dense {precision}", report["dense"][precision])
    for case, found in report.get("stages", {}).items():
        yield from (line(f"{what} {case}", r) for what, r in found.items() if isinstance(r, dict) and "floor" in r)
    for precision, r in report.get("brute force", {}).items():
        if isinstance(r, dict):
            yield line(f"brute force in PyTorch, {precision}", r)
    for case, r in report.get("cpu", {}).items():
        yield from (line(f"CPU {case}, {what}", times) for what, times in r.items())
    for engine, r in report.get("all gradients", {}).items():
        yield line(f"{engine} training, gradients to all", r)
    for what, r in report.get("tuned", {}).items():
        if "tuned" in r:
            yield f"{what}: default {1e3 * median(r['default']):.3f}, tuned {1e3 * median(r['tuned']):.3f}"
    if "growth" in report:
        yield "time grows as pixels to the power {slope:.2f}".format(**report["growth"])
    if report["skipped"]:
        yield "no time for: " + ", ".join(report["skipped"])


def verdicts(run: Run) -> dict[str, dict[str, float]]:
    """The targets at the main size, in seconds, and what was reached: as called, and as a graph, which counts."""
    found = run.report["networks"].get(named(run.plan.sizes[0], run.plan.classes[0]), {})
    reached = {f"lattice {what}": found[what] for what in ("inference", "training") if what in found}
    precise = [
        r["inference"]
        for r in run.report.get("exact", {}).values()
        if isinstance(r, dict) and r["error"] <= WANTED_ERROR
    ]
    if precise:
        reached["exact inference"] = min(precise, key=median)
    return {
        what: {"wanted": TARGETS[what], "reached": median(times), "called": times["median"]}
        | ({"graph": times["graph"]["median"]} if "graph" in times else {})
        for what, times in reached.items()
    }


def summary(run: Run) -> Iterator[str]:
    """The report, line by line."""
    report = run.report
    yield "peaks a second: " + ", ".join(f"{name} {value:.3g}" for name, value in run.peak.items())
    yield "errors: " + ", ".join(f"{name} {value:.1e}" for name, value in report["errors"].items())
    yield from table(report)
    for what, r in report["targets"].items():
        graph = f"{1e3 * r['graph']:.2f}" if "graph" in r else "-"
        met = "met" if r["reached"] <= r["wanted"] else "missed"
        yield (
            f"{what}: called {1e3 * r['called']:.2f} / graph {graph} ms, "
            f"wanted {1e3 * r['wanted']:.0f} ms on an H200: {met}"
        )
    for what, message in report["failed"].items():
        yield f"FAILED: {what}: {message.strip()}"


def main() -> None:
    """Parse the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing new is begun")
    parser.add_argument("--interpret", action="store_true", help="a dry run on the CPU; its times mean nothing")
    default = Path(__file__).parent / "results" / "gpu.json"
    parser.add_argument("--out", type=Path, help=f"JSON with all figures; default: {default.name} in results/")
    arguments = parser.parse_args()
    if not (arguments.interpret or torch.cuda.is_available()):
        print("benchmarks/gpu.py needs a GPU, and torch sees none; --interpret makes a dry run without")
        return
    device, out = torch.device("cpu" if arguments.interpret else "cuda"), arguments.out
    if out is None and not arguments.interpret:
        out = default
    begun = time.perf_counter()
    run = Run(TINY if arguments.interpret else Plan(), device, arguments.budget, out)
    report = run.report
    try:
        with hard_end(arguments.budget + GRACE):
            report["environment"] = environment() | where(device)
            run.save()
            everything(run, arguments.interpret)
    except (Exception, Overdue) as error:  # between sections, or too late
        report["failed"]["run"] = f"{causes(error)}\n{traceback.format_exc()}"
    report["targets"] = verdicts(run)
    report["seconds"] = time.perf_counter() - begun
    run.save()
    print("\n".join(summary(run)))
    if report["failed"]:
        sys.exit(1)


@contextlib.contextmanager
def hard_end(seconds: float) -> Iterator[None]:
    """Raises `Overdue` in what goes on after so many seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Overdue(f"not over after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def where(device: torch.device) -> dict[str, object]:
    """The GPU and what drives it, and the date."""
    import triton

    named: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return named | {"device": named.get("device", "Triton's interpreter")}


if __name__ == "__main__":
    main()
