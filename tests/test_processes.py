"""Processes that torchrun starts, or none: what a training is told of the others."""

import pytest
import torch

from crfnet.processes import start, world_size


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start("cpu") == torch.device("cpu") and world_size() == 1
    for wrong, message in (
        ("cuda:99", r"device must be there, got cuda:99 of \d+ GPUs"),
        ("gpu", "torch's, got 'gpu': "),
    ):
        with pytest.raises(ValueError, match=message):
            start(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="environment variable RANK expected"):
        start("cpu")


def test_a_gpu_is_named_with_its_number(monkeypatch):
    """``torch.cuda.set_device`` takes no device without one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [start(name) for name in ("cuda", "cuda:1")] == chosen == [torch.device("cuda", n) for n in (0, 1)]
    with pytest.raises(ValueError, match="got cuda:2 of 2 GPUs"):
        start("cuda:2")
