"""benchmarks/gpu.py as a dry run: every section of it, at tiny sizes, in Triton's interpreter."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"


def run(*options: str, program: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(SCRIPT.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


# Twenty pixels in place of the dry run's own 77, for which the interpreter takes more than twice as long.
SMALL = "gpu.TINY = gpu.Plan(((5, 4), (4, 4)), (3,), 1, 1, 8, (1.5e-5, 3e-5), 8)"


def run_patched(patch: str, out: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """A dry run of few pixels, after some lines of Python that break something, and its report."""
    code = f"import _device, _gpu_check, gpu, math, time\n{SMALL}\n{patch}\ngpu.main()"
    done = run("--interpret", "--out", str(out), *options, program=("-c", code))
    assert [path.name for path in out.parent.iterdir()] == [out.name], done.stdout + done.stderr
    return done, json.loads(out.read_text())


@pytest.fixture
def device():
    """benchmarks/_device.py."""
    spec = importlib.util.spec_from_file_location("_device", SCRIPT.with_name("_device.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the interpreter is Triton's")


@needs_triton
def test_dry_run(tmp_path):
    done, report = run_patched("", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["skipped"] == [] and report["failed"] == {} and report["seconds"] > 0
    sections = {"environment", "peaks", "errors", "networks", "exact", "dense", "stages", "growth", "tuned"}
    assert sections | {"brute force", "all gradients", "cpu", "targets"} <= set(report)
    assert report["errors"]["lattice message"] > report["errors"]["exact tf32"] > 0
    assert all(
        network["inference"]["median"] > 0 < network["training"]["floor"] for network in report["networks"].values()
    )
    assert {"lattice inference", "lattice training", "exact inference"} == set(report["targets"])
    assert {"step", "step backward", "step and its backward"} <= set(report["stages"]["5x4x3"])
    assert set(report["cpu"]) == {"5x4x3", "4x4x3"}
    assert set(report["environment"]) >= {"commit", "device", "triton", "torch", "date"}
    assert "lattice inference 5x4x3" in done.stdout


@needs_triton
def test_no_time_means_no_sections(tmp_path):
    done = run("--interpret", "--budget", "0", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "exact" in report["skipped"] and report["networks"] == {} and "no time for: " in done.stdout


@needs_triton
def test_failed_check_lists_all_and_leaves_a_file(tmp_path):
    patch = "_gpu_check.relative_error = lambda *_: math.nan\n_gpu_check.stepped = None"
    done, report = run_patched(patch, tmp_path / "gpu.json")
    assert done.returncode == 1
    assert report["networks"] == report["cpu"] == {} and "exact" not in report and report["peaks"]["bytes"] > 0
    assert report["errors"]["exact fp16 by its bound"] <= 1 and set(report["failed"]) == {"errors"}
    limits = ("exact tf32: error nan", "exact float32 gradient: ", "lattice message: ", "grid: ", "'NoneType' object")
    for what in limits:
        assert what in report["failed"]["errors"] and what in done.stdout
    assert "more than 1.0e+00" not in report["failed"]["errors"]  # what is within its limit is not listed


@needs_triton
def test_failed_peak_leaves_errors_and_times_without_floors(tmp_path):
    patch = """
def no_peaks(clock, found):
    found["bytes"] = 1e9
    raise ZeroDivisionError("no clock")
def stop(*_):
    raise KeyError("no such section")
gpu.peaks = no_peaks
for section in ("exact", "dense", "growth", "tuned", "alternatives", "all_gradients", "stages"):
    setattr(gpu, section, stop)
"""
    done, report = run_patched(patch, tmp_path / "gpu.json")
    assert done.returncode == 1 and "no clock" in report["failed"]["peaks"] and "no clock" in done.stdout
    assert report["peaks"] == {"bytes": 1e9} and report["errors"]["grid"] < 1e-5
    assert {"exact", "stages/4x4x3"} <= set(report["failed"]) and "networks/5x4x3" not in report["failed"]
    assert report["networks"]["5x4x3"]["training"].keys() == {"median", "min", "max", "repeats", "peak_bytes"}


@needs_triton
def test_hard_end(tmp_path):
    """What never ends by itself; the versions, which take a while to find, are given."""
    patch = "gpu.GRACE = 0.5\ngpu.environment = lambda: {'commit': ''}\n"
    patch += "gpu.inference = lambda *_: lambda: time.sleep(10**6)"
    done, report = run_patched(patch, tmp_path / "gpu.json", "--budget", "0.5")
    assert done.returncode == 1 and report["seconds"] >= 1
    assert "not over after 1 seconds" in report["failed"]["run"] and "commit" in report["environment"]


def test_failed_capture_restores_the_stream_and_tells_why(device, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def capture(graph, stream):
        torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            raise RuntimeError("cannot end the capture")

    calls, streams, default = [], [], Stream()

    def function():
        calls.append(streams[-1:])
        if len(calls) > 2:
            raise ValueError("the reason")

    stand_ins = {"current_stream": lambda: default, "set_stream": streams.append, "Stream": Stream, "graph": capture}
    stand_ins |= {"stream": lambda _: contextlib.nullcontext(), "CUDAGraph": object}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    failed = device.Clock(torch.device("cpu")).replayed(function)["graph_failed"]
    assert failed == "RuntimeError: cannot end the capture\nafter ValueError: the reason"
    assert len(calls) == 3 and len(streams) == 2 and streams[-1] is default


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 0 and "needs a GPU" in done.stdout and "--interpret" in done.stdout
