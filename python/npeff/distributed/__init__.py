"""Several processes, on one machine or many: examples are shared out, the solver asks only for sums.

``launch`` finds the other processes, ``communicator`` adds up numbers over them (the only module that the solver
knows), ``fishers`` computes each process's share of the batches and joins the files, ``decomposition`` gives each a
block of rows. Under ``torchrun`` the commands ``npeff fishers`` and ``npeff decompose`` do this by themselves.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from npeff.errors import WorkerError

if TYPE_CHECKING:
    from npeff.decomposition.communicator import Communicator, Group, Local
    from npeff.distributed.decomposition import decompose
    from npeff.distributed.fishers import compute_fishers
    from npeff.distributed.launch import connect

__all__ = ["Communicator", "Group", "Local", "WorkerError", "compute_fishers", "connect", "decompose"]

_HOMES = {
    "Communicator": "decomposition.communicator",
    "Group": "decomposition.communicator",
    "Local": "decomposition.communicator",
    "compute_fishers": "distributed.fishers",
    "connect": "distributed.launch",
    "decompose": "distributed.decomposition",
}


def __getattr__(name: str) -> object:
    """Import the home of a public name.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'npeff.distributed' has no attribute {name!r}")
    return getattr(_import_module(f"npeff.{_HOMES[name]}"), name)
