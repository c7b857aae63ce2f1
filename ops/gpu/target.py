"""The chips that kernels are built for, and how a kernel's build is described so that it can be made without a chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "fp16"]


@dataclass(frozen=True)
class Target:
    """One generation of GPUs.

    Attributes:
        name: as compilers call it.
        backend: Triton's name of the maker's compiler.
        warp_size: threads that step together.
        shared_memory: bytes that one program may have.
        matrix_instruction: how its matrix instructions begin in assembly; PTX for NVIDIA.
        float32_dot: Triton's ``input_precision`` for products that are float32 to the last bits.
    """

    name: str
    backend: Literal["cuda", "hip"]
    warp_size: int
    shared_memory: int
    matrix_instruction: str
    float32_dot: Literal["tf32x3", "ieee"]

    @property
    def arch(self) -> int | str:
        """As Triton's compiler wants it: 90, or "gfx942"."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name

    def dot(self, precision: Precision) -> str:
        """``input_precision`` of ``tl.dot`` on float32 operands; "fp16" operands have none and get the fastest."""
        return self.float32_dot if precision == "float32" else "tf32"


TARGETS = {
    target.name: target
    for target in (
        Target(
            "sm_80", "cuda", 32, 99 * 1024, "mma.sync", "tf32x3"
        ),  # the least of its line: consumer cards, sm_86 to 120
        Target("sm_90", "cuda", 32, 227 * 1024, "wgmma", "tf32x3"),
        Target("gfx942", "hip", 64, 64 * 1024, "v_mfma", "ieee"),
    )
}


@dataclass(frozen=True)
class Build:
    """A kernel in one configuration that ships: all that its compiler must know.

    Attributes:
        kernel: the function under ``triton.jit``.
        types: of its run-time arguments in order, in Triton's words: "*fp32", "i32".
        constants: its compile-time arguments.
        options: of the launch: ``num_warps``, and ``num_stages`` where loops are pipelined.
        matrix: whether matrix instructions are meant to be in it.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    matrix: bool = False


def target_of(tensor: Tensor) -> Target:
    """The target whose settings suit the tensor's device; Hopper's for the interpreter."""
    return _target(tensor.device.index or 0) if tensor.is_cuda else TARGETS["sm_90"]


@cache
def _target(index: int) -> Target:
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, _ = torch.cuda.get_device_capability(index)
    return TARGETS["sm_90" if major == 9 else "sm_80"]
