"""What GPU benchmarks share: clocks, memory, and peaks measured on the device at hand."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Function = Callable[[], object]

FLUSH_BYTES = 2**28  # written before a cold call: several times the largest L2 cache
SECONDS = 0.25  # that one measurement is repeated for
HEAD_START = 10**6  # cycles, about half a millisecond, that the device idles while a replay is launched


class Clock:
    """Times functions: by events on a GPU, by the wall in the interpreter."""

    def __init__(self, device: torch.device, *, least: int = 3, most: int = 30) -> None:
        self.device, self.least, self.most = device, least, most
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def __call__(
        self, function: Function, *, cold: bool = False, most: int | None = None, head_start: bool = False
    ) -> dict[str, float]:
        """Seconds: median, least, greatest and how many. On a GPU one call before goes untimed, and compiles.

        There the time runs from an idle device to the end of the work, launches included where the host is slower.

        Args:
            function: what to time; it may leave work on the current stream.
            cold: whether to empty the GPU's cache before each call.
            most: repeats, at most.
            head_start: whether to keep the device busy, before the time runs, until the host has launched; what it
                takes to launch is then no part of the time, as long as it takes less than HEAD_START.
        """
        if self.device.type == "cuda":
            function()
        first = self._once(function, cold, head_start)
        limit = max(1, most or self.most)
        more = min(limit, max(min(self.least, limit), round(SECONDS / max(first, 1e-9)))) - 1
        seconds = [first, *(self._once(function, cold, head_start) for _ in range(more))]
        return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repeats": len(seconds)}

    def _once(self, function: Function, cold: bool, head_start: bool) -> float:
        if cold:
            self._flush.zero_()
        if self.device.type != "cuda":
            begun = time.perf_counter()
            function()
            return time.perf_counter() - begun
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if head_start:
            torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def both(self, function: Function, *, cold: bool = False, most: int | None = None) -> dict[str, Any]:
        """As called by Python from an idle device, and on a GPU as `replayed` besides."""
        called: dict[str, Any] = dict(self(function, cold=cold, most=most))
        return called | (self.replayed(function, cold=cold, most=most) if self.device.type == "cuda" else {})

    def replayed(self, function: Function, *, cold: bool = False, most: int | None = None) -> dict[str, Any]:
        """``{"graph": times}`` from a CUDA graph, launches not included, or why there is none as "graph_failed".

        Replays have a head start, so that they measure the device and not the host. The function must do all of its
        work on the current stream: backward runs where its forward ran, so that both belong into one function.
        """
        before = torch.cuda.current_stream()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(before)
            with torch.cuda.stream(side):
                for _ in range(2):  # so that nothing is compiled, tuned or set up within the capture
                    function()
            before.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                function()
            return {"graph": self(graph.replay, cold=cold, most=most, head_start=True)}
        except Exception as error:  # whatever is wrong, the times as called are worth keeping
            torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own where ending the capture fails
            return {"graph_failed": causes(error)}


def causes(error: BaseException) -> str:
    """What went wrong, then what went wrong before it: a failed capture hides its reason behind its own message."""
    messages: list[str] = []
    link: BaseException | None = error
    while link is not None:
        messages.append(f"{type(link).__name__}: {str(link).strip()}")
        link = link.__cause__ or link.__context__
    return "\nafter ".join(messages)


def kernel_seconds(function: Function, device: torch.device) -> dict[str, float]:
    """Seconds by name of kernel that one call keeps the GPU busy; nothing in the interpreter."""
    if device.type != "cuda":
        function()
        return {}
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            seconds[event.name] = seconds.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


class Memory:
    """Peak bytes beyond those there at the start; NaN in the interpreter."""

    peak = math.nan


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Memory]:
    """Measures what the GPU holds at most within."""
    found = Memory()
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    torch.cuda.synchronize()
    found.peak = torch.cuda.max_memory_allocated() - before


def peaks(clock: Clock, found: dict[str, float]) -> dict[str, float]:
    """What this device does a second: bytes copied (read and written), matrix flops, powers of two.

    They are put into ``found`` one by one, so that a failure leaves those before it.
    """
    from _exp2 import exp2_kernel

    device, real = clock.device, clock.device.type == "cuda"
    n = 8192 if real else 64
    x, y = (torch.empty(n * n * 4, device=device).normal_() for _ in range(2))
    found["bytes"] = 2 * x.nbytes / clock(lambda: y.copy_(x))["median"]
    a, b = x[: n * n].view(n, n), y[: n * n].view(n, n)
    before = torch.get_float32_matmul_precision()
    for name, precision in (("flops", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        found[name] = 2 * n**3 / clock(lambda: a @ b)["median"]
    torch.set_float32_matmul_precision(before)
    half, other = a.half(), b.half()
    found["fp16"] = 2 * n**3 / clock(lambda: half @ other)["median"]
    programs, times, block = (2**14, 256, 1024) if real else (2, 4, 64)
    out = torch.empty(programs * block, device=device)
    found["exps"] = out.numel() * times / clock(lambda: exp2_kernel[(programs,)](out, times, BLOCK=block))["median"]
    return found
