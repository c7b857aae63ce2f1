"""What the benchmarks share: pictures, unaries, clocks, memory, and what a published number must name."""

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crfnet.images import read_image, read_labels
from crfnet.ops import reference

DATA = Path(os.environ.get("CRFNET_DATA", Path(__file__).parents[2] / "shared" / "data"))


def procedural_scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:  # (H, W, 3) uint8, (H, W) uint8
    """Regions of different colour with gratings and noise on them, so that colours are neither few nor uniform.

    The labels are the regions, 0 to 11.
    """
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    centres = random.random((12, 2)) * (height, width)
    region = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(-1)  # (H, W)
    colour, direction = random.uniform(40, 215, (12, 3)), random.uniform(-0.6, 0.6, (12, 2))
    grating = np.sin(direction[region, 0] * y + direction[region, 1] * x)[..., None]
    shade = 30 * (x / width - y / height)[..., None]
    image = colour[region] + 25 * grating + shade + random.normal(0, 8, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), region.astype(np.uint8)


def voc_scene(name: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """A VOC image and its labels from the folder CRFNET_DATA names, its centre if ``size``; None where it is absent."""
    path = DATA / "refine" / f"{name}.png"
    if not path.exists():
        return None
    image, labels = read_image(path), read_labels(path.with_name(f"{name}_labels.png"))
    if size is not None:
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        image, labels = (a[top : top + size, left : left + size] for a in (image, labels))
    return image, labels


def coarse_logits(labels: np.ndarray, classes: int, seed: int = 0, gain: float = 4.0) -> Tensor:
    """``(1, C, H, W)``: every eighth label, times ``gain``, plus unit noise, and bilinear up again."""
    known = torch.from_numpy(np.where(labels < classes, labels, 0).astype(np.int64))[4::8, 4::8]
    small = F.one_hot(known, classes).permute(2, 0, 1)[None].float() * gain
    small += torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, labels.shape, mode="bilinear", align_corners=False)


def image_tensor(image: np.ndarray) -> Tensor:  # (1, 3, H, W) float32
    """As the CRF wants it."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float()


def bilateral_features(image: np.ndarray, theta_alpha: float, theta_beta: float) -> Tensor:  # (N, 5) float32
    """Pixel positions / theta_alpha and colours / theta_beta."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    features = np.concatenate([np.stack([y, x], -1) / theta_alpha, image / theta_beta], -1)
    return torch.tensor(features.reshape(-1, 5), dtype=torch.float32)


def normalized_rows(features: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """The float64 oracle: rows of (K v) / (K 1) by brute force."""
    ones = values.new_ones(len(values), 1)
    sums = reference.gaussian_filter_chunked(features.double(), torch.cat([values, ones], 1).double(), rows)
    return sums[:, :-1] / sums[:, -1:]


def timed(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, least and greatest seconds of ``repeats`` calls."""
    return spread([once(function) for _ in range(repeats)])


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, Frobenius norms."""
    return float((got.double() - wanted).norm() / wanted.norm())


def reset_peak_memory() -> None:
    """Forget the peak so far (Linux; elsewhere the peak is that of the whole process)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def memory_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; NaN where /proc does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), math.nan)


def environment() -> dict[str, object]:
    """What a published number must name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return {"cpu": model, "capability": capability, "threads": threads, "commit": commit} | versions
