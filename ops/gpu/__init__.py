"""The Triton kernels behind the engines, for float32 tensors on a GPU: NVIDIA from Ampere on, AMD from CDNA3 on.

Nothing here is imported before a tensor needs it, so that a machine without Triton can do without. Which tensors do is
said by `serves` alone; the engines of plain PyTorch take all others, float64 on a GPU among them.
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

OLDEST = (3, 3)  # of Triton: the kernels use tuples, which 3.2, the one of torch 2.6, has not

_cpu_tensors = False


def serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels compute on such a tensor."""
    if tensor.dtype != torch.float32 or not (tensor.is_cuda or _cpu_tensors):
        return False
    if MISSING and not torch.compiler.is_compiling():
        _warn()
    return not MISSING


@contextmanager
def interpreted() -> Iterator[None]:
    """Within it the Triton kernels take float32 tensors on the CPU as well, in Triton's interpreter: for tests.

    Raises:
        RuntimeError: the environment variable TRITON_INTERPRET was not 1 when the kernels were imported.
    """
    global _cpu_tensors
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the interpreter needs the environment variable TRITON_INTERPRET=1 from the start")
    from .interpreter import fast_scans

    before, _cpu_tensors = _cpu_tensors, True
    try:
        with fast_scans():
            yield
    finally:
        _cpu_tensors = before


def capturing(tensor: Tensor) -> bool:
    """Whether what happens on the tensor's device is being captured in a CUDA graph; False while compiling."""
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def host_may_read(tensor: Tensor) -> bool:
    """Whether values may decide what the host does next: not in a graph being compiled, nor captured on a GPU."""
    return not (torch.compiler.is_compiling() or capturing(tensor))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it kernels start on the tensor's device; Triton starts them on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _missing() -> str:
    """Why the kernels cannot be had: that Triton is absent or too old; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = metadata.version("triton")
    old = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST
    return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}" if old else ""


MISSING = _missing()  # a constant, for the sake of those that compile graphs


@cache
def _warn() -> None:
    warnings.warn(f"{MISSING}: on the GPU crfnet computes in plain PyTorch, several times slower", stacklevel=3)
