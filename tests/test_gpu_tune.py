"""Autotuning, with a device and a clock made up: what each candidate would take is said by the test."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from crfnet.ops.gpu import tune

triton_errors = pytest.importorskip("triton.runtime.errors")

CANDIDATES = [{"BLOCK": 64, "num_warps": 4}, {"BLOCK": 128, "num_warps": 8}, {"BLOCK": 32, "num_warps": 4}]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A device on which candidates take ``seconds`` by their BLOCK, and each launch ``compiling`` more of our time."""
    machine = SimpleNamespace(seconds={64: 3.0, 128: 2.0, 32: 4.0}, broken=set(), compiling=0.0, time=0.0, runs=[])

    def run(config):
        machine.runs.append(config["BLOCK"])
        machine.time += machine.compiling
        if config["BLOCK"] in machine.broken:
            raise triton_errors.OutOfResources(300_000, 232_448, "shared memory")

    def seconds(run, config):
        run(config)
        return machine.seconds[config["BLOCK"]]

    machine.run, machine.file = run, tmp_path / "crfnet" / "autotune.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_may_choose", lambda tensor: True)
    monkeypatch.setattr(tune, "_device", lambda tensor: "made up")
    monkeypatch.setattr(tune, "_busy", lambda: False)
    monkeypatch.setattr(tune, "_seconds", seconds)
    monkeypatch.setattr(tune, "_now", lambda: machine.time)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_on", False)
    return machine


def choose(machine, key=(5, 21), candidates=CANDIDATES):
    return tune.pick("filter", key, candidates, machine.run, torch.empty(0))


def test_off_means_the_default_and_no_launch(machine):
    assert choose(machine) == CANDIDATES[0] and machine.runs == [] and not machine.file.exists()


def test_the_fastest_is_chosen_once_and_kept(machine, monkeypatch):
    with tune.autotuning():
        assert choose(machine) == CANDIDATES[1]
        assert sorted(set(machine.runs)) == [32, 64, 128]
        machine.runs.clear()
        assert choose(machine) == CANDIDATES[1] and machine.runs == []  # from memory
        monkeypatch.setattr(tune, "_chosen", {})  # another process
        assert choose(machine) == CANDIDATES[1] and machine.runs == []  # from the file
        machine.seconds = {64: 1.0, 128: 2.0, 32: 4.0}
        assert choose(machine, key=(5, 300)) == CANDIDATES[0]  # another key is another question
        with tune.autotuning(False):
            assert choose(machine) == CANDIDATES[0]
    assert choose(machine) == CANDIDATES[0]  # off again
    assert json.loads(machine.file.read_text()) == {
        "made up": {"filter (5, 21)": CANDIDATES[1], "filter (5, 300)": CANDIDATES[0]}
    }
    assert [path.name for path in machine.file.parent.iterdir()] == ["autotune.json"]  # no scraps


def test_a_gain_within_the_noise_is_none(machine):
    machine.seconds = {64: 1.0, 128: 0.99, 32: 1.5}
    with tune.autotuning():
        assert choose(machine) == CANDIDATES[0]


def test_candidates_that_do_not_fit_are_left_out(machine):
    machine.broken = {128}
    with tune.autotuning():
        assert choose(machine) == CANDIDATES[0]
        machine.broken = {64, 128}
        assert choose(machine, key=(1,)) == CANDIDATES[2]
        machine.broken = {32, 64, 128}
        with pytest.raises(RuntimeError, match=r"filter for \(2,\) cannot be launched.*BLOCK.*shared memory"):
            choose(machine, key=(2,))


def test_faults_other_than_the_compilers_are_not_swallowed(machine):
    def run(config):
        raise RuntimeError("an illegal memory access was encountered")

    with tune.autotuning(), pytest.raises(RuntimeError, match="illegal memory access"):
        tune.pick("filter", (), CANDIDATES, run, torch.empty(0))


def test_the_budget_ends_it(machine):
    machine.compiling = 0.6 * tune.BUDGET  # the third candidate is not begun, nor a second round
    with tune.autotuning():
        assert choose(machine) == CANDIDATES[1]
    assert machine.runs == [64, 128, 64, 128]


@pytest.mark.parametrize("held", ["", "{", "[1, 2]", '{"made up": 3}', '{"made up": {"filter (5, 21)": 7}}'])
def test_a_damaged_file_is_said_and_replaced(machine, held):
    machine.file.parent.mkdir()
    machine.file.write_text(held)
    with tune.autotuning(), pytest.warns(UserWarning, match="not read"):
        assert choose(machine) == CANDIDATES[1]
    assert json.loads(machine.file.read_text())["made up"] == {"filter (5, 21)": CANDIDATES[1]}


def test_a_folder_that_cannot_be_written_is_said(machine):
    machine.file.parent.write_text("a file where the folder should be")
    with tune.autotuning(), pytest.warns(UserWarning, match="not read"), pytest.warns(UserWarning, match="not kept"):
        assert choose(machine) == CANDIDATES[1]
        assert choose(machine) == CANDIDATES[1]  # and is remembered all the same
    assert machine.runs.count(64) == 1 + tune.ROUNDS


def test_what_no_longer_ships_is_measured_anew_and_others_are_kept(machine):
    machine.file.parent.mkdir()
    old = {
        "made up": {"filter (5, 21)": {"BLOCK": 7}, "other (1,)": {"BLOCK": 1}},
        "another device": {"x ()": {"A": 1}},
    }
    machine.file.write_text(json.dumps(old))
    with tune.autotuning():
        assert choose(machine) == CANDIDATES[1]
    held = json.loads(machine.file.read_text())
    assert held["made up"] == {"filter (5, 21)": CANDIDATES[1], "other (1,)": {"BLOCK": 1}}
    assert held["another device"] == old["another device"]


def test_nothing_is_measured_while_a_graph_is_captured(machine, monkeypatch):
    with tune.autotuning():
        monkeypatch.setattr(tune, "_busy", lambda: True)
        assert choose(machine) == CANDIDATES[0] and machine.runs == []
        monkeypatch.setattr(tune, "_busy", lambda: False)
        assert choose(machine) == CANDIDATES[1]
        monkeypatch.setattr(tune, "_busy", lambda: True)
        assert choose(machine) == CANDIDATES[1]  # what is known may be used


def test_when_it_must_not_choose(monkeypatch):
    """Here, with the real conditions: on the CPU, which is the interpreter, and in deterministic mode."""
    on_gpu = SimpleNamespace(is_cuda=True)
    assert not tune._may_choose(torch.empty(0))
    assert torch.are_deterministic_algorithms_enabled() and not tune._may_choose(on_gpu)
    torch.use_deterministic_algorithms(False)
    try:
        assert tune._may_choose(on_gpu)
    finally:
        torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert tune._busy()


def test_when_off_nothing_is_asked(machine, monkeypatch):
    """Neither the tensor nor the device nor the file: every launch of a kernel passes here."""
    for name in ("_may_choose", "_device", "_known", "_busy", "_fastest", "_write"):
        monkeypatch.setattr(tune, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    assert choose(machine) == CANDIDATES[0] and machine.runs == []


@pytest.mark.gpu
def test_the_clock_of_a_device(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = torch.randn(1024, 1024, device="cuda")
    begun = time.perf_counter()
    times = [tune._seconds(lambda config: [x @ x for _ in range(config["n"])], {"n": n}) for n in (1, 1, 256)]
    assert 0 < times[1] < times[2] < time.perf_counter() - begun  # more work is more seconds, and no other unit
    assert tune._device(x).startswith(torch.cuda.get_device_name())
