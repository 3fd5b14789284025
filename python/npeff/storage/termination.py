"""SIGTERM and SIGHUP as an error, so that what is open is saved before the process ends, as at Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from npeff.errors import Terminated

SIGNALS = (signal.SIGTERM, signal.SIGHUP)

TOGETHER = 5.0
"""Seconds within which further signals count as the same: they would interrupt the saving."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an error in the main thread; at the end, restore the handlers of before.

    A signal that the program handles itself, or ignores (``nohup``), is left to it. Where the caller is another thread
    nothing changes: Python handles signals in the main thread alone.

    Raises:
        Terminated: One of the signals came.
    """
    owner, last = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a child that was forked meanwhile ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif time.monotonic() - last > TOGETHER:
            last = time.monotonic()
            raise Terminated(number, f"told to end ({signal.Signals(number).name})")

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
