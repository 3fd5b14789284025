"""Sums over processes: all that the solver knows of there being several.

:class:`Local` is one process and gives back what it is given; :class:`Group` adds up over a ``torch.distributed``
process group, gloo for tensors in memory and NCCL for those on a GPU.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from npeff.errors import NpeffError, WorkerError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for a slower one. One that is gone closes its connection, which is noticed at once."""


class Communicator(Protocol):
    """What processes that work together can ask of each other. Every one must ask, in the same order.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes; the same bits in all of them. The argument may be overwritten."""
        ...

    def number(self, value: float) -> float:
        """The sum of one float64."""
        ...

    def agreed(self, value: float) -> float:
        """Process 0's value: decisions are taken on it, lest rounding makes processes part."""
        ...

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes end to end along the first dimension, in every process."""
        ...


class Local:
    """A single process: every sum is what it is given."""

    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def number(self, value: float) -> float:
        """The number."""
        return value

    def agreed(self, value: float) -> float:
        """The number."""
        return value

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor


LOCAL = Local()


class Group:
    """The processes of a ``torch.distributed`` process group, which must be initialised.

    Making one is a collective operation: every process must do it.

    Attributes:
        rank: This process.
        size: Number of processes.
        numbers_summed: Numbers that were added up or agreed upon so far.
        sums: Sums so far.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.numbers_summed = self.sums = 0
        self._peers: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())] * self.size
        # A group of our own: gloo whatever the default is, since most of what is exchanged lives in memory.
        self._gloo = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._peers = self.objects((socket.gethostname(), os.getpid()))

    # ---- sums ----------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        self.numbers_summed += tensor.numel()
        self.sums += 1
        tensor = tensor.contiguous()
        group = None if tensor.is_cuda else self._gloo
        self._with_others(lambda: dist.all_reduce(tensor, group=group))
        return tensor

    def number(self, value: float) -> float:
        """The sum of one float64."""
        return float(self.sum(torch.tensor([value], dtype=torch.float64)))

    def agreed(self, value: float) -> float:
        """Process 0's value."""
        self.numbers_summed += 1
        box = torch.tensor([value], dtype=torch.float64)
        self._with_others(lambda: dist.broadcast(box, 0, group=self._gloo))
        return float(box)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes end to end; they may differ in length."""
        lengths = self.lengths(len(tensor))
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:]).cpu()
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in range(self.size)]
        self._with_others(lambda: dist.all_gather(received, padded, group=self._gloo))
        return torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)]).to(tensor.device)

    def collected(self, tensor: Tensor) -> Tensor | None:
        """As :meth:`gathered`, but in process 0 alone, one process after another; None in the others."""
        lengths = self.lengths(len(tensor))
        if self.rank:
            self._with_others(lambda: dist.send(tensor.cpu().contiguous(), 0, group=self._gloo))
            return None
        whole = torch.empty(sum(lengths), *tensor.shape[1:], dtype=tensor.dtype)
        whole[: lengths[0]] = tensor
        at = lengths[0]
        for other in range(1, self.size):
            part = whole[at : at + lengths[other]]
            self._with_others(lambda part=part, other=other: dist.recv(part, other, group=self._gloo))  # type: ignore[misc]
            at += lengths[other]
        return whole

    def lengths(self, own: int) -> list[int]:
        """A whole number of every process."""
        return [int(length) for length in self.objects(own)]

    # ---- what is no sum ------------------------------------------------------------------------------------

    def objects(self, value: T, *, failed: bool = False) -> list[T]:
        """Small objects of all processes, in order.

        Args:
            value: This process's.
            failed: It is the message of an error: the others shall not go on.

        Raises:
            WorkerError: Another process failed; its message is told.
        """
        received: list[Any] = [None] * self.size
        self._with_others(lambda: dist.all_gather_object(received, (failed, value), group=self._gloo))
        if not failed:
            for rank, (bad, message) in enumerate(received):
                if bad:
                    raise WorkerError(f"rank {rank} of {self.size}: {message}")
        return [value for _, value in received]

    def together(self, function: Callable[[], T]) -> T:
        """Do something in every process; if it fails in one, it fails in all.

        Raises:
            NpeffError: The error of this process.
            WorkerError: Another process failed; its message is told.
        """
        try:
            result = function()
        except WorkerError:
            raise
        except NpeffError as error:
            self.objects(str(error), failed=True)
            raise
        self.objects(None)
        return result

    def _with_others(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise WorkerError(
                f"rank {self.rank} of {self.size}: {self.missing()}. What is finished is kept on the disk; the same "
                f"command resumes it ({str(error).splitlines()[0][:200]})"
            ) from error

    def missing(self) -> str:
        """Which processes are gone, as far as can be seen from here."""
        here = socket.gethostname()
        for _ in range(20):  # a dying process takes a moment
            gone = [
                f"rank {rank} (process {pid})"
                for rank, (host, pid) in enumerate(self._peers)
                if host == here and rank != self.rank and not _alive(pid)
            ]
            if gone:
                return f"{' and '.join(gone)} on {here} ended before the work was done"
            time.sleep(0.1)
        hosts = sorted({host for host, _ in self._peers} - {here})
        return f"the connection to another process was lost{': on ' + ' or '.join(hosts) if hosts else ''}"


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, and is not ours to ask
        pass
    return True
