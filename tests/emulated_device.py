"""A stand-in for npeff._cuda whose device is the processor: the CUDA kernels' blocks, emulated in shuffled orders.

What lies between the kernels and the user (plans, workspaces, deferred checks, ordered writing) then runs as it would
for a model on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import blocks
from fake_device import unwrapped
from npeff.decomposition import options
from npeff.kernels import dispatch
from npeff.models import devices


class EmulatedCuda:
    """The functions of npeff._cuda, on CPU tensors and on tensors of a fake device.

    Attributes:
        calls: How often each kernel was called.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            arguments = {key: unwrapped(x).detach() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
            if name != "Csr":
                self.calls[name] = self.calls.get(name, 0) + 1
            if "order" in arguments:
                order, starts, n = arguments["order"], arguments["starts"], arguments.get("n")
                bases = arguments["first"] if "first" in arguments else arguments["bases"]
                targets = arguments.get("targets", _targets(order, starts))
                check_plan(targets, bases, order, starts, len(arguments["sums"]) if n is None else n)
            if "stream" in arguments:
                arguments["stream"] = self.seed
            return blocks.call(name, **arguments)

        return call


def _targets(order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The target of each row, from the rows by target."""
    targets = torch.empty_like(order)
    targets[order] = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return targets


def check_plan(targets: torch.Tensor, bases: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, n: int) -> None:
    """A plan says which rows each target has, by ascending base."""
    assert starts[0] == 0 and starts[-1] == len(order) and len(starts) == n + 1
    for target in range(n):
        mine = order[starts[target] : starts[target + 1]]
        assert (targets[mine] == target).all() and (bases[mine].diff() >= 0).all()


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch, seed: int = 1, memory: int = 1 << 34) -> Iterator[EmulatedCuda]:
    """Within it, CPU tensors are served as those of a device with so many bytes of memory are."""
    with kernels(monkeypatch, seed, ("cpu",)) as module, monkeypatch.context() as patch:
        patch.setattr(devices, "has_own_memory", lambda device: True)
        patch.setattr(options, "available_bytes", lambda device: memory)
        yield module


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, seed: int, types: tuple[str, ...]) -> Iterator[EmulatedCuda]:
    """Within it, the emulated kernels serve devices of these types."""
    module = EmulatedCuda(seed)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "cuda", lambda device: module if device.type in types else None)
        patch.setattr(dispatch, "cuda_reason", lambda device: "" if device.type in types else "not emulated")
        patch.setattr(dispatch, "stream", lambda device: 0)
        yield module
