"""The contributions of the input: the affine map F(z) = W·z + b that equals a network around a point.

::

    model, x ──linearize──▶ LinearMap: W · b · contributions · bias_contributions · residual
    model, components, j, inputs ──attribute_component──▶ the input behind a component
    model, components, data ──attribute_top_examples──▶ the same on its page of the report

Instance-wise Linearization (Li, Liu, Bhavya, Bremer, Pascucci 2023, arXiv 2310.16295).
"""

from npeff.companions.linearize.components import (
    ComponentAttribution,
    attribute_component,
    attribute_top_examples,
)
from npeff.companions.linearize.linear_map import LinearMap, linearize
from npeff.companions.linearize.recording import Frozen

__all__ = [
    "ComponentAttribution",
    "Frozen",
    "LinearMap",
    "attribute_component",
    "attribute_top_examples",
    "linearize",
]
