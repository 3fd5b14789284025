"""Stage 4a: move the weights along a component, measure what changes, and trace where it acts."""

from __future__ import annotations

from npeff.perturbation.data_fisher import mean_fisher
from npeff.perturbation.effect import Control, Curve, Effect, Side
from npeff.perturbation.groups import Part, heads, units
from npeff.perturbation.measures import FIGURES, Interval
from npeff.perturbation.merging import interpolation
from npeff.perturbation.moved import Moved
from npeff.perturbation.perturbing import perturb, perturb_all
from npeff.perturbation.subjects import direction
from npeff.perturbation.tracing import Trace, trace
from npeff.perturbation.weights import ablated, applied

__all__ = [
    "FIGURES",
    "Control",
    "Curve",
    "Effect",
    "Interval",
    "Moved",
    "Part",
    "Side",
    "Trace",
    "ablated",
    "applied",
    "direction",
    "heads",
    "interpolation",
    "mean_fisher",
    "perturb",
    "perturb_all",
    "trace",
    "units",
]
