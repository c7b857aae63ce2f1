# mypy: allow-untyped-defs, allow-incomplete-defs
"""How many powers of two a GPU computes: the kernel alone, in a file of its own since Triton is imported late."""

import triton
import triton.language as tl


@triton.jit
def exp2_kernel(out, times, BLOCK: tl.constexpr):
    """``times`` powers of two for each of BLOCK numbers a program, one after another, in registers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (i % 1024).to(tl.float32) * -1e-3
    for _ in range(times):
        x = tl.exp2(x - 1.0)
    tl.store(out + i, x)
