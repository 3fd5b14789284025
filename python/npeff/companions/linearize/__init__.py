"""What the input contributed: the affine map F(z) = W·z + b that a network is around a point.

::

    model, x ──linearize──▶ LinearMap: W · b · contributions · bias_contributions · residual
    X ──ParametricTSNE.fit──▶ an embedding whose coordinates are explained the same way
    model, components, j, inputs ──attribute_component──▶ the input behind a component
    model, components, data ──attribute_top_examples──▶ the same on its page of the report

Instance-wise Linearization (Li, Liu, Bhavya, Bremer, Pascucci 2023, arXiv 2310.16295).
"""

from npeff.companions.linearize.components import ComponentAttribution, attribute_component
from npeff.companions.linearize.linear_map import LinearMap
from npeff.companions.linearize.linearizing import linearize
from npeff.companions.linearize.pictures import contribution_bars, contribution_grid, save_figure
from npeff.companions.linearize.program import Frozen
from npeff.companions.linearize.top_examples import attribute_top_examples
from npeff.companions.linearize.tsne import ParametricTSNE

__all__ = [
    "ComponentAttribution",
    "Frozen",
    "LinearMap",
    "ParametricTSNE",
    "attribute_component",
    "attribute_top_examples",
    "contribution_bars",
    "contribution_grid",
    "linearize",
    "save_figure",
]
