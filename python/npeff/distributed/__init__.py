"""Several processes, on one machine or many: examples are shared out, the solver asks only for sums.

``fishers`` computes each process's share of the batches and joins the files, ``decomposition`` gives each process a
block of rows; :mod:`npeff.decomposition.processes` finds the processes and adds up numbers over them. Under
``torchrun`` the commands ``npeff fishers`` and ``npeff decompose`` do this by themselves.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from npeff.errors import WorkerError

if TYPE_CHECKING:
    from npeff.decomposition.processes import Communicator, Group, Local, connect
    from npeff.distributed.decomposition import decompose
    from npeff.distributed.fishers import compute_fishers

__all__ = ["Communicator", "Group", "Local", "WorkerError", "compute_fishers", "connect", "decompose"]

_HOMES = {
    "Communicator": "decomposition.processes",
    "Group": "decomposition.processes",
    "Local": "decomposition.processes",
    "compute_fishers": "distributed.fishers",
    "connect": "decomposition.processes",
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
