"""NPEFF: which strategies a network uses, on which examples, and which parameter directions carry them.

::

    model, data ──compute_fishers──▶ Fishers ──decompose──▶ Components ──report──▶ pages to read
                  (TopK · Sketch ·      │ ▲                    │  encode · recover · strategies · state_dict
                   GramOnly · exact)    ▼ │ load               │  perturb · trace: what the weights along them do
                                     fishers.h5             components.h5
                                                               │  trust: do they come back, would chance do as well
                                                               │  mend: repair the model through them
                                                               ▼
    companions: linearize (inputs) · influence, rollback (training examples) · safr (training)

Packages, each of which imports only from itself and from those before it::

    kernels, storage ▶ batches, language, models ▶ gradients ▶ fishers ▶ components ▶ decomposition
    ▶ distributed, trust ▶ perturbation ▶ companions ▶ reports ▶ planning, demo, doctor ▶ cli

The method is Non-Negative Per-Example Fisher Factorization (Matena & Raffel, arXiv 2310.04649v3, 2026; first published
in 2023 as NPEFF).
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
    from npeff import companions as companions
    from npeff import language as language
    from npeff import trust as trust
    from npeff.batches.batches import Batch
    from npeff.batches.places import TokenBatches
    from npeff.components.components import Components, Encoded
    from npeff.components.loading import load
    from npeff.components.strategies import Strategy
    from npeff.decomposition.decompose import decompose, expand
    from npeff.decomposition.options import Progress, PublishedOptions
    from npeff.fishers.computation import compute_fishers
    from npeff.fishers.fishers import Fishers
    from npeff.fishers.options import GramOnly, Sketch, TopK
    from npeff.perturbation import (
        Effect,
        Moved,
        Trace,
        ablated,
        applied,
        heads,
        mean_fisher,
        perturb,
        perturb_all,
        trace,
        units,
    )
    from npeff.perturbation.mending import Mending, mend
    from npeff.planning import Plan, plan
    from npeff.reports import report

__version__ = _version("npeff")

__all__ = [
    "ArgumentError",
    "Batch",
    "Components",
    "DataError",
    "Effect",
    "Encoded",
    "Fishers",
    "ForeignFileError",
    "GramOnly",
    "Mending",
    "ModelError",
    "Moved",
    "NewerFileError",
    "NpeffError",
    "Plan",
    "Progress",
    "PublishedOptions",
    "ResumeError",
    "Sketch",
    "StorageError",
    "Strategy",
    "TokenBatches",
    "TopK",
    "Trace",
    "TruncatedFileError",
    "ablated",
    "applied",
    "compute_fishers",
    "decompose",
    "expand",
    "heads",
    "load",
    "mean_fisher",
    "mend",
    "perturb",
    "perturb_all",
    "plan",
    "report",
    "trace",
    "units",
]

# Imported at first use, so that `npeff --help` need not wait for torch.
_HOMES = {
    "Batch": "batches.batches",
    "Components": "components.components",
    "Effect": "perturbation",
    "Encoded": "components.components",
    "Fishers": "fishers.fishers",
    "GramOnly": "fishers.options",
    "Mending": "perturbation.mending",
    "Moved": "perturbation",
    "Plan": "planning",
    "Progress": "decomposition.options",
    "PublishedOptions": "decomposition.options",
    "Sketch": "fishers.options",
    "Strategy": "components.strategies",
    "TokenBatches": "batches.places",
    "TopK": "fishers.options",
    "Trace": "perturbation",
    "ablated": "perturbation",
    "applied": "perturbation",
    "compute_fishers": "fishers.computation",
    "decompose": "decomposition.decompose",
    "expand": "decomposition.decompose",
    "heads": "perturbation",
    "load": "components.loading",
    "mean_fisher": "perturbation",
    "mend": "perturbation.mending",
    "perturb": "perturbation",
    "perturb_all": "perturbation",
    "plan": "planning",
    "report": "reports",
    "trace": "perturbation",
    "units": "perturbation",
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
