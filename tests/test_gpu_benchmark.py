"""benchmarks/gpu.py as a dry run: every section of it, at tiny sizes, in Triton's interpreter."""

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


def run(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True, timeout=300
    )


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the interpreter is Triton's")


@needs_triton
def test_dry_run(tmp_path):
    done = run("--interpret", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["skipped"] == [] and report["failed"] == {}
    sections = {"environment", "peaks", "errors", "networks", "exact", "dense", "stages", "growth", "tuned"}
    assert sections | {"brute force", "all gradients", "cpu", "targets"} <= set(report)
    assert report["errors"]["lattice message"] > report["errors"]["exact tf32"] > 0
    assert all(
        network["inference"]["median"] > 0 < network["training"]["floor"] for network in report["networks"].values()
    )
    assert {"lattice inference", "lattice training", "exact inference"} == set(report["targets"])
    assert set(report["environment"]) >= {"commit", "device", "triton", "torch", "date"}
    assert "lattice inference 11x7x3" in done.stdout


@needs_triton
def test_no_time_means_no_sections(tmp_path):
    done = run("--interpret", "--budget", "0", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "exact" in report["skipped"] and report["networks"] == {} and "no time for: " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 0 and "needs a GPU" in done.stdout and "--interpret" in done.stdout
