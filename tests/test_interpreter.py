"""The interpreter's scans in a few steps against Triton's own, which take every element by itself."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from crfnet.ops.gpu.interpreter import fast_scans  # noqa: E402


@triton.jit
def later(key, total, next_key, next_total):
    return next_key, next_total + tl.where(key == next_key, total, 0.0)


@triton.jit
def scan_kernel(keys, values, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    _, total = tl.associative_scan((tl.load(keys + at), tl.load(values + at)), AXIS, later)
    tl.store(out + at, total)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("rows", "columns", "axis"), [(1, 4, 0), (2, 2, 0), (16, 2, 0), (2, 16, 1), (8, 1, 0)])
def test_scans_are_triton_s_own(rows, columns, axis):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 4, (rows, columns), generator=generator).sort(axis).values.int()
    values = torch.randint(-9, 9, (rows, columns), generator=generator).float()  # whole: no order rounds

    def scanned() -> torch.Tensor:
        out = torch.full_like(values, torch.nan)
        scan_kernel[(1,)](keys, values, out, ROWS=rows, COLUMNS=columns, AXIS=axis)
        return out

    wanted = scanned()
    with fast_scans():
        assert torch.equal(scanned(), wanted)
    assert wanted.isfinite().all()
