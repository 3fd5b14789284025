"""Fishers to decompose, quickly, in tests."""

from __future__ import annotations

import numpy as np

import npeff
from npeff.fishers.rows import DenseRows
from planted import fishers_of, random_rows, sparse

QUICK = {"n_init": 2, "n_replacements": 4, "progress": False}


def example_fishers(
    kind: str = "low_rank", stored: str = "dense", n: int = 40, m: int = 30, seed: int = 0
) -> npeff.Fishers:
    rng = np.random.default_rng(seed)
    ranks = np.ones(n, np.int64) if kind == "diagonal" else rng.integers(1, 4, n)
    rows, offsets = random_rows(n, 0, m, 0.6, seed, ranks)
    rows = np.abs(rows) if kind == "diagonal" else rows
    return fishers_of(DenseRows(rows) if stored == "dense" else sparse(rows), offsets, kind)
