"""benchmarks/networks.py as a dry run: two modes of two networks, one of which cannot be trained on a single pixel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "networks.py"


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path_factory.mktemp("networks") / "networks.json"
    options = ("--device=cpu", "--size=1", "--repeats=2", "--threads=1", "--channels-last", "--autocast=bfloat16")
    command = [sys.executable, str(SCRIPT), *options, f"--out={out}", "--only", "DeepLabV1-4x4", "DeepLabV1-largefov"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert [path.name for path in out.parent.iterdir()] == [out.name], done.stdout + done.stderr
    return done, json.loads(out.read_text())


def test_both_modes_are_checked_and_measured(dry_run):
    done, report = dry_run
    assert report["settings"]["modes"]["fast"] == {"channels_last": True, "autocast": "bfloat16", "compile": False}
    assert set(report["environment"]) >= {"commit", "cpu", "threads", "torch"}
    plain, fast = (report["networks"]["DeepLabV1-largefov"][mode] for mode in ("plain", "fast"))
    assert plain["error"] == 0 < fast["error"] <= report["settings"]["tolerance"]["bfloat16"]
    for row in (plain, fast):
        assert row["parameters"] == 20505429 and row["crop"] == 1
        for part in ("inference", "training"):
            times = row[part]
            assert 0 < times["min"] <= times["median"] <= times["max"] and times["repeats"] == 2
            assert times["per_second"] == pytest.approx(1 / times["median"])
            if Path("/proc/self/status").exists():
                assert 0 < row["idle_mib"] < times["peak_mib"]
    for text in (
        "| DeepLabV1-largefov | 20.5 | plain |",
        "| DeepLabV1-largefov | 20.5 | fast |",
        "not ours",
        "frames/s",
    ):
        assert text in done.stdout


def test_a_network_that_fails_is_recorded_and_the_others_go_on(dry_run):
    done, report = dry_run
    assert done.returncode == 1 and "FAILED: DeepLabV1-4x4, plain" in done.stdout
    assert set(report["failed"]) == {"DeepLabV1-4x4/plain", "DeepLabV1-4x4/fast"}
    assert "crops of 8 k + 2 pixels, got 1" in report["failed"]["DeepLabV1-4x4/plain"]
    assert report["networks"]["DeepLabV1-4x4"] == {} and set(report["networks"]["DeepLabV1-largefov"]) == {
        "plain",
        "fast",
    }
