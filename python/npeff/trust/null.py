"""Decompose shuffled Fishers: what chance would give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.components.components import Components
from npeff.decomposition.decompose import decompose
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows, Rows, SparseRows
from npeff.trust.stability import options_of

Array = npt.NDArray[Any]

BLOCK = 4096  # columns of dense rows that are shuffled at a time


@dataclass(frozen=True, eq=False)
class NullModel:
    """A decomposition beside those of shuffled Fishers.

    Attributes:
        loss: Relative loss of the decomposition.
        losses: ``(repeats,)`` float64 relative losses of the shuffled ones.
        energy: ``(r,)`` float64 each component's own energy, ``Σ_i W_ij² / n``.
        energies: ``(repeats, r)`` float64 those of the shuffled ones.
    """

    loss: float
    losses: Array
    energy: Array
    energies: Array

    def __repr__(self) -> str:
        above = f"{int(self.above.sum())} of {len(self.energy)} components above chance"
        losses = f"loss {self.loss:.4f}, of shuffled Fishers {self.losses.mean():.4f}"
        return f"NullModel({len(self.losses)} shuffles: {above}, {losses})"

    @property
    def threshold(self) -> float:
        """Energy that 95 % of the components of shuffled Fishers stay below."""
        return float(np.quantile(self.energies, 0.95))

    @property
    def above(self) -> Array:
        """``(r,)`` bool: components with more energy than the threshold."""
        return np.asarray(self.energy > self.threshold)

    def to_json(self) -> dict[str, Any]:
        """Describe it for JSON."""
        return {
            "loss": self.loss,
            "losses": self.losses.tolist(),
            "energy": self.energy.tolist(),
            "threshold": self.threshold,
            "above": self.above.tolist(),
        }


def null_model(
    fishers: Fishers, components: Components, *, repeats: int = 3, seed: int = 0, progress: bool = True, **options: Any
) -> NullModel:
    """Decompose shuffled Fishers, in which entries of different parameters occur together by chance alone.

    Args:
        fishers: The Fishers that the components were made from.
        components: Their decomposition.
        repeats: Number of shuffles.
        seed: Decides the shuffles.
        progress: Show a progress bar.
        **options: As for :func:`npeff.decompose`; by default those that the components were made with.

    Raises:
        ArgumentError: ``repeats`` is below 1, or the Fishers are not those of the components.
    """
    if repeats < 1:
        raise ArgumentError(f"repeats: expected at least 1, got {repeats}")
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) have no entries that could be shuffled; compute Fishers with "
            "compress=None, TopK(k) or Sketch(d) for a null model"
        )
    components.check_compatible(fishers)
    options = {**options_of(components), **options, "progress": False}
    losses, energies = [], []
    for repeat in tqdm(range(repeats), "null model", disable=not progress, unit="shuffle"):
        chance = decompose(shuffled(fishers, seed + repeat), components.n_components, seed=seed, **options)
        losses.append(chance.loss)
        energies.append(_energy(chance))
    return NullModel(components.loss, np.asarray(losses), _energy(components), np.stack(energies))


def shuffled(fishers: Fishers, seed: int = 0) -> Fishers:
    """Move every parameter's entries to other rows at random.

    Each column keeps its entries, so that every parameter has as much energy as before, and every entry of
    low-rank rows gets a random sign; but which entries occur together is left to chance. Column c moves row i to
    ``(a_c·i + b_c) mod R``, a random bijection.

    Args:
        fishers: The Fishers, either kind.
        seed: Decides where they go.

    Returns:
        Fishers of as many examples, rows and entries; labels and logits belong to nothing any more.
    """
    fishers.verify()
    rng = np.random.default_rng(seed)
    rows, R = fishers.rows, fishers.rows.n_rows
    a, b = _units(rng, R, rows.n_columns), rng.integers(0, max(1, R), rows.n_columns)
    out: Rows
    stored = rows.arrays()
    if rows.form == "sparse":
        columns, counts = np.asarray(stored["rows/indices"]), np.diff(stored["rows/indptr"])
        source = np.repeat(np.arange(R), counts)
        target = (a[columns] * source + b[columns]) % max(1, R)
        order = np.lexsort((columns, target))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=R))]).astype(np.int64)
        values = np.asarray(rows.values)[order]
        out = SparseRows(indptr, columns[order], values * _signs(rng, values.shape, fishers.kind), rows.n_columns)
    else:
        values = np.empty_like(rows.values)
        for start in range(0, rows.n_columns, BLOCK):
            part = slice(start, start + BLOCK)
            target = (np.arange(R)[:, None] * a[part] + b[part]) % max(1, R)
            block = rows.values[:, part]
            np.put_along_axis(values[:, part], target, block * _signs(rng, block.shape, fishers.kind), 0)
        out = DenseRows(values)
    return replace(fishers, rows=out, path=None)


def _signs(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    return np.ones(shape, np.float32) if kind == "diagonal" else rng.choice(np.array([-1, 1], np.float32), shape)


def _units(rng: np.random.Generator, modulus: int, count: int) -> Array:
    """Random numbers without a common divisor with ``modulus``."""
    if modulus < 3:
        return np.ones(count, np.int64)
    a = rng.integers(1, modulus, count)
    while (bad := np.gcd(a, modulus) != 1).any():
        a[bad] = rng.integers(1, modulus, int(bad.sum()))
    return np.asarray(a)


def _energy(components: Components) -> Array:
    W = components.coefficients.astype(np.float64)
    return np.asarray(np.square(W).mean(0))
