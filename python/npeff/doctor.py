"""Report what this machine offers, which kernels npeff uses on it, and why not faster ones."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from npeff.short_repr import short_repr

PACKAGES = ("numpy", "scipy", "h5py", "scikit-learn", "matplotlib", "safetensors")
FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "sve",
    "sve2",
)


@dataclass
class Section:
    """A heading and lines ``(name, value)``."""

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    __repr__ = short_repr


def examine() -> list[Section]:
    """Look at versions, processor, kernels and CUDA. Failures are reported, never raised."""
    return [_versions(), _processor(), _kernels(), _cuda()]


def _versions() -> Section:
    import torch

    lines = [
        ("npeff", _version("npeff")),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", str(torch.__version__)),
    ]
    return Section("Versions", lines + [(name, _version(name)) for name in PACKAGES])


def _processor() -> Section:
    import psutil
    import torch

    model, flags = _cpuinfo()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    present = [name for name in FEATURES if name in flags]
    lines = [
        ("model", model or platform.processor() or platform.machine()),
        ("cores", f"{usable} usable of {os.cpu_count()}"),
        ("threads", f"{torch.get_num_threads()} in torch" + _limits()),
        ("features", " ".join(present) or "unknown on this system"),
    ]
    return Section("Processor", [*lines, ("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB")])


def _kernels() -> Section:
    section = Section("Kernels")
    try:
        from npeff.kernels import dispatch

        kernels: dict[tuple[str, str, str], list[str]] = {}
        for line in dispatch.report():
            kernels.setdefault((line.device, line.implementation, line.reason), []).append(line.kernel)
        for (device, implementation, reason), names in kernels.items():
            why = f"\n({reason})" if reason else ""
            section.lines.append((device, f"{implementation}: {', '.join(names)}{why}"))
        section.lines.append(("threads", f"{dispatch.num_threads()} in the CPU kernels"))
    except Exception as error:  # doctor is for broken installations too
        section.lines.append(("unavailable", f"{type(error).__name__}: {error}"))
    return section


def _cuda() -> Section:
    import torch

    section = Section("CUDA")
    try:
        from npeff import _cuda

        devices = int(_cuda.device_count())
        seen = f"{devices} device{'' if devices == 1 else 's'} found" if devices else f"no device: {_cuda.absence()}"
        section.lines.append(("npeff._cuda", "built with CUDA {}.{}; ".format(*_cuda.toolkit()) + seen))
        for i in range(devices):
            reason = _cuda.usable(i)
            section.lines += [(f"npeff on cuda:{i}", f"cannot run: {reason}")] if reason else []
    except ImportError as error:
        section.lines.append(("npeff._cuda", f"not built ({error}); build where nvcc is found to have it"))
    except Exception as error:  # a driver that is present but broken
        section.lines.append(("npeff._cuda", f"built, but it cannot be used: {error}"))
    built = torch.version.cuda
    section.lines.append(
        ("torch", f"built for CUDA {built}" if built else "built without CUDA: models run on the processor")
    )
    section.lines.append(("driver", _driver()))
    if built and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            section.lines.append(
                (
                    f"cuda:{i}",
                    f"{found.name}, {found.total_memory >> 30} GiB, compute {found.major}.{found.minor}",
                )
            )
    else:
        section.lines.append(("devices", "none that torch can use"))
    return section


def _cpuinfo() -> tuple[str, set[str]]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return "", set()
    entries: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            entries.setdefault(name.strip(), value.strip())
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name", ""), set(flags.split())


def _limits() -> str:
    found = [
        f"{name}={os.environ[name]}"
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPEFF_THREADS")
        if name in os.environ
    ]
    return f" ({', '.join(found)})" if found else ""


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        return path.read_text(errors="replace").splitlines()[0]
    return "no NVIDIA driver found on this machine" if sys.platform == "linux" else "unknown on this system"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
