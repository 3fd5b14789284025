"""NPEFF: which strategies a network uses, on which examples, and which parameter directions carry them.

::

    model, data ──compute_fishers──▶ Fishers ──decompose──▶ Components ──report──▶ a page to read
                   (TopK rows)         │ ▲                    │  encode(new Fishers)
                                       ▼ │ load               │  expand · strategies · state_dict
                                    fishers.h5             components.h5

The method is Non-Negative Per-Example Fisher Factorization (Matena & Raffel 2023, arXiv 2310.04649).
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from npeff.errors import (
    ArgumentError,
    DataError,
    ForeignFileError,
    ModelError,
    NewerFileError,
    NpeffError,
    ResumeError,
    StorageError,
    TruncatedFileError,
)

if TYPE_CHECKING:
    from npeff.components import Components, Encoded
    from npeff.compress import TopK
    from npeff.computation import compute_fishers
    from npeff.decomposition import decompose
    from npeff.fishers import Fishers
    from npeff.reports import report
    from npeff.solver.published_algorithm import PublishedOptions
    from npeff.solver.search import Progress
    from npeff.storage import load
    from npeff.strategies import Strategy

__version__ = _version("npeff")

__all__ = [
    "ArgumentError",
    "Components",
    "DataError",
    "Encoded",
    "Fishers",
    "ForeignFileError",
    "ModelError",
    "NewerFileError",
    "NpeffError",
    "Progress",
    "PublishedOptions",
    "ResumeError",
    "StorageError",
    "Strategy",
    "TopK",
    "TruncatedFileError",
    "compute_fishers",
    "decompose",
    "load",
    "report",
]

# Imported at first use, so that `npeff --help` need not wait for torch.
_HOMES = {
    "Components": "components",
    "Encoded": "components",
    "Fishers": "fishers",
    "Progress": "solver.search",
    "PublishedOptions": "solver.published_algorithm",
    "Strategy": "strategies",
    "TopK": "compress",
    "compute_fishers": "computation",
    "decompose": "decomposition",
    "load": "storage",
    "report": "reports",
}


def __getattr__(name: str) -> object:
    """Import the home of a public name.

    Raises:
        AttributeError: There is no such name.
        ModuleNotFoundError: A module that npeff needs is missing.
    """
    if name in _HOMES:
        value: object = getattr(_import_module(f"npeff.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    try:
        return _import_module(f"npeff.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"npeff.{name}":
            raise
    raise AttributeError(f"module 'npeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
