"""Finding the other processes: those of ``torchrun``, or of a process group that exists already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from npeff.decomposition.communicator import LOCAL, PATIENCE, Group, Local
from npeff.errors import ArgumentError, Terminated, WorkerError
from npeff.storage.termination import ending_in_order

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def connect() -> Group | Local:
    """The processes that work together with this one.

    Those of the default process group, if ``torch.distributed`` is initialised; else those that ``torchrun`` started
    (by the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); else this process alone. A collective operation:
    every process must call it.

    Raises:
        ArgumentError: Some of torchrun's variables are there, others are not.
        WorkerError: The others cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        return Group() if dist.get_world_size() > 1 else LOCAL
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
    return Group()


@contextmanager
def told_to_end(group: Group | Local) -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP save what is open: torchrun sends SIGTERM when another process has failed.

    Raises:
        Terminated: One of them came; says which process is gone.
    """
    try:
        with ending_in_order():
            yield
    except Terminated as error:
        why = group.missing() if isinstance(group, Group) else "the system asked for it"
        raise Terminated(error.signal, f"rank {group.rank} of {group.size}: {error.reason}; {why}") from error
