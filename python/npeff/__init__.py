"""NPEFF: which strategies a network uses, on which examples, and which parameter directions carry them.

::

    model, data ──compute_fishers──▶ Fishers ──decompose──▶ Components ──report──▶ a page to read
                   (TopK rows)         │ ▲                    │  encode(new Fishers)
                                       ▼ │ load               │  expand · strategies · state_dict
                                    fishers.h5             components.h5

The method is Non-Negative Per-Example Fisher Factorization (Matena & Raffel 2023, arXiv 2310.04649).
"""

from importlib.metadata import version as _version

from npeff.components import Components, Encoded
from npeff.compress import TopK
from npeff.computation import compute_fishers
from npeff.decomposition import decompose
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
from npeff.fishers import Fishers
from npeff.published_algorithm import PublishedOptions
from npeff.reports import report
from npeff.search import Progress
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
