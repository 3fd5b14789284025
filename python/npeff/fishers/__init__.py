"""Stage 1: compute per-example Fishers of a model and data, in memory or in a file."""

from npeff.fishers.fishers import Fishers

__all__ = ["Fishers"]
