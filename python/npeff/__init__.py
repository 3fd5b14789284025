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

if TYPE_CHECKING:
    from npeff import companions as companions
    from npeff import language as language
    from npeff import trust as trust
    from npeff.batches.batches import Batch as Batch
    from npeff.batches.places import TokenBatches as TokenBatches
    from npeff.components.components import Components as Components
    from npeff.components.components import Encoded as Encoded
    from npeff.components.loading import load as load
    from npeff.components.strategies import Strategy as Strategy
    from npeff.decomposition.decompose import decompose as decompose
    from npeff.decomposition.decompose import expand as expand
    from npeff.decomposition.options import Progress as Progress
    from npeff.decomposition.options import PublishedOptions as PublishedOptions
    from npeff.errors import ArgumentError as ArgumentError
    from npeff.errors import DataError as DataError
    from npeff.errors import ForeignFileError as ForeignFileError
    from npeff.errors import ModelError as ModelError
    from npeff.errors import NewerFileError as NewerFileError
    from npeff.errors import NpeffError as NpeffError
    from npeff.errors import ResumeError as ResumeError
    from npeff.errors import StorageError as StorageError
    from npeff.errors import TruncatedFileError as TruncatedFileError
    from npeff.fishers.computation import compute_fishers as compute_fishers
    from npeff.fishers.fishers import Fishers as Fishers
    from npeff.fishers.options import GramOnly as GramOnly
    from npeff.fishers.options import Sketch as Sketch
    from npeff.fishers.options import TopK as TopK
    from npeff.perturbation import Effect as Effect
    from npeff.perturbation import Moved as Moved
    from npeff.perturbation import Trace as Trace
    from npeff.perturbation import ablated as ablated
    from npeff.perturbation import applied as applied
    from npeff.perturbation import heads as heads
    from npeff.perturbation import mean_fisher as mean_fisher
    from npeff.perturbation import perturb as perturb
    from npeff.perturbation import perturb_all as perturb_all
    from npeff.perturbation import trace as trace
    from npeff.perturbation import units as units
    from npeff.perturbation.mending import Mending as Mending
    from npeff.perturbation.mending import mend as mend
    from npeff.planning import Plan as Plan
    from npeff.planning import plan as plan
    from npeff.reports import report as report

__version__ = _version("npeff")

_PUBLIC = {
    "errors": "ArgumentError DataError ForeignFileError ModelError NewerFileError NpeffError ResumeError StorageError "
    "TruncatedFileError",
    "batches.batches": "Batch",
    "batches.places": "TokenBatches",
    "components.components": "Components Encoded",
    "components.loading": "load",
    "components.strategies": "Strategy",
    "decomposition.decompose": "decompose expand",
    "decomposition.options": "Progress PublishedOptions",
    "fishers.computation": "compute_fishers",
    "fishers.fishers": "Fishers",
    "fishers.options": "GramOnly Sketch TopK",
    "perturbation": "Effect Moved Trace ablated applied heads mean_fisher perturb perturb_all trace units",
    "perturbation.mending": "Mending mend",
    "planning": "Plan plan",
    "reports": "report",
}
"""Modules and the public names in them: imported at first use, so that ``npeff --help`` need not wait for torch."""

_HOMES = {name: home for home, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_HOMES)


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
