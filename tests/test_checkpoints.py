"""Checkpoints: whole or absent, the newest few, and none lost to a damaged file or a full disk."""

import numpy as np
import pytest
import torch

from crfnet import checkpoints
from crfnet.checkpoints import existing, newest, write


def state(value: float) -> dict:
    return {"network": {"weight": torch.full((3000,), value)}, "losses": [value], "best": None}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_few_stay_and_come_back(tmp_path):
    folder = tmp_path / "made" / "for it"
    assert newest(folder) is None
    for iteration in (5, 10, 100_000_000):  # by number, not by name
        path = write(folder, iteration, state(iteration))
    assert names(folder) == ["iteration-00000010.pt", "iteration-100000000.pt"]
    assert [p.name for p in existing(folder)] == names(folder) and path == existing(folder)[-1]
    got = newest(folder)
    assert got["iteration"] == 100_000_000 and got["losses"] == [1e8] and got["best"] is None
    assert torch.equal(got["network"]["weight"], state(1e8)["network"]["weight"])
    write(folder, 100_000_001, state(1.0), keep=1)
    assert names(folder) == ["iteration-100000001.pt"]
    with pytest.raises(ValueError, match="keep must be"):
        write(folder, 7, state(1.0), keep=0)


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_file_cut_short_is_passed_over_with_a_warning(tmp_path, left):
    for iteration in (1, 2, 3):
        path = write(tmp_path, iteration, state(iteration), keep=3)
    whole = path.read_bytes()
    for cut in (path, path.with_name("iteration-00000002.pt")):
        cut.write_bytes(whole[: int(left * len(whole))])
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert newest(tmp_path)["iteration"] == 1
    assert [str(path.name) in str(w.message) for w in caught] == [True, False]
    path.with_name("iteration-00000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of its 3 checkpoints can be read"):
        newest(tmp_path)


def test_a_damaged_newer_file_is_no_reason_to_remove_a_whole_one(tmp_path):
    write(tmp_path, 20, state(20.0))
    (tmp_path / "iteration-00000030.pt").write_bytes(b"cut short")
    write(tmp_path, 25, state(25.0), keep=1)  # goes on from 20, with another interval
    with pytest.warns(UserWarning, match="00000030.pt: cannot be read"):
        assert newest(tmp_path)["iteration"] == 25


@pytest.mark.parametrize("limit", [100, 5_000, 399_000, 400_900])  # bytes: in the header, in the tensor, in the index
def test_a_full_disk_leaves_what_was_there(tmp_path, limit):
    resource = pytest.importorskip("resource")
    write(tmp_path, 1, state(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the system then refuses, as of a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, 2, {"weight": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["iteration-00000001.pt"]
    assert newest(tmp_path)["losses"] == [1.0]


def test_what_would_not_load_is_refused_when_it_is_written(tmp_path):
    write(tmp_path, 1, state(1.0), keep=1)
    with pytest.raises(ValueError, match="tensors, numbers and texts alone.*numpy"):
        write(tmp_path, 2, {"score": np.float64(0.5)}, keep=1)
    assert names(tmp_path) == ["iteration-00000001.pt"]


def test_what_a_killed_run_left_goes_and_all_else_stays(tmp_path):
    for name in (".0123456789abcdef.tmp", ".hidden", "log.csv", "notes.tmp", "iteration-last.pt"):
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path, 1, state(1.0))
    assert names(tmp_path) == [".hidden", "iteration-00000001.pt", "iteration-last.pt", "log.csv", "notes.tmp"]


def test_random_numbers_go_on_where_they_were():
    torch.manual_seed(3)
    before = checkpoints.random_state()
    drawn = torch.rand(5)
    checkpoints.set_random_state(before)
    assert torch.equal(torch.rand(5), drawn)
