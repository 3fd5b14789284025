"""The machine under a benchmark: its name, its measured rates, and the peak memory of a process."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from npeff.kernels import implementation, num_threads

Key = TypeVar("Key", bound=Hashable)


def description() -> str:
    """Processor, threads, instruction set, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {num_threads()} thread(s), {implementation()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def synchronize(device: torch.device) -> None:
    """Wait for the work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_profile(name: str, run: Callable[[], object], most: int = 16) -> None:
    """Print how long a CUDA device was busy during a run, and with which kernels, the longest first."""
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e6
    print(f"profile of {name}: {busy:.3f} s of {seconds:.3f} s busy")
    for event in events[:most]:
        kernel = re.sub(r"npeff::|void |cuda::run_block", "", event.key)
        print(f"  {event.self_device_time_total / 1e3:9.3f} ms {event.count:5d} × {kernel[:90]}", flush=True)


def interleaved(
    sides: dict[Key, Callable[[], object]],
    rounds: int,
    seconds: float = float("inf"),
    fewest: int = 3,
    warm_up: bool = True,
) -> dict[Key, list[float]]:
    """Seconds per side and round, in turns.

    Args:
        sides: What to run.
        rounds: Rounds that are counted.
        seconds: A side that has taken so long in all sits out further rounds,
        fewest: but not before so many.
        warm_up: Begin with a round that is not counted.
    """
    times: dict[Key, list[float]] = {name: [] for name in sides}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, side in sides.items():
            if len(times[name]) >= fewest and sum(times[name]) > seconds:
                continue
            start = time.perf_counter()
            side()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rates() -> tuple[float, float]:
    """Operations per second of a product of 1024 × 1024 matrices, and bytes per second of one pass over 256 MB.

    The better of several: rates of the machine, not of its other work.
    """
    a, x = torch.randn(1024, 1024), torch.randn(64 << 20)
    times = interleaved({"product": lambda: a @ a, "pass": lambda: torch.dot(x, x)}, 9)
    return 2 * 1024**3 / min(times["product"]), 4 * x.numel() / min(times["pass"])


def peak(work: Callable[[], object]) -> int:
    """Bytes by which the process grows at most while it does the work (Linux: resets the kernel's high-water mark)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Slope of log time over log size, by least squares."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(seconds)), 1)[0])
