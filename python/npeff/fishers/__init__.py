"""Stage 1: a model and data give per-example Fishers, in memory or in a file."""

from npeff.fishers.fishers import Fishers

__all__ = ["Fishers"]
