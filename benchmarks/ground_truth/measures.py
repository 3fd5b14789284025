"""How well scores per component agree with a known factor: purity, coverage, AUC, and groups of components."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

TOP = 20
MOST = 12  # groups
PURE = 0.9
STANDS = 0.9  # AUC


@dataclass(frozen=True)
class Scores:
    """What a method says: the larger, the more a component has to do with an example.

    Attributes:
        values: ``(n, r)`` scores of all examples.
        cuts: Number of groups → ``(n, groups)`` scores of groups of components.
        chosen: The number of groups that the method itself chose, where it chooses.
    """

    values: np.ndarray
    cuts: dict[int, np.ndarray] = field(default_factory=dict)
    chosen: int | None = None

    def spread(self, which: np.ndarray, n: int) -> Scores:
        """These scores at positions ``which`` of n examples, 0 elsewhere."""

        def put(values: np.ndarray) -> np.ndarray:
            out = np.zeros((n, values.shape[1]))
            out[which] = values
            return out

        return Scores(put(self.values), {k: put(cut) for k, cut in self.cuts.items()}, self.chosen)


def linked(values: np.ndarray, vectors: np.ndarray, combine: str = "sum") -> Scores:
    """Scores with groups by average linkage on 1 − |cos| of the method's own vectors ``(r, d)``.

    A group's score is the sum of its components', or the largest for scores such as negative distances.
    """
    join = np.sum if combine == "sum" else np.max
    cuts = {}
    for n in range(2, min(MOST, len(vectors)) + 1):
        groups = groups_of(vectors, n)
        cuts[n] = np.stack([join(values[:, groups == g], axis=1) for g in range(groups.max() + 1)], 1)
    return Scores(values, cuts)


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of a score for a yes/no label (Mann & Whitney 1947); 0.5 when only one label occurs."""
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return 0.5
    return float((rankdata(score)[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def purity(values: np.ndarray, factor: np.ndarray, top: int = TOP) -> np.ndarray:
    """Share of each component's top examples with the commonest value of the factor; NaN for unused components."""
    out = np.full(values.shape[1], np.nan)
    for j, column in enumerate(values.T):
        best = np.argsort(-column, kind="stable")[:top]
        best = best[column[best] > column.min()]
        if len(best):
            out[j] = np.unique(factor[best], return_counts=True)[1].max() / len(best)
    return out


def coverage(values: np.ndarray, factor: np.ndarray, top: int = TOP) -> float:
    """Share of examples whose strongest component is pure and stands for their own value of the factor."""
    pure = purity(values, factor, top)
    stands_for = np.array([_commonest(factor[np.argsort(-v, kind="stable")[:top]]) for v in values.T])
    mine = values.argmax(1)
    return float(((pure[mine] >= PURE) & (stands_for[mine] == factor)).mean())


def crossing_auc(column: np.ndarray, factor: np.ndarray, value: object, other: np.ndarray) -> float:
    """A unit's AUC for a value of a factor, in the worst of the examples of each value of another factor.

    A unit that stands for one factor alone has a high one; a unit of one value of both factors has about 0.5.
    """
    return min(auc(factor[own] == value, column[own]) for own in (other == v for v in np.unique(other)))


def shared_units(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Shares of examples that are held by a unit of each of two factors, and by a unit of their values of both.

    A unit stands for a value of a factor alone if its AUC is at least ``STANDS`` in every value of the other factor;
    for a value of both if that is its AUC among all examples. It holds examples with its own values whose scores
    exceed those of nine tenths of all others.

    Args:
        values: ``(n, r)`` scores.
        first: ``(n,)`` values of a factor.
        second: ``(n,)`` values of the other.
    """

    def held(factor: np.ndarray, other: np.ndarray) -> np.ndarray:
        out = np.zeros(len(factor), bool)
        for value in np.unique(factor):
            own = factor == value
            for column in values.T:
                if crossing_auc(column, factor, value, other) >= STANDS:
                    out |= own & (column > np.quantile(column[~own], 0.9))
        return out

    cells = np.unique(np.stack([first, second], 1), axis=0, return_inverse=True)[1].reshape(-1)
    one, two = held(first, second), held(second, first)
    return {
        "held by a unit of each": float((one & two).mean()),
        "held by a unit of both": float(held(cells, np.zeros(len(cells))).mean()),
    }


def best_auc(values: np.ndarray, factor: np.ndarray, within: np.ndarray | None = None) -> float:
    """The best component's AUC for each value of the factor against the others, averaged over the values."""
    within = np.ones(len(factor), bool) if within is None else within
    known = np.unique(factor[within])
    targets = known[1:] if len(known) == 2 else known  # two values: one question
    sides = (1, -1) if len(known) == 2 else (1,)
    return float(
        np.mean([
            max(auc(factor[within] == t, s * column) for column in values[within].T for s in sides) for t in targets
        ])
    )  # fmt: skip


def groups_of(vectors: np.ndarray, n: int) -> np.ndarray:
    """Average linkage on 1 − |cos| of the vectors, cut into n groups."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    distance = np.clip(1 - np.abs(unit @ unit.T), 0, 1)
    np.fill_diagonal(distance, 0)
    return fcluster(linkage(squareform((distance + distance.T) / 2, checks=False), "average"), n, "maxclust") - 1


def _commonest(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])
