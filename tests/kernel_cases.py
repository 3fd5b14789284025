"""Inputs of kernels, for tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def kinds(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "normal": rng.standard_normal(n),
        "few distinct": rng.integers(-3, 4, n),
        "zeros": np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "equal": np.where(rng.random(n) < 0.5, -2.5, 2.5),
        "ascending": np.arange(n) * 1e-3,
        "descending": np.arange(n)[::-1] * 1e-3,
        "denormal": rng.integers(-50, 50, n) * 1e-45,
        "heavy tail": rng.standard_cauchy(n) ** 3,
    }


def drawn_cuts(data: st.DataObject) -> tuple[np.ndarray, int, list[int]]:
    """Draw three rows with ties, how many entries of each are kept, and where the rows are cut into blocks."""
    width = data.draw(st.integers(1, 400), "width")
    k = data.draw(st.integers(1, width), "k")
    levels = data.draw(st.sampled_from([2, 5, 1000]), "distinct values")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    x = (rng.integers(-levels, levels + 1, (3, width)) / 7).astype(np.float32)
    return x, k, sorted(data.draw(st.sets(st.integers(1, width), max_size=5), "cuts") | {0, width})


def problem(n: int, r: int, dtype: type, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((r, r + 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    gram = np.square(g @ g.T)
    if r > 2:
        gram[1] = gram[:, 1] = 0  # a component that is not there
    w = rng.exponential(size=(n, r)) * (rng.random((n, r)) < 0.4)
    cross = w @ gram + 0.1 * rng.standard_normal((n, r))
    return gram.astype(dtype), cross.astype(dtype), rng.standard_normal((n, r)).astype(dtype)
