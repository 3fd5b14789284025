"""The devices that can compute here, and memory: amounts of it, what is free, and what this process holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from numbers import Integral
from types import TracebackType

import psutil
import torch

from npeff.errors import ArgumentError, OutOfMemoryError

_POWERS = {letter: power for power, letter in enumerate(" kmgt")}


def has_own_memory(device: torch.device) -> bool:
    """Tell whether a device has memory of its own, and works asynchronously."""
    return device.type == "cuda"


def usable_device(device: torch.device | str) -> torch.device:
    """Check that a device can hold tensors.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, … or a ``torch.device``.

    Returns:
        The device.

    Raises:
        ArgumentError: It does not exist, or cannot be used here.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise NotImplementedError("tensors on it have no values")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise ArgumentError(
            f"device: {device!r} cannot be used here ({reason}); `npeff doctor` says what can"
        ) from error
    return found


def parse_bytes(amount: int | str, name: str = "memory") -> int:
    """Parse a number of bytes from ``4_000_000``, ``"4GB"`` (10⁹ bytes each) or ``"512 MiB"`` (2²⁰ bytes each).

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
    elif isinstance(amount, Integral) and not isinstance(amount, bool) and amount > 0:
        return int(amount)
    raise ArgumentError(f"{name}: expected a number of bytes such as 4_000_000_000, '4GB' or '512MiB', got {amount!r}")


def format_bytes(amount: float) -> str:
    """Write a number of bytes as the shortest of ``512 B``, ``1.5 MB``, ``4.0 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def available_bytes(device: torch.device | None = None) -> int:
    """Return the bytes that a new process could take now.

    On a CUDA device: what is free there, and what torch keeps there for new tensors.
    """
    if device is not None and device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that torch found no memory; on the CPU it has no type of its own."""
    said = "DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory"
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


@contextlib.contextmanager
def memory_explained(
    needed_for: str = "a batch",
    advice: str = "give smaller batches (of texts, batch_tokens=), or where Fishers are computed memory='2GB', which "
    "cuts batches, less than now if it was given",
) -> Iterator[None]:
    """Explain an error about missing memory that is raised within the block, and say what to do.

    Args:
        needed_for: What there was too little for.
        advice: What to do.

    Raises:
        OutOfMemoryError: torch found no memory.
        RuntimeError: Any other that is raised within.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(f"memory: there is too little for {needed_for} ({said}); {advice}") from error


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the allocator would keep it for later."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone knows the name
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes() -> int:
    """Return the anonymous memory of this process: without mapped files, which the system takes back when it needs to.

    Where the system does not tell these apart (it does on Linux), the whole resident memory.
    """
    held = psutil.Process().memory_info()
    return int(held.rss - getattr(held, "shared", 0))


def settled_bytes() -> int:
    """Return :func:`held_bytes` after unused memory has gone back to the system."""
    gc.collect(1)  # the young generations: what a call leaves behind; a large heap makes a full collection slow
    return_freed_memory()
    return held_bytes()


class Peak:
    """A context that watches this process's memory every few milliseconds; shorter peaks may escape it.

    Attributes:
        before: Bytes held on entering (:func:`held_bytes`).
        peak: Most bytes held since.
        device: Most bytes of CUDA memory allocated since; 0 without CUDA.
    """

    INTERVAL = 0.004
    """Seconds between two looks."""

    def __enter__(self) -> Peak:
        self.before = self.peak = held_bytes()
        self.device = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            self.peak = max(self.peak, held_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()
        self.peak = max(self.peak, held_bytes())
        if torch.cuda.is_available():
            self.device = torch.cuda.max_memory_allocated()
