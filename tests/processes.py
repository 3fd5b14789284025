"""Several processes on this machine that know each other, for the tests of npeff.distributed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

LIMIT = 240.0
"""Seconds after which a test gives up on its processes."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _child(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        pipe.send(("returned", function(rank, *arguments)))
    except BaseException as error:
        pipe.send(("raised", f"{type(error).__name__}: {error}"))
        if not type(error).__module__.startswith("npeff"):
            traceback.print_exc()
    finally:
        pipe.close()
        os._exit(0)  # without torch.distributed's farewell, which waits for processes that may be gone


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
    """Call ``function(rank, *arguments)`` in ``size`` processes, as torchrun starts them.

    Returns:
        Per process ``("returned", value)``, ``("raised", message)`` or ``("killed", None)``.
    """
    context = multiprocessing.get_context("fork")  # the children need not import torch again
    port, pipes, children = free_port(), [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(rank, size, port, function, arguments, theirs))
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    results = []
    for pipe, child in zip(pipes, children, strict=True):
        try:
            results.append(pipe.recv() if pipe.poll(LIMIT) else ("hung", None))
        except EOFError:
            results.append(("killed", None))
        if results[-1][0] == "hung":
            child.kill()
        child.join()
    return results


def all_returned(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As :func:`run`, where every process must succeed; their values."""
    results = run(size, function, *arguments)
    assert all(how == "returned" for how, _ in results), results
    return [value for _, value in results]
