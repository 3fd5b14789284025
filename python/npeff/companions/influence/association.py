"""WEAT: how differently two sets of words lie towards two sets of attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.companions.influence.solvers.base import check_count
from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Words = Sequence[int] | Sequence[str] | Array | Tensor


@dataclass(frozen=True, eq=False)
class Weat:
    """A word-embedding association test.

    Attributes:
        effect_size: d, between −2 and 2; > 0: X lies nearer to A, and Y to B.
        p_value: Share of the partitions of X ∪ Y into halves whose statistic is at least as large; one-sided.
        statistic: ``Σ_x s(x, A, B) − Σ_y s(y, A, B)``.
        exact: All partitions were taken, not a sample of them.
        associations: ``(|X| + |Y|,)`` float64 ``s(w, A, B)``, X first.
    """

    effect_size: float
    p_value: float
    statistic: float
    exact: bool
    associations: Array

    __repr__ = short_repr


def associations(embeddings: Tensor, words: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``s(w, A, B) = mean_a cos(w, a) − mean_b cos(w, b)``, differentiable.

    Args:
        embeddings: ``(V, d)``.
        words: ``(k,)`` int64 rows; likewise ``a`` and ``b``.
        a: First attributes.
        b: Second attributes.

    Returns:
        ``(k,)``.
    """
    unit = torch.nn.functional.normalize(embeddings, dim=1, eps=1e-12)
    return (unit[words] @ unit[a].T).mean(dim=1) - (unit[words] @ unit[b].T).mean(dim=1)


def weat_effect(embeddings: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """WEAT's effect size as a differentiable function of the embeddings: a test function for influence.

    ``d = (mean_x s(x, A, B) − mean_y s(y, A, B)) / std_{w ∈ X ∪ Y} s(w, A, B)`` (Caliskan, Bryson & Narayanan 2017),
    with the standard deviation of a sample (divisor |X| + |Y| − 1).

    Args:
        embeddings: ``(V, d)``.
        x: ``(k,)`` int64 rows of the first targets; likewise the others.
        y: Second targets.
        a: First attributes.
        b: Second attributes.

    Returns:
        ``()``.
    """
    s = associations(embeddings, torch.cat([x, y]), a, b)
    return (s[: len(x)].mean() - s[len(x) :].mean()) / s.std()


def weat(
    embeddings: Tensor | Array | Mapping[str, Any],
    targets: tuple[Words, Words],
    attributes: tuple[Words, Words],
    *,
    vocabulary: Mapping[str, int] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> Weat:
    """The word-embedding association test (Caliskan, Bryson & Narayanan 2017, Science 356).

    Args:
        embeddings: ``(V, d)``, or a mapping from words to vectors ``(d,)``.
        targets: X and Y, of the same size: words (with ``vocabulary``, or with a mapping) or rows.
        attributes: A and B, likewise, of any size.
        vocabulary: Row of each word.
        permutations: Take all partitions if they are at most so many, this many random ones otherwise (p-value then
            ``(1 + hits) / (1 + permutations)``).
        seed: Decides the random ones.

    Returns:
        Effect size, p-value and associations.

    Raises:
        ArgumentError: A word is unknown, a set is empty, X and Y differ in size, or share a word.
    """
    check_count("permutations", permutations)
    if isinstance(embeddings, Mapping):
        vocabulary = {word: row for row, word in enumerate(embeddings)}
        embeddings = np.stack([np.asarray(vector, np.float64) for vector in embeddings.values()])
    table = torch.as_tensor(embeddings).detach().to("cpu", torch.float64)
    if table.dim() != 2 or not bool(torch.isfinite(table).all()):
        raise ArgumentError(f"embeddings: expected finite numbers of shape (V, d), got shape {tuple(table.shape)}")
    x, y = (rows_of(words, vocabulary, len(table), "targets") for words in targets)
    a, b = (rows_of(words, vocabulary, len(table), "attributes") for words in attributes)
    if len(x) != len(y) or len(set(x.tolist()) & set(y.tolist())):
        raise ArgumentError(f"targets: expected two sets of one size without common words, got {len(x)} and {len(y)}")
    s = associations(table, torch.cat([x, y]), a, b).numpy()
    statistic = float(s[: len(x)].sum() - s[len(x) :].sum())
    spread = float(s.std(ddof=1))
    effect = statistic / len(x) / spread if spread > 0 else 0.0
    half, total = len(x), math.comb(len(s), len(x))
    exact = total <= permutations
    if exact:
        chosen = np.array(list(combinations(range(len(s)), half)))
    else:
        generator = np.random.default_rng(seed)
        chosen = np.stack([generator.permutation(len(s))[:half] for _ in range(permutations)])
    statistics = 2 * s[chosen].sum(axis=1) - s.sum()
    hits = int((statistics >= statistic - 1e-12 * (1 + abs(statistic))).sum())
    p_value = hits / total if exact else (1 + hits) / (1 + permutations)
    return Weat(effect, p_value, statistic, exact, s)


def rows_of(words: Words, vocabulary: Mapping[str, int] | None, size: int, name: str) -> Tensor:
    """Rows of words, ``(k,)`` int64.

    Raises:
        ArgumentError: Unknown words, rows out of range, repeated ones, or none.
    """
    items = words.tolist() if isinstance(words, (Tensor, np.ndarray)) else list(words)
    if any(isinstance(item, str) for item in items):
        if vocabulary is None:
            raise ArgumentError(f"{name}: words need vocabulary= (their rows), or embeddings given as a mapping")
        unknown = [item for item in items if item not in vocabulary]
        if unknown:
            raise ArgumentError(f"{name}: not in the vocabulary: {', '.join(map(str, unknown[:8]))}; leave them out")
        items = [vocabulary[str(item)] for item in items]
    if not items or not all(isinstance(item, int) and 0 <= item < size for item in items):
        raise ArgumentError(f"{name}: expected words, or rows between 0 and {size - 1}, at least one; got {items[:8]}")
    if len(set(items)) != len(items):
        raise ArgumentError(f"{name}: expected no word twice in one set")
    return torch.tensor(items, dtype=torch.int64)
