"""A run's folder remembers its settings."""

import json
import sys
from dataclasses import dataclass, replace

import pytest

from crfnet.runs import begin
from crfnet.tuning import Grid


@dataclass(frozen=True)
class Config:
    out: str
    resume: bool = False
    seed: int = 0
    crop: tuple[int, int] = (3, 4)
    grid: Grid = Grid()
    workers: int = 0


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    config = Config(out=str(tmp_path / "new"))
    assert begin(config) == tmp_path / "new"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["crop"] == [3, 4]
    begin(replace(config, resume=True, workers=3))  # what changes no result may differ
    other = replace(config, resume=True, seed=1, crop=(3, 5), grid=replace(config.grid, rounds=7))
    with pytest.raises(ValueError, match=r"crop \[3, 4\] then and \[3, 5\] now; grid .*; seed 0 then and 1 now"):
        begin(other)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["seed"] == 0
    begin(replace(other, resume=False))  # another run begins anew
    begin(other)
    with pytest.raises(ValueError, match="crop .*; seed 1 then and 0 now"):
        begin(config_again := replace(config, resume=True), free=("grid",))
    begin(config_again, free=("crop", "grid", "seed"))


def test_a_start_that_forgets_resume_touches_nothing_of_the_run_before(tmp_path):
    config = Config(out=str(tmp_path))
    begin(config)
    (tmp_path / "dcnn").mkdir()
    (tmp_path / "dcnn" / "iteration-00000002.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iteration-00000002\.pt is of a run before: resume goes on from it"):
        begin(replace(config, seed=1))
    begin(replace(config, resume=True))  # the settings are still its own
    begin(config, stages=("joint",))  # a run of other stages goes beside it


def test_the_library_of_the_networks_is_wanted_before_hours_of_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'crfnet\[weights\]'"):
        begin(Config(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    begin(Config(out=str(tmp_path / "run")), networks=False)


def test_settings_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is no JSON"):
        begin(Config(out=str(tmp_path), resume=True))
    begin(Config(out=str(tmp_path / "else"), resume=True))  # nothing there yet: it begins
