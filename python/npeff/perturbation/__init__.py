"""Stage 4a: move the weights along a component, measure what changes, and trace where the component acts."""

from __future__ import annotations

from npeff.perturbation.diagonal import interpolation, mean_fisher
from npeff.perturbation.directions import direction
from npeff.perturbation.effect import Continuation, Control, Curve, Effect, Prediction, SignResult
from npeff.perturbation.figures import FIGURES, Interval
from npeff.perturbation.groups import Part, heads, units
from npeff.perturbation.perturbing import perturb, perturb_all
from npeff.perturbation.tracing import Trace, trace
from npeff.perturbation.weights import Moved, ablated, applied

__all__ = [
    "FIGURES",
    "Continuation",
    "Control",
    "Curve",
    "Effect",
    "Interval",
    "Moved",
    "Part",
    "Prediction",
    "SignResult",
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
