"""Shared by all tests."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts the tests in the background ignores Ctrl-C for them, and for what they start to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A killed process loses nothing that it wrote; what a power cut loses no test can see, and a disk takes long to answer.
os.fsync = lambda fd: None
torch.set_num_threads(1)  # the tests' networks are tiny: a second thread only waits for the first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        "slow": (not config.getoption("--slow"), "long; run with --slow"),
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device, and torch sees none"),
    }
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the garbage collector's sight: it stays, and takes long to look through."""
    gc.collect()
    gc.freeze()
