"""What every test gets: Triton's interpreter without a GPU, one way to round, and real images where they are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports triton or starts cuBLAS, hence at import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from hypothesis import settings  # noqa: E402

# The same examples on every run, and no deadline: a shared machine is slow at times.
settings.register_profile("crfnet", derandomize=True, deadline=None)
settings.load_profile("crfnet")

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # reading torch.empty gives NaN, not luck
# Two threads, or where pytest-xdist has started several processes no more than there are cores for each.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(2, max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available():  # what the interpreter plays elsewhere
            if item.path.name in ("test_gpu.py", "test_gpu_exact.py", "test_gpu_lattice.py", "test_step.py"):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Triton's kernels on tensors of the CPU; where there is a GPU, only with TRITON_INTERPRET=1."""
    from crfnet.ops.gpu import interpreted

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs in Triton's interpreter, which TRITON_INTERPRET=1 turns on")
    with interpreted():
        yield


@pytest.fixture
def device() -> Iterator[str]:
    """Where float32 tensors go to the Triton kernels: a GPU, without one the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    from crfnet.ops.gpu import interpreted

    if torch.cuda.is_available():
        yield "cuda"
    else:
        with interpreted():
            yield "cpu"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real images: the variable CRFNET_DATA, or ``../shared/data`` beside the checkout."""
    repository = Path(__file__).resolve().parents[1]
    root = Path(os.environ.get("CRFNET_DATA", repository.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real images are not at {root}; CRFNET_DATA names their folder")
    return root
