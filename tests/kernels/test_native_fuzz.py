"""A fuzzer of the kernels' boundary: calls with one, two or three hostile arguments, drawn by hypothesis.

``NPEFF_FUZZ_EXAMPLES`` says how many (100 by default); tests/sanitize.py runs it with more, in a sanitised build.
"""

from __future__ import annotations

import os
import resource

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile_calls
from npeff import kernels

pytest.importorskip("npeff._native", reason="the native module was not built")
FINE = {"refused", "refused by its type", "no memory", "right"}
PLANNED = len(hostile_calls.plan_once())
ROOM = 6 << 30
"""Bytes that the calls may take beside what the process has."""
EXAMPLES = int(os.environ.get("NPEFF_FUZZ_EXAMPLES", "100"))


@pytest.fixture(scope="module")
def _bounded_memory():
    """Sizes of 2³¹ get a MemoryError, and do not fill the machine until the system kills a process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if {"ASAN_OPTIONS", "TSAN_OPTIONS"} & {*os.environ}:  # sanitizers map address space for themselves
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("_bounded_memory")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(number=st.integers(0, PLANNED - 1) | st.integers(PLANNED, PLANNED + 10**9), seed=st.integers(0, 2**32))
def test_hostile_calls(number: int, seed: int) -> None:
    kernels.set_num_threads(2)
    try:
        function, kind, what, error = hostile_calls.outcome(number, seed)
    finally:
        kernels.set_num_threads(None)
    assert what in FINE, f"{function}, {kind}: {what} {error}"
