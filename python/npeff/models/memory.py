"""Amounts of memory: as people write them, and what this machine has."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re

import torch

from npeff.errors import ArgumentError

_POWERS = {letter: power for power, letter in enumerate(" kmgt")}


def parse_bytes(amount: int | str, name: str = "memory") -> int:
    """A number of bytes from ``4_000_000``, ``"4GB"`` (10⁹ bytes each) or ``"512 MiB"`` (2²⁰ bytes each).

    Raises:
        ArgumentError: It is none.
    """
    if isinstance(amount, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", amount.lower())
        if found:
            base = 1024 if found.group(3) else 1000
            value = int(float(found.group(1)) * base ** _POWERS[found.group(2) or " "])
            if value > 0:
                return value
    elif isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    raise ArgumentError(f"{name}: expected a number of bytes such as 4_000_000_000, '4GB' or '512MiB', got {amount!r}")


def format_bytes(amount: float) -> str:
    """The shortest of ``512 B``, ``1.5 MB``, ``4.0 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def available_bytes(device: torch.device | None = None) -> int:
    """Memory that a new process could take now; all physical memory where the system does not say.

    On a CUDA device: what is free there, and what torch keeps there for new tensors.
    """
    if device is not None and device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the allocator would keep it for later."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone knows the name
        ctypes.CDLL(None).malloc_trim(0)
