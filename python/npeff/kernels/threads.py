"""How many threads a step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_STEP = 16 << 20
"""Bytes read by a step below which one thread is faster than several."""


@contextmanager
def threads_for(step_bytes: int) -> Iterator[None]:
    """One torch thread where a step reads less than SMALL_STEP bytes; restored afterwards.

    There, waiting for the other threads takes longer than the work; on a machine whose cores are busy, many times so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if step_bytes < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
