"""Judge a decomposition: compare it with shuffled Fishers, and measure its loss on examples that were held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from npeff import kernels
from npeff.components.components import Components, statistics
from npeff.decomposition.decompose import decompose
from npeff.errors import ArgumentError, check_integer
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows, Rows, SparseRows
from npeff.fishers.scaling import ScaledRows, fisher_norms
from npeff.short_repr import several
from npeff.trust.stability import check_own

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
        """Describe the result for JSON."""
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
    check_integer("repeats", repeats)
    check_integer("seed", seed, 0)
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) have no entries that could be shuffled; compute Fishers with "
            "compress=None, TopK(k) or Sketch(d) for a null model"
        )
    components.check_compatible(fishers)
    check_own(fishers, components)
    options = {**components.scaling_of(fishers), **options, "progress": False}
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


# ---- held-out examples ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Selection:
    """Held-out losses by number of components.

    Attributes:
        n_components: The numbers tried, ascending.
        train: ``(len(n_components),)`` float64 relative loss on the examples that were decomposed, mean over folds.
        held_out: ``(folds, len(n_components))`` float64 relative loss on parameters and examples that were not.
        chosen: The fewest components whose mean held-out loss is within one standard error of the best.
    """

    n_components: tuple[int, ...]
    train: Array
    held_out: Array
    chosen: int

    def __repr__(self) -> str:
        folds = len(self.held_out)
        loss = float(self.held_out[:, self.n_components.index(self.chosen)].mean())
        numbers = several(self.n_components)
        return f"Selection(chosen {self.chosen} of {numbers}; held-out loss {loss:.4f}, mean of {folds} folds)"

    def to_json(self) -> dict[str, Any]:
        """Describe the result for JSON."""
        return {
            "n_components": list(self.n_components),
            "train": self.train.tolist(),
            "held_out": self.held_out.tolist(),
            "chosen": self.chosen,
        }


def select(
    fishers: Fishers,
    n_components: Sequence[int],
    *,
    folds: int = 3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Selection:
    """Try several numbers of components by bi-cross-validation (Owen & Perry 2009).

    A fold's examples are left out of the decomposition. Their coefficients are then solved for on a random half of the
    parameters, and judged on the other half, so that a component that only fits noise raises the loss. Then the halves
    change places, and both losses are averaged.

    Args:
        fishers: The Fishers, either kind.
        n_components: Numbers to try.
        folds: Parts that are held out in turn.
        seed: Decides the parts and the decompositions.
        progress: Show a progress bar.
        **options: As for :func:`npeff.decompose`.

    Raises:
        ArgumentError: A number is out of range, or there are too few examples.
    """
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) cannot be split into halves of the parameters, on which the "
            "number of components is judged; compute Fishers with compress=None, TopK(k) or Sketch(d) (--exact, "
            "--top-k, --sketch), or choose the number yourself"
        )
    if not isinstance(n_components, Iterable) or not (given := list(n_components)):
        raise ArgumentError(f"n_components: expected a list of numbers to try, got {n_components!r}")
    numbers = tuple(sorted({check_integer("n_components", r) for r in given}))
    check_integer("seed", seed, 0)
    if check_integer("folds", folds, 2) > len(fishers):
        raise ArgumentError(f"folds: expected 2 to {len(fishers)} (the examples), got {folds}")
    rng = np.random.default_rng(seed)
    fold_of = rng.permutation(len(fishers)) % folds
    train, held_out = np.zeros((folds, len(numbers))), np.zeros((folds, len(numbers)))
    bar = tqdm(total=folds * len(numbers), desc="select", disable=not progress, unit="run")
    for fold in range(folds):
        seen, unseen = fishers[fold_of != fold], fishers[fold_of == fold]
        for column, r in enumerate(numbers):
            components = decompose(seen, r, seed=seed, progress=False, **options)
            train[fold, column] = components.loss
            held_out[fold, column] = held_out_loss(components, unseen, seed)
            bar.update()
    bar.close()
    mean, error = held_out.mean(0), held_out.std(0, ddof=1) / np.sqrt(folds)
    best = int(mean.argmin())
    chosen = numbers[int(np.flatnonzero(mean <= mean[best] + error[best])[0])]
    return Selection(numbers, train.mean(0), held_out, chosen)


def held_out_loss(components: Components, fishers: Fishers, seed: int = 0) -> float:
    """Compute the relative loss on each half of the parameters with coefficients of the other half; average both.

    Args:
        components: A decomposition of other examples.
        fishers: Examples to judge it on.
        seed: Decides the halves.
    """
    scaled = components.scale(fishers)
    side = np.random.default_rng(seed).permutation(scaled.rows.n_columns) % 2
    halves = [np.flatnonzero(side == s) for s in (0, 1)]
    parts = [_restricted(scaled, half, fishers.kind) for half in halves]
    vectors = torch.from_numpy(components.vectors).double()
    cross, gram = zip(
        *(statistics(fishers.kind, part, vectors[:, half]) for part, half in zip(parts, halves, strict=True)),
        strict=True,
    )
    losses = []
    for here, there in ((0, 1), (1, 0)):
        w = kernels.nnls(gram[here], cross[here], exact=True).w
        energy = float(np.square(parts[there].fisher_norms).sum())
        left = energy - 2 * float((w * cross[there]).sum()) + float(((w.T @ w) * gram[there]).sum())
        losses.append(left / energy if energy else 0.0)
    return float(np.mean(losses))


def _restricted(scaled: ScaledRows, columns: Array, kind: str) -> ScaledRows:
    """The rows on some of their columns; the Fisher norms are those of the restricted rows."""
    rows = scaled.rows.on_columns(columns)
    return ScaledRows(rows, scaled.row_offsets, None, fisher_norms(rows, scaled.row_offsets, kind), None)
