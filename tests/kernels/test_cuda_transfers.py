"""The thread that stores results in order, and copies to it; on CPU tensors where there is no device."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError
from npeff.kernels import NonFiniteError, StreamingTopK, topk
from npeff.kernels.streams import InOrder, to_host


def test_takes_in_order_on_another_thread() -> None:
    taken: list[int] = []
    threads = set()

    def take(item: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.001 * (item % 3))
        taken.append(item)

    with InOrder(take, waiting=2) as background:
        for item in range(30):
            background.put(item)
    assert taken == list(range(30)) and threads.isdisjoint({threading.get_ident()})


def test_a_slow_taker_holds_back_the_maker() -> None:
    gate, taken = threading.Event(), 0

    def take(_: int) -> None:
        nonlocal taken
        gate.wait(10)
        taken += 1

    with InOrder(take, waiting=1) as background:
        background.put(0)
        background.put(1)
        assert taken == 0
        gate.set()
        background.put(2)
    assert taken == 3


def test_errors_come_back_and_nothing_hangs() -> None:
    taken = []

    def take(item: int) -> None:
        if item == 3:
            raise OSError("disk full")
        taken.append(item)

    with pytest.raises(OSError, match="disk full"), InOrder(take, waiting=1) as background:
        for item in range(100):
            background.put(item)
    assert taken == [0, 1, 2]
    with pytest.raises(OSError, match="disk full"), InOrder(take) as background:
        background.put(3)  # found out at the end


def test_the_makers_own_error_wins_and_what_was_put_is_kept() -> None:
    taken: list[int] = []
    with pytest.raises(KeyError), InOrder(taken.append, waiting=5) as background:
        background.put(1)
        background.put(2)
        raise KeyError
    assert taken == [1, 2]


def test_copies() -> None:
    a, b = torch.arange(6.0).reshape(2, 3).requires_grad_(), torch.tensor([1, 2])
    copied = to_host(a, b).wait()
    np.testing.assert_array_equal(copied[0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(copied[1], [1, 2])
    with pytest.raises(ArgumentError, match="waiting: expected"):
        InOrder(print, waiting=0)


def test_selections_that_are_waited_for_later() -> None:
    stream = StreamingTopK(2, 3)
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    stream.push(x)
    wait = stream.finish_later("magnitude")
    stream.push(-x[:, ::2])  # the selectors are free again
    counts, indices, values = wait()
    expected, places = topk(x, 3, "magnitude")
    assert list(counts) == [3, 3]
    np.testing.assert_array_equal(indices.reshape(2, 3), places)
    np.testing.assert_array_equal(values.reshape(2, 3), expected)
    assert list(stream.finish()[0]) == [3, 3]


@pytest.mark.gpu
def test_selections_on_their_way_from_a_device() -> None:
    stream = StreamingTopK(2, 3)
    x = torch.randn(2, 50_000, device="cuda")
    stream.push(x)
    first = stream.finish_later()
    stream.push(x * float("nan"))
    second = stream.finish_later()
    np.testing.assert_array_equal(first()[1].reshape(2, 3), topk(x.cpu(), 3)[1])
    with pytest.raises(NonFiniteError):
        second()
    stream.push(x)
    assert list(stream.finish()[0]) == [3, 3]


@pytest.mark.gpu
def test_copies_from_a_device() -> None:
    x = torch.randn(1 << 20, device="cuda")
    copies = [to_host(x * i, torch.tensor([i], device="cuda")) for i in range(5)]
    for i, copy in enumerate(copies):
        values, number = copy.wait()
        assert number[0] == i
        np.testing.assert_array_equal(values, (x * i).cpu().numpy())
