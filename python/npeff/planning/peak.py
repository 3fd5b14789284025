"""The most memory that this process itself held while something ran."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from types import TracebackType

import torch

from npeff.models.memory import return_freed_memory

INTERVAL = 0.004
"""Seconds between two looks."""


def held_bytes() -> int:
    """Anonymous memory of this process: without the mapped files, which the system takes back when it needs to.

    Where the system does not tell them apart: the largest resident size so far.
    """
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def settled_bytes() -> int:
    """Bytes held once what nobody needs is given back to the system."""
    gc.collect(1)  # the young generations: what a trial leaves behind; a large heap makes a full one slow
    return_freed_memory()
    return held_bytes()


class Peak:
    """A context that watches memory; what is shorter than a few milliseconds may escape it.

    Attributes:
        before: Bytes held on entering.
        peak: Most bytes held since.
        device: Most bytes of CUDA memory allocated since; 0 without CUDA.
    """

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
        while not self._ended.wait(INTERVAL):
            self.peak = max(self.peak, held_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()
        self.peak = max(self.peak, held_bytes())
        if torch.cuda.is_available():
            self.device = torch.cuda.max_memory_allocated()
