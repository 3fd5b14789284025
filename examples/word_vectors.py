"""Word vectors: Skip-gram with negative sampling, whose training example is a sentence, and the association test WEAT.

``examples/influence_words.py`` and the tests share this module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, DataError

Array = npt.NDArray[Any]
Words = Sequence[int] | Sequence[str] | Array | Tensor


class SkipGram(nn.Module):
    """Word vectors u and context vectors v with ``log σ(u·v)`` for pairs seen (Mikolov et al. 2013).

    Args:
        n_words: Size of the vocabulary, V.
        dimension: d.
    """

    def __init__(self, n_words: int, dimension: int) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, dimension)
        self.contexts = nn.Embedding(n_words, dimension)
        nn.init.normal_(self.words.weight, std=dimension**-0.5)
        nn.init.normal_(self.contexts.weight, std=dimension**-0.5)

    def forward(self, centre: Tensor, context: Tensor) -> Tensor:
        """Scores u·v.

        Args:
            centre: ``(b, P)`` int64.
            context: ``(b, P, K)`` int64.

        Returns:
            ``(b, P, K)``.
        """
        return torch.einsum("bpd,bpkd->bpk", self.words(centre), self.contexts(context))


@dataclass(frozen=True, eq=False)
class Sentences:
    """Pairs of words by sentence, iterated as batches for :func:`skip_gram_loss`.

    Attributes:
        vocabulary: Row of each word, by descending frequency.
        texts: The sentences, as words.
        centre: ``(n, P)`` int64, padded with 0.
        context: ``(n, P, 1 + negatives)`` int64: the context seen, then the negatives, drawn once and kept, so that the
            loss is a function of the parameters alone.
        weight: ``(n, P)`` float32: 1 for a pair, 0 for padding; divided by the mean number of pairs.
        batch_size: Sentences per batch.
    """

    vocabulary: dict[str, int]
    texts: tuple[tuple[str, ...], ...]
    centre: Tensor
    context: Tensor
    weight: Tensor
    batch_size: int = 64

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, len(self.centre), self.batch_size):
            part = slice(start, start + self.batch_size)
            longest = max(1, int((self.weight[part] > 0).sum(dim=1).max()))
            yield self.centre[part, :longest], self.context[part, :longest], self.weight[part, :longest]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.centre) // self.batch_size)

    def take(self, which: Any) -> Sentences:
        """Some of the sentences, in the given order."""
        chosen = np.asarray(which, np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        rows = torch.from_numpy(chosen)
        return Sentences(
            self.vocabulary, texts, self.centre[rows], self.context[rows], self.weight[rows], self.batch_size
        )

    def counted(self, without: Sequence[int] = ()) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same objective with words for examples: how often each pair was seen, and drawn as a negative.

        A sum over pairs is a sum over the cells of two V × V matrices (Levy & Goldberg 2014), which is what makes
        training to an optimum, and products with its Hessian, cheap: the mean of :func:`skip_gram_loss` over this
        batch's V words is its mean over the sentences.

        Args:
            without: Sentences to leave out; the others keep their weight 1/n.

        Returns:
            One batch ``(rows (V,) int64, seen (V, V), drawn (V, V))``, float64.

        Raises:
            DataError: A sentence to leave out is not there.
        """
        n, v = len(self.texts), len(self.vocabulary)
        weight = self.weight.double().clone()
        chosen = np.asarray(without, np.int64).reshape(-1)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < n):
            raise DataError(f"without: expected sentences 0 … {n - 1}, got {chosen.tolist()}")
        weight[torch.from_numpy(chosen)] = 0
        cells = self.centre[..., None] * v + self.context
        seen, drawn = torch.zeros(v * v, dtype=torch.float64), torch.zeros(v * v, dtype=torch.float64)
        seen.index_add_(0, cells[..., 0].reshape(-1), weight.reshape(-1))
        drawn.index_add_(0, cells[..., 1:].reshape(-1), weight[..., None].expand(cells[..., 1:].shape).reshape(-1))
        return [(torch.arange(v), seen.view(v, v) * (v / n), drawn.view(v, v) * (v / n))]


def sentences(
    texts: Sequence[Sequence[str]],
    *,
    min_count: int = 5,
    window: int = 3,
    negatives: int = 5,
    max_pairs: int = 512,
    batch_size: int = 64,
    seed: int = 0,
) -> Sentences:
    """Pairs within a window, with negatives by frequency to the power ¾ (Mikolov et al. 2013).

    Args:
        texts: Sentences as words.
        min_count: Rarer words are left out.
        window: Words on either side.
        negatives: Negatives per pair, drawn once.
        max_pairs: At most so many pairs of a sentence, a random choice beyond.
        batch_size: Sentences per batch.
        seed: Decides the draws.

    Returns:
        Only sentences with at least one pair.

    Raises:
        DataError: No word is frequent enough, or no pair is left.
    """
    for name, value in (("min_count", min_count), ("window", window), ("negatives", negatives)):
        if value < 1:
            raise ArgumentError(f"{name}: expected an integer ≥ 1, got {value!r}")
    counts = Counter(word for text in texts for word in text)
    kept = [word for word, count in counts.most_common() if count >= min_count]
    if len(kept) < 2:
        raise DataError(f"texts: {len(kept)} words come {min_count} times or more; lower min_count, or give more text")
    vocabulary = {word: row for row, word in enumerate(kept)}
    generator = np.random.default_rng(seed)
    share = np.array([counts[word] for word in kept], float) ** 0.75
    found: list[tuple[tuple[str, ...], np.ndarray]] = []
    for text in texts:
        rows = [vocabulary[word] for word in text if word in vocabulary]
        pairs = np.array(
            [
                (rows[i], rows[j])
                for i in range(len(rows))
                for j in range(max(0, i - window), i + window + 1)
                if j != i and j < len(rows)
            ],
            np.int64,
        ).reshape(-1, 2)
        if len(pairs) > max_pairs:
            pairs = pairs[np.sort(generator.choice(len(pairs), max_pairs, replace=False))]
        if len(pairs):
            found.append((tuple(text), pairs))
    if not found:
        raise DataError("texts: no sentence holds two frequent words; lower min_count, or give longer sentences")
    longest = max(len(pairs) for _, pairs in found)
    centre = np.zeros((len(found), longest), np.int64)
    context = np.zeros((len(found), longest, 1 + negatives), np.int64)
    weight = np.zeros((len(found), longest), np.float32)
    for i, (_, pairs) in enumerate(found):
        n = len(pairs)
        centre[i, :n], context[i, :n, 0], weight[i, :n] = pairs[:, 0], pairs[:, 1], 1.0
        context[i, :n, 1:] = generator.choice(len(kept), (n, negatives), p=share / share.sum())
    weight /= weight.sum() / len(found)
    return Sentences(
        vocabulary,
        tuple(text for text, _ in found),
        torch.from_numpy(centre),
        torch.from_numpy(context),
        torch.from_numpy(weight),
        batch_size,
    )


def skip_gram_loss(model: Any, batch: Any) -> Tensor:
    """``−Σ log σ(u·v) − Σ_negatives log σ(−u·v')`` per sentence, or per word, ``(b,)``.

    Args:
        model: A :class:`SkipGram`.
        batch: ``(centre, context, weight)`` as :class:`Sentences` yields them, or ``(rows, seen, drawn)`` from
            :meth:`Sentences.counted`.
    """
    centre, context, weight = batch
    if context.is_floating_point():
        scores = model.words(centre) @ model.contexts.weight.T
        per_pair = context * nn.functional.softplus(-scores) + weight * nn.functional.softplus(scores)
        return per_pair.sum(dim=1).to(scores.dtype)
    scores = model(centre, context)
    signs = torch.ones_like(scores[0, 0])
    signs[1:] = -1
    losses = nn.functional.softplus(-signs * scores).sum(dim=2)
    return (losses * weight.to(losses.dtype)).sum(dim=1)


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
    if permutations < 1:
        raise ArgumentError(f"permutations: expected an integer ≥ 1, got {permutations!r}")
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
