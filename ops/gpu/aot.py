"""Kernels compiled ahead of time, for chips that need not be here, and what the compilers say of them.

A build is sound if it compiles, needs no more shared memory than its target has, keeps everything in registers (a spill
to local memory costs more than the kernels save), and has matrix instructions where they are meant to be.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .target import TARGETS, Build, Target

MODULES = ("exact", "lattice", "grid", "step")  # those with kernels; each says in ``builds(target)`` what it ships
POINTERS_DIVIDE_BY = 16  # bytes; torch's allocator gives 512, and views of whole rows are checked by the launcher


@dataclass(frozen=True)
class Report:
    """What became of one build.

    Attributes:
        kernel: module and name, "exact._filter_kernel".
        target: name of the chip.
        constants: compile-time arguments and options of the launch.
        ok: whether it is sound.
        why: what is wrong, or why something is not known; else empty.
        registers: of one thread; None where they cannot be read.
        spills: bytes of local memory of one thread; None where they cannot be read.
        shared: bytes of shared memory of one program.
        instructions: matrix instructions in it.
        seconds: that compiling took.
    """

    kernel: str
    target: str
    constants: dict[str, Any]
    ok: bool
    why: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    instructions: tuple[str, ...] = ()
    seconds: float = 0.0


def all_builds(target: Target) -> Iterator[Build]:
    """Every kernel in every configuration that ships for a target."""
    for name in MODULES:
        yield from importlib.import_module(f"{__package__}.{name}").builds(target)


def compile_all(targets: Iterable[str] = tuple(TARGETS), workers: int | None = None) -> list[Report]:
    """Compile all builds of the named targets in processes of their own, as many as there are cores unless told."""
    jobs = [(_named(build), name) for name in targets for build in all_builds(TARGETS[name])]
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(jobs)))
    # an empty cache, so that what is reported was compiled here and now; spawned, since torch's threads do not fork
    with tempfile.TemporaryDirectory() as cache:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, initializer=_prepare, initargs=(cache,)) as pool:
            return list(pool.map(_compile_named, jobs, chunksize=4))


def compile_build(build: Build, target: Target) -> Report:
    """Compile one build in this process, which must not have Triton's interpreter on."""
    constants = {**build.constants, **build.options}
    kernel = build.kernel.fn
    started = time.perf_counter()
    try:
        compiled = _compile(build, target)
    except Exception as error:  # whatever the compilers raise is what this report is for
        why = f"{type(error).__name__}: {_last_line(error)}"
        return Report(_short(kernel), target.name, constants, False, why, seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spills = _usage_of_cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers, spills = usage_of_amdgcn(text)
    instructions = matrix_instructions(text)
    faults = []
    if spills:
        faults.append(f"{spills} bytes of registers spilled")
    if compiled.metadata.shared > target.shared_memory:
        faults.append(f"{compiled.metadata.shared} bytes of shared memory, more than {target.shared_memory}")
    if build.matrix and not any(name.startswith(target.matrix_instruction) for name in instructions):
        faults.append(f"no {target.matrix_instruction} in it")
    why = "; ".join(faults) or ("registers not known: Triton came without cuobjdump" if registers is None else "")
    return Report(
        _short(kernel),
        target.name,
        constants,
        not faults,
        why,
        registers,
        spills,
        compiled.metadata.shared,
        instructions,
        seconds,
    )


def by_kernel(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Of each kernel and target, as plain values: greatest needs over all builds, instructions, seconds, faults."""
    groups: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        groups.setdefault((report.kernel, report.target), []).append(report)
    return [
        {
            "kernel": kernel,
            "target": target,
            "builds": len(group),
            "registers": _most(report.registers for report in group),
            "spills": _most(report.spills for report in group),
            "shared": _most(report.shared for report in group),
            "instructions": sorted({name for report in group for name in report.instructions}),
            "seconds": sum(report.seconds for report in group),
            "faults": [{"constants": report.constants, "why": report.why} for report in group if not report.ok],
        }
        for (kernel, target), group in groups.items()
    ]


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def matrix_instructions(assembly: str) -> tuple[str, ...]:
    """The different matrix instructions in PTX or in AMD's assembly, shapes and types included."""
    return tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async[.\w]*|mma\.sync[.\w]*|v_mfma\w*)", assembly))))


def usage_of_amdgcn(assembly: str) -> tuple[int, int]:
    """Registers of one thread, accumulators among them, and bytes of scratch memory.

    What the compiler calls spilled scalar registers are parked in lanes of vector registers, not in memory, and are
    not counted here; they show up in scratch memory once those run out too.
    """
    number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.M)}
    return number["vgpr_count"], max(number["private_segment_fixed_size"], 4 * number["vgpr_spill_count"])


def usage_of_cuobjdump(text: str) -> tuple[int, int]:
    """Registers of one thread and bytes of its stack, where spilled registers go; kernels without arrays have none."""
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return max(int(r) for r, _, _ in found), max(int(s) + int(local) for _, s, local in found)


def _usage_of_cubin(cubin: bytes) -> tuple[int | None, int | None]:
    specification = importlib.util.find_spec("triton")
    folder = Path(str(specification.origin)).parent if specification else Path()
    tool = folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return usage_of_cuobjdump(done.stdout)


def _compile(build: Build, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    if not isinstance(build.kernel, JITFunction):
        raise RuntimeError("kernels are in Triton's interpreter here; compile where TRITON_INTERPRET is not set")
    names = build.kernel.arg_names
    if unknown := sorted({*build.types, *build.constants} - set(names)):
        raise TypeError(f"the kernel has no arguments {unknown}")
    if missing := [name for name in names if name not in build.types and name not in build.constants]:
        raise TypeError(f"the build says nothing of {missing}")
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    aligned = {
        (position,): [["tt.divisibility", POINTERS_DIVIDE_BY]]
        for position, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(build.kernel, signature, dict(build.constants), attrs=aligned)
    chip = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=chip, options=dict(build.options))


def _named(build: Build) -> Build:
    """The build with its kernel by name, as another process can have it."""
    return replace(build, kernel=(build.kernel.fn.__module__, build.kernel.fn.__name__))


def _compile_named(job: tuple[Build, str]) -> Report:
    build, target = job
    module, name = build.kernel
    return compile_build(replace(build, kernel=getattr(importlib.import_module(module), name)), TARGETS[target])


def _prepare(cache: str) -> None:
    """In a process that compiles, before it knows Triton."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)  # whatever the parent does: here kernels are compiled


def _short(function: Any) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def _last_line(error: Exception) -> str:
    """The compiler's own words: its messages open with pages of source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
