"""What is installed, and whether every engine computes here what its definition says: behind ``crfnet doctor``.

`examine` does that; `compile_kernels` builds the GPU kernels for every chip they ship for, which needs none of them.
"""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crfnet
from crfnet.ops import GridFilter, gaussian_filter, reference
from crfnet.ops.gpu import MISSING, serves
from crfnet.ops.gpu.target import TARGETS, target_of

PACKAGES = ("torch", "triton", "numpy", "scipy", "pillow", "safetensors", "protobuf", "tqdm", "tyro")

# Relative L2 error of a normalised message that is allowed. The exact engines round in float32 and skip what lies below
# their tolerance, 3e-4 by default; the lattice is an approximation, 1 to 3 % off on this problem.
LIMITS = {"exact": 1e-3, "lattice": 0.06, "auto": 0.06, "grid": 1e-4}
SIDE = 24


def examine() -> dict[str, Any]:
    """Versions, devices and a check of each engine on each device, as plain values; ``healthy`` if nothing is wrong."""
    devices = [{"name": "cpu", "model": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        model = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        kernels = target_of(torch.empty(0, device=f"cuda:{index}")).name
        devices.append({"name": f"cuda:{index}", "model": model, "kernels": kernels})
    checks = [_check(engine, device["name"]) for device in devices for engine in LIMITS]
    return {
        "crfnet": crfnet.__version__,
        "folder": str(Path(crfnet.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "devices": devices,
        "engines": checks,
        "healthy": all(check["ok"] for check in checks),
    }


def describe(report: dict[str, Any]) -> str:
    """The report of `examine` for people to read."""
    packages = ", ".join(f"{name} {version or 'absent'}" for name, version in report["packages"].items())
    lines = [
        f"crfnet {report['crfnet']} in {report['folder']}",
        f"Python {report['python']} on {report['platform']}",
        packages,
        f"{report['threads']} torch threads, {report['processors']} processors",
        *(
            f"device {device['name']}: {device['model']}" + (f", kernels for {kernels}" if kernels else "")
            for device in report["devices"]
            for kernels in [device.get("kernels")]
        ),
    ]
    for check in report["engines"]:
        found = (
            f"relative error {check['error']:.1e}, allowed {check['limit']:.0e}"
            if "error" in check
            else check["reason"]
        )
        by = " in Triton" if check.get("triton") else ""
        lines.append(f"{_verdict(check['ok'])} engine {check['engine']} on {check['device']}{by}: {found}")
    for kernel in report.get("kernels", ()):
        lines += _lines_of_kernel(kernel)
    lines.append("everything works" if report["healthy"] else "something is broken: see above")
    return "\n".join(lines)


def compile_kernels(targets: Sequence[str] = tuple(TARGETS)) -> dict[str, Any]:
    """What compiling every kernel that ships for the targets gives, kernel by kernel; ``healthy`` if all is well."""
    if MISSING:
        reason = f"nothing compiled: {MISSING}"
        return {"kernels": [{"target": name, "reason": reason} for name in targets], "healthy": False}
    from crfnet.ops.gpu import aot

    reports = aot.compile_all(targets)
    return {"kernels": aot.by_kernel(reports), "healthy": all(report.ok for report in reports)}


def _lines_of_kernel(kernel: dict[str, Any]) -> list[str]:
    if "reason" in kernel:
        return [f"{_verdict(False)} kernels for {kernel['target']}: {kernel['reason']}"]
    known = kernel["registers"] is not None
    need = f"{kernel['registers']} registers, {kernel['spills']} bytes spilled" if known else "registers not known"
    shared = f"{(kernel['shared'] or 0) / 1024:.0f} KiB shared"
    instructions = "".join(f", {name}" for name in kernel["instructions"])
    builds = "1 build," if kernel["builds"] == 1 else f"{kernel['builds']} builds, at most"
    place = f"{_verdict(not kernel['faults'])} kernel {kernel['kernel']} for {kernel['target']}"
    first = f"{place}: {builds} {need}, {shared}{instructions}"
    return [first, *(f"       {fault['constants']}: {fault['why']}" for fault in kernel["faults"])]


def _verdict(ok: bool) -> str:
    return "ok    " if ok else "BROKEN"


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)  # with the kind of build, which the metadata may lack
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check(engine: str, device: str) -> dict[str, Any]:
    """Filter a small picture with one engine and compare with the definition in float64."""
    check: dict[str, Any] = {"engine": engine, "device": device, "limit": LIMITS[engine]}
    axis = torch.arange(SIDE, dtype=torch.float32)
    position = torch.cartesian_prod(axis, axis)  # (N, 2)
    colour = torch.stack([10 * position[:, 0], 10 * position[:, 1], 200.0 * (position[:, 0] > position[:, 1])], 1)
    features = torch.cat([position / 8, colour / 40], 1) if engine != "grid" else position / 3
    values = torch.stack([position[:, 0] > SIDE / 2, position[:, 1] > SIDE / 3], 1).float()
    truth = reference.gaussian_filter(features[None].double(), values[None].double(), normalization="after")
    try:
        there = values[None].to(device)
        check["triton"] = serves(there)
        found = _filter(engine, features[None].to(device), there).cpu()
    except Exception as error:  # whatever it is, this is the place to show it
        return {**check, "ok": False, "reason": f"{type(error).__name__}: {error}"}
    check["error"] = float((found - truth).norm() / truth.norm())
    return {**check, "ok": check["error"] <= LIMITS[engine]}


def _filter(engine: Any, features: Tensor, values: Tensor) -> Tensor:
    if engine == "grid":
        return GridFilter((SIDE, SIDE), 3.0, normalization="after")(values)
    return gaussian_filter(features, values, method=engine, normalization="after")
