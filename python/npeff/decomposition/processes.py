"""Find the processes that work together, and sum over them: the solver's only use of ``torch.distributed``.

:class:`Processes` adds up over a ``torch.distributed`` process group, gloo for tensors in memory and NCCL for those on
a GPU; :data:`LOCAL` is one process alone. :func:`connect` gives the one or the other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from npeff.errors import ArgumentError, NpeffError, Terminated, WorkerError
from npeff.storage.files import ending_in_order

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""Time that a process waits for a slower one. A process that ends closes its connection, which is noticed at once."""

CHUNK = 1 << 20
"""Random numbers drawn at a time (a multiple of 16, in which torch draws normal ones)."""

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun tells a process of the others."""


class Processes:
    """The operations of processes that work together, over the ``torch.distributed`` process group.

    Every process must ask, in the same order. One process alone exchanges nothing: every sum is the argument.

    Args:
        alone: This process works alone; otherwise the group must be initialised, and every process makes this object.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
        numbers_summed: Numbers that were added up or agreed upon so far.
        sums: Sums so far.
    """

    def __init__(self, alone: bool = False) -> None:
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self.numbers_summed = self.sums = 0
        if self.size > 1:
            # A group of its own: gloo whatever the default is, since most of what is exchanged lives in memory.
            self._gloo = dist.new_group(backend="gloo", timeout=PATIENCE)
            self._peers: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())] * self.size
            self._peers = self.objects((socket.gethostname(), os.getpid()))

    # ---- sums ----------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over processes; the same bits in all of them. The argument may be overwritten."""
        if self.size == 1:
            return tensor
        self.numbers_summed += tensor.numel()
        self.sums += 1
        tensor = tensor.contiguous()
        group = None if tensor.is_cuda else self._gloo
        self._with_others(lambda: dist.all_reduce(tensor, group=group))
        return tensor

    def number(self, value: float) -> float:
        """Add up one float64."""
        return float(self.sum(torch.tensor([value], dtype=torch.float64)))

    def agreed(self, value: float) -> float:
        """Return process 0's value: decisions are taken on it, so that rounding does not lead processes apart."""
        if self.size == 1:
            return value
        self.numbers_summed += 1
        box = torch.tensor([value], dtype=torch.float64)
        self._with_others(lambda: dist.broadcast(box, 0, group=self._gloo))
        return float(box)

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes end to end, in every process; they may differ in length."""
        lengths = self.objects(len(tensor))
        if self.size == 1:
            return tensor
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:]).cpu()
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in range(self.size)]
        self._with_others(lambda: dist.all_gather(received, padded, group=self._gloo))
        return torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)]).to(tensor.device)

    def collected(self, tensor: Tensor) -> Tensor | None:
        """Return the tensors of all processes in process 0 alone, received one after another; None in the others."""
        lengths = self.objects(len(tensor))
        if self.size == 1:
            return tensor
        if self.rank:
            self._with_others(lambda: dist.send(tensor.cpu().contiguous(), 0, group=self._gloo))
            return None
        whole = torch.empty(sum(lengths), *tensor.shape[1:], dtype=tensor.dtype)
        parts = torch.split(whole, lengths)
        parts[0].copy_(tensor)
        for other in range(1, self.size):
            self._with_others(lambda other=other: dist.recv(parts[other], other, group=self._gloo))  # type: ignore[misc]
        return whole

    # ---- other exchanges ------------------------------------------------------------------------------------

    def objects(self, value: T, *, failed: bool = False) -> list[T]:
        """Return small objects of all processes, in order.

        Args:
            value: This process's.
            failed: ``value`` is the message of an error: the others must not go on.

        Raises:
            WorkerError: Another process failed; gives its message.
        """
        if self.size == 1:
            return [value]
        received: list[Any] = [None] * self.size
        self._with_others(lambda: dist.all_gather_object(received, (failed, value), group=self._gloo))
        if not failed:
            for rank, (bad, message) in enumerate(received):
                if bad:
                    raise WorkerError(f"rank {rank} of {self.size}: {message}")
        return [value for _, value in received]

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process; where it fails in one, it fails in all.

        Raises:
            NpeffError: The error of this process.
            WorkerError: Another process failed; gives its message.
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
        """Say which processes have ended, as far as this one can see."""
        if self.size == 1:
            return "the system asked for it"
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


LOCAL = Processes(alone=True)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it exists, and another user's process does not tell more
        return True


def normal_columns(r: int, first: int, count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw columns ``first … first + count − 1`` of ``torch.randn(r, total)``, float64.

    Every process draws all the numbers and keeps its own, so that their generators stay in step.
    """
    own = torch.empty(r, count, dtype=torch.float64)
    start = 0
    while start < total * r:
        # The last piece is longer rather than short: torch draws fewer than 16 numbers in another way.
        stop = total * r if total * r - start < 2 * CHUNK else start + CHUNK
        drawn = torch.randn(stop - start, generator=generator, dtype=torch.float64)
        for j in range(start // total, -(-stop // total)):
            row = j * total + first  # where this process's part of row j begins
            lo, hi = max(start, row), min(stop, row + count)
            if lo < hi:
                own[j, lo - row : hi - row] = drawn[lo - start : hi - start]
        start = stop
    return own


def connect() -> Processes:
    """Find the processes that work together with this one.

    Those of the default process group, if ``torch.distributed`` is initialised; else those that ``torchrun`` started
    (by the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); else this process alone. A collective operation:
    every process must call it.

    Raises:
        ArgumentError: Some of torchrun's variables are there, others are not.
        WorkerError: The others cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes() if dist.get_world_size() > 1 else LOCAL
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return LOCAL
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise ArgumentError(
            f"distributed: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with "
            "torchrun, or initialise torch.distributed"
        )
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: the other processes cannot be reached at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    return Processes()


@contextmanager
def ending_together(group: Processes) -> Iterator[None]:
    """Save open files at SIGTERM and SIGHUP within the block: torchrun sends SIGTERM when another process has failed.

    Raises:
        Terminated: One of these signals came; says which process has ended.
    """
    try:
        with ending_in_order():
            yield
    except Terminated as error:
        why = f"{error.reason}; {group.missing()}"
        raise Terminated(error.signal, f"rank {group.rank} of {group.size}: {why}") from error
