"""Every kernel that ships compiles for every chip, without one: what ``crfnet doctor --compile`` reports.

This process has Triton's interpreter on; kernels are compiled in others, which have not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crfnet import cli, doctor
from crfnet.ops.gpu import aot
from crfnet.ops.gpu.target import TARGETS, Build, Target

pytest.importorskip("triton", reason="nothing to compile with")

REPOSITORY = Path(__file__).resolve().parents[1]
every_build = aot.all_builds  # itself, whatever a test puts in its place

# Kernels made for the faults that a report must find, compiled for every chip; run as a script of its own.
TOYS = '''
import json, sys
from dataclasses import asdict
import triton
import triton.language as tl
from crfnet.ops.gpu.aot import compile_build
from crfnet.ops.gpu.target import TARGETS, Build

@triton.jit
def product_kernel(a, b, out, N, BLOCK: tl.constexpr, P: tl.constexpr):
    """BLOCK x BLOCK product, in a loop so that stages are buffered."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(N):
        x = tl.load(a + k * BLOCK * BLOCK + i * BLOCK + j)
        total += tl.dot(x, tl.load(b + k * BLOCK * BLOCK + i * BLOCK + j), input_precision=P)
    tl.store(out + i * BLOCK + j, total)

@triton.jit
def sum_kernel(a, b, out, N, BLOCK: tl.constexpr, P: tl.constexpr):
    """No matrix instruction in it."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + i) + tl.load(b + i))

@triton.jit
def greedy_kernel(a, b, out, N, BLOCK: tl.constexpr, P: tl.constexpr):
    """More sums than there are registers, all of them alive to the end."""
    i = tl.arange(0, BLOCK)
    x, y, z = tl.load(a + i), tl.load(a + i + BLOCK), tl.load(a + i + 2 * BLOCK)
    for k in range(N):
        w = tl.load(b + k)
        x, y, z = y * w + x, z * w + y, x * w + z
    tl.store(out + i, x + y + z)

@triton.jit
def wrong_kernel(a, b, out, N, BLOCK: tl.constexpr, P: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no such block")

def build(kernel, block, warps=4, stages=2, types=None, **more):
    types = types or {"a": "*fp32", "b": "*fp32", "out": "*fp32", "N": "i32"}
    return Build(kernel, types, {"BLOCK": block, "P": "tf32"}, {"num_warps": warps, "num_stages": stages}, **more)

def cases(target):
    return {
        "good": build(product_kernel, 64, matrix=True),
        "no_matrix": build(sum_kernel, 64, matrix=True),
        "spills": build(greedy_kernel, 16384 if target.warp_size == 64 else 4096, warps=1),
        "shared": build(product_kernel, 128, warps=8, stages=6, matrix=True),
        "wrong": build(wrong_kernel, 64),
        "missing": build(sum_kernel, 64, types={"a": "*fp32", "b": "*fp32", "out": "*fp32"}),
        "unknown": build(sum_kernel, 64, types={"a": "*i32", "b": "*i32", "out": "*i32", "N": "i32", "M": "i32"}),
    }

print(json.dumps({name: {case: asdict(compile_build(build, target)) for case, build in cases(target).items()}
                  for name, target in TARGETS.items()}))
'''


def run(*argv: str, folder: Path, timeout: int) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS)
    done = run("toys.py", folder=folder, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_reports_tell_good_builds_from_bad_ones(toys, target):
    report, chip = toys[target], TARGETS[target]
    good = report["good"]
    assert good["ok"] and good["why"] == "" and good["kernel"] == "__main__.product_kernel" and good["seconds"] > 0
    assert 16 <= good["registers"] <= 512 and good["spills"] == 0 and 0 < good["shared"] <= chip.shared_memory
    assert any(name.startswith(chip.matrix_instruction) for name in good["instructions"])
    assert not report["no_matrix"]["ok"] and report["no_matrix"]["why"] == f"no {chip.matrix_instruction} in it"
    assert not report["spills"]["ok"] and report["spills"]["spills"] > 0
    assert report["spills"]["why"] == f"{report['spills']['spills']} bytes of registers spilled"
    assert not report["wrong"]["ok"] and "no such block" in report["wrong"]["why"]
    assert "nothing of ['N']" in report["missing"]["why"] and "no arguments ['M']" in report["unknown"]["why"]


@pytest.mark.parametrize("target", TARGETS)
def test_reports_know_the_limit_of_shared_memory(toys, target):
    report, limit = toys[target]["shared"], TARGETS[target].shared_memory
    assert report["ok"] == (report["shared"] <= limit)
    assert report["ok"] or f"more than {limit}" in report["why"]


def test_some_chip_lacks_that_memory(toys):
    assert not all(toys[target]["shared"]["ok"] for target in TARGETS)


def traits(build: Build) -> set[tuple[str, object]]:
    return {*build.types.items(), *build.constants.items(), *build.options.items(), ("matrix", build.matrix)}


def extremes(builds: list[Build]) -> set[tuple[str, object]]:
    """The traits that occur; of those that are numbers the least, the greatest, and the features of a colour pixel."""
    found = set().union(*map(traits, builds))
    numbers = {}
    for name, value in found:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.setdefault(name, set()).add(value)
    middle = {(name, value) for name, values in numbers.items() for value in values - {min(values), max(values)}}
    return found - middle | ({("D", 5)} & found)


def few_builds(target: Target) -> list[Build]:
    """Of each kernel so many that every extreme occurs; `make test-builds` takes ten minutes for all there are.

    Of builds that have as many new ones, that of the largest numbers: it needs the most registers and shared memory.
    """
    kernels, chosen = {}, []
    for build in every_build(target):
        kernels.setdefault(build.kernel.fn, []).append(build)
    for builds in kernels.values():
        missing = extremes(builds)
        while missing:
            new = [traits(build) & missing for build in builds]
            sizes = [sum(value for _, value in part if isinstance(value, (int, float))) for part in new]
            best = max(range(len(builds)), key=lambda k: (len(new[k]), sizes[k]))  # noqa: B023
            chosen.append(builds[best])
            missing -= new[best]
    return chosen


def test_few_builds_have_every_kernel_and_every_extreme():
    for target in TARGETS.values():
        some, everything = few_builds(target), list(every_build(target))
        assert len(some) < len(everything) / 4
        assert {build.kernel.fn for build in some} == {build.kernel.fn for build in everything}
        for kernel in {build.kernel.fn for build in everything}:
            of_it = [[build for build in group if build.kernel.fn is kernel] for group in (some, everything)]
            assert extremes(of_it[0]) == extremes(of_it[1])


def test_what_ships(monkeypatch, capsys):
    """The command, in a process that has the interpreter on: it compiles all the same."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(aot, "all_builds", few_builds)
    status = cli.main(["doctor", "--compile", "--json"])
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    faults = {f"{k['kernel']} {k['target']}": k["faults"] for k in kernels if k["faults"]}
    assert faults == {}
    assert {kernel["target"] for kernel in kernels} == set(TARGETS)
    for target in TARGETS:
        modules = {kernel["kernel"].split("_")[0].split(".")[0] for kernel in kernels if kernel["target"] == target}
        assert {"exact", "lattice", "grid", "step"} <= modules
    assert all(kernel["spills"] == 0 and kernel["builds"] > 0 for kernel in kernels)
    assert status == 0


def faulty(targets):
    reports = [
        aot.Report("exact.f_kernel", "sm_90", {"C": 16}, True, "", 100, 0, 1024, ("wgmma.mma_async.x",), 0.5),
        aot.Report("exact.f_kernel", "sm_90", {"C": 128}, False, "8 bytes of registers spilled", 255, 8, 4096, (), 0.5),
        aot.Report("grid.g_kernel", "gfx942", {}, True, "", 40, 0, 0, ()),
    ]
    return [report for report in reports if report.target in targets]


def test_the_command_tells_of_faults(monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile_all", faulty)
    monkeypatch.setattr(doctor, "LIMITS", {})
    assert cli.main(["doctor", "--compile"]) == 1
    heard = capsys.readouterr().out
    assert (
        "BROKEN kernel exact.f_kernel for sm_90: 2 builds, at most 255 registers, 8 bytes spilled, 4 KiB shared, "
        "wgmma.mma_async.x\n       {'C': 128}: 8 bytes of registers spilled\n" in heard
    )
    assert "ok     kernel grid.g_kernel for gfx942: 1 build, 40 registers, 0 bytes spilled, 0 KiB shared\n" in heard
    assert heard.endswith("something is broken: see above\n")
    assert cli.main(["doctor", "--compile", "gfx942"]) == 0
    heard = capsys.readouterr().out
    assert "for sm_90:" not in heard and heard.endswith("everything works\n")


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "MISSING", "Triton is not installed")
    monkeypatch.setattr(doctor, "LIMITS", {})
    assert cli.main(["doctor", "--compile", "sm_80"]) == 1
    assert "BROKEN kernels for sm_80: nothing compiled: Triton is not installed" in capsys.readouterr().out


def test_a_chip_that_is_not_built_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--compile", "sm_35"])
    assert stopped.value.code == 2 and "sm_80" in capsys.readouterr().err


def test_doctor_alone_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile_all", lambda targets: pytest.fail("nobody asked"))
    monkeypatch.setattr(doctor, "LIMITS", {})
    assert cli.main(["doctor", "--json"]) == 0
    assert "kernels" not in json.loads(capsys.readouterr().out)


def test_resources_are_read_as_the_tools_print_them():
    printed = " Function f:\n  REG:73 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert aot.usage_of_cuobjdump(printed) == (73, 24)
    listed = "    .private_segment_fixed_size: 12\n    .vgpr_count:     212\n    .vgpr_spill_count: 5\n"
    assert aot.usage_of_amdgcn(listed) == (212, 20)


@pytest.mark.gpu
def test_this_device_is_one_of_the_chips():
    devices = [device for device in doctor.examine()["devices"] if device["name"] != "cpu"]
    assert len(devices) == torch.cuda.device_count() > 0
    assert all(device["kernels"] in TARGETS for device in devices)
