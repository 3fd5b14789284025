"""Test a decomposition: whether its components come back and generalise, and whether chance does as well.

``stability``: the same components from half the examples; ``select``: the loss on what was held out, against the number
of components; ``null_model``: what shuffled Fishers give; ``explained``: how much of each example's Fisher is accounted
for.
"""

from npeff.trust.stability import Stability, explained, match, similarity, stability
from npeff.trust.validation import NullModel, Selection, null_model, select, shuffled

__all__ = [
    "NullModel",
    "Selection",
    "Stability",
    "explained",
    "match",
    "null_model",
    "select",
    "shuffled",
    "similarity",
    "stability",
]
