"""How a report prints numbers, texts, class names and places: shortened, and with all characters visible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isnan, log, sqrt
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from npeff.batches.batches import Batch
from npeff.batches.reading import with_places
from npeff.errors import DataError

Array = npt.NDArray[Any]

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)},
    0x7F: "\u2421",
    **dict.fromkeys((0x85, 0x2028, 0x2029), "\n"),
    **{code: f"\\u{code:04x}" for code in _BIDI},
}
LONGEST_WORD = 32  # characters
EXCERPT = 220
"""Characters of a text that a page shows at first."""


class ClassNames:
    """The names of the classes; numbers where no names are given.

    Args:
        names: A name per class.
        words: Finds the words of some classes, in place of names. White space around a word is not shown. Of two words
            that differ by nothing else, the second is shown with its white space, or after three dots if it has none.

    Attributes:
        known: All names so far, by class.
        are_words: Whether the names are words of a large vocabulary, found as they are needed.
    """

    def __init__(self, names: Sequence[str] | None, words: Callable[[list[int]], list[str]] | None = None) -> None:
        self.known = {} if names is None else {index: visible(str(name)) for index, name in enumerate(names)}
        self.are_words = words is not None
        self._words, self._taken = words, dict[str, int]()

    def __getitem__(self, index: int) -> str:
        if index < 0:
            return "no label"
        if self._words is not None and index not in self.known:
            self.find([index])
        return self.known.get(index, str(index))

    def named(self, shares: Iterable[tuple[int, float]]) -> list[tuple[str, float]]:
        """Put names in place of the classes of pairs."""
        return [(self[c], share) for c, share in shares]

    def find(self, classes: Iterable[int]) -> None:
        """Find the words of some classes at once."""
        new = [] if self._words is None else sorted({int(c) for c in classes if c >= 0} - self.known.keys())
        for index, word in zip(new, self._words(new) if self._words and new else (), strict=True):
            name = word.strip()
            if not name or self._taken.setdefault(name, index) != index:
                name = f"…{word}" if name and name == word else spaced(word)
            self.known[index] = visible(name if len(name) <= LONGEST_WORD else f"{name[:LONGEST_WORD]}…")


def percent(share: float) -> str:
    """Print a share as a percentage with two significant digits, more near 100 %; a dash for NaN."""
    if isnan(share):
        return "–"
    if share < 0:
        return f"−{percent(-share)}"
    value = 100 * share
    if 99.5 <= value < 99.9999:  # 100 % are all but for rounding
        return f"{value:.1f} %" if value < 99.95 else "> 99.9 %"
    if value >= 9.95 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.1 else "< 0.1 %"


def number(value: int) -> str:
    """Print a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def coefficient(value: float) -> str:
    """Print a coefficient with two significant digits or decimals."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def plain(value: float) -> str:
    """Print a number with three significant digits, without an exponent where it needs none; a dash for NaN."""
    if isnan(value):
        return "–"
    return f"{value:.3g}" if not 100 <= abs(value) < 1e6 else f"{value:.0f}"


def text_of(item: Any) -> str | None:
    """Return the text of a string, of bytes, or of strings (sentence pairs), a line each; None for another item."""
    if isinstance(item, str):
        return str(item)
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    if isinstance(item, Sequence) and item and all(isinstance(part, str) for part in item):
        return "\n".join(item)
    return None


def excerpt(text: str, length: int = EXCERPT) -> tuple[str, str]:
    """Cut a text at a word boundary after about ``length`` characters: the beginning, and the rest if any."""
    text = text.strip()
    if len(text) <= length * 1.15:
        return text, ""
    cut = text.rfind(" ", int(length * 0.7), length)
    cut = cut if cut > 0 else length
    return text[:cut].rstrip(), text[cut:]


def printable(text: str) -> str:
    """Replace what UTF-8 cannot hold: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def visible(text: str) -> str:
    """Make characters visible that would change how others are shown; tabs and line breaks stay.

    Controls become their pictures, characters that turn the direction of writing their numbers.
    """
    return printable(text).translate(_VISIBLE)


def spaced(token: str) -> str:
    """Make white space visible: a token of white space alone would not be seen."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


def short(value: Any) -> float | None:
    """Round to four significant digits, what a page can show; None for an unknown number."""
    return None if value is None or not np.isfinite(value) else float(f"{float(value):.4g}")


# ---- places -------------------------------------------------------------------------------------------------

NEAR, REACH = 8, 120
"""Words, and characters, up to the place, its token included, among which titles look for words."""
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SAMPLE = 1000
"""Texts or places whose words the words of a component's top examples are compared with."""
FREQUENT, SURE = 0.4, 3
"""Words of a title: their least share of the top examples' weight, and by how many standard errors it is above their
share of the sample."""
WORDS = 3  # named in a title at most
FULL, BRIEF, TAIL = (1200, 300), (220, 60), (90, 0)
"""Characters before and after a place: on the page of an example that is on some component's page; on those of others,
and in lists; and where something follows the place."""


@runtime_checkable
class ReadablePlaces(Protocol):
    """Data whose examples are places of texts, as the ``Places`` of language models.

    Attributes:
        n_examples: How many places there are.
        labels: ``(n,)`` the class of each place, −1 where it is unknown.
    """

    n_examples: int
    labels: Array

    def example(self, number: int) -> Any:
        """Return a place with its ``tokens``, which together are the text, and ``index``, the one predicted from."""

    def output_names(self, classes: Sequence[int]) -> list[str]:
        """Return the words of some classes."""


@dataclass(frozen=True)
class PlaceText:
    """The text around a place.

    Attributes:
        tokens: The tokens; together they are the text.
        index: Which of them the model predicts from.
    """

    tokens: tuple[str, ...]
    index: int

    def around(self) -> str:
        """Return the text around the place, which stands in brackets."""
        found = self.window(*BRIEF)
        return f"{found['before']}[{found['at']}]{found['after']}"

    def window(self, before: int, after: int, levels: Sequence[float] | None = None) -> dict[str, Any]:
        """Return what a page shows: whole tokens within so many characters before and after the place.

        That is ``{"before", "at", "after"}``. With the level of each token, its colour in [−1, 1] (0 where they end
        early), also the ``"tokens"`` as pairs of a text and a level, the ``"index"`` of the place's own one, and what
        stands in place of the text that was ``"cut"`` off.
        """
        start, stop, room = self.index, self.index + 1, before
        while start and (room := room - len(self.tokens[start - 1])) >= 0:
            start -= 1
        room = after
        while stop < len(self.tokens) and (room := room - len(self.tokens[stop])) >= 0:
            stop += 1
        before_text, own, after_text = (
            visible("".join(self.tokens[part]))
            for part in (slice(start, self.index), slice(self.index, self.index + 1), slice(self.index + 1, stop))
        )
        own = own if own.strip() else spaced(own)
        cut = "…" if start else "", " …" if after and stop < len(self.tokens) else ""
        word = own.lstrip(" ")
        found: dict[str, Any] = {
            "before": cut[0] + before_text + own.removesuffix(word),
            "at": word,
            "after": after_text + cut[1],
        }
        if levels is not None:
            shown = [own if i == self.index else visible(self.tokens[i]) for i in range(start, stop)]
            coloured = [*levels, *[0.0] * (len(self.tokens) - len(levels))][start:stop]
            found |= {
                "tokens": list(zip(shown, coloured, strict=True)),
                "index": self.index - start,
                "cut": cut,
            }
        return found

    def near(self) -> list[str]:
        """Return the last words up to the place."""
        text = "".join(self.tokens[: self.index + 1])
        words = words_of(text[-REACH:])
        return words[1 if len(text) > REACH else 0 :][-NEAR:]


def readable(data: Iterable[Any], places: object) -> Iterable[Any]:
    """Have the labels of data make places where the components say so (``places``), as they did in the Fishers."""
    return data if places is None or isinstance(data, ReadablePlaces) else with_places(data, True)


def read_places(
    data: ReadablePlaces, wanted: Iterable[int], labels: Mapping[int, int]
) -> Iterator[tuple[int, PlaceText]]:
    """Yield ``(position, text)`` of the wanted places, in order.

    The labels on record, −1 where unknown, are checked against those of the data.

    Raises:
        DataError: The data ends early, or its labels are not those on record.
    """
    for position in sorted(wanted):
        if position >= data.n_examples:
            raise DataError(
                f"data: has {data.n_examples} places, but the components were computed from data with at least "
                f"{position + 1}; pass the data given to compute_fishers, with the same where="
            )
        label, on_record = int(data.labels[position]), labels.get(position, -1)
        if label >= 0 and on_record >= 0 and label != on_record:
            raise DataError(
                f"data: place {position} has label {label}, but {on_record} when the Fishers were computed; pass the "
                "same texts in the same order, with the same where= and answers="
            )
        place = data.example(position)
        yield position, PlaceText(tuple(place.tokens), int(place.index))


def place_in(one: Batch, token: Callable[[int], str]) -> PlaceText | None:
    """Return the text around the place of a batch of one example; None where examples are no places of tokens."""
    if one.places is None or not isinstance(one.inputs, Mapping) or "input_ids" not in one.inputs:
        return None
    row, index = one.places[0].tolist()
    ids, mask = one.inputs["input_ids"][row], one.inputs.get("attention_mask")
    kept = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask[row] != 0
    return PlaceText(tuple(map(token, ids[kept].tolist())), int(kept[:index].sum()))


def token_texts(tokenizer: Any) -> Callable[[int], str] | None:
    """Return a function that finds the text of a token behind another one; None without a tokenizer.

    Some tokenizers drop a space at the beginning of a text, so each token is decoded alone and twice.
    """

    @cache
    def text(number: int) -> str:
        alone, twice = (str(tokenizer.decode([number] * times)) for times in (1, 2))
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    return None if tokenizer is None else text


def spread(positions: Sequence[int]) -> list[int]:
    """Choose a sample of positions, evenly spaced."""
    chosen = np.linspace(0, len(positions) - 1, min(SAMPLE, len(positions))).astype(np.int64)
    return [positions[i] for i in np.unique(chosen).tolist()]


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return WORD.findall(visible(text))


class Words:
    """The words of a sample of texts or near places, and which of them distinguish some from the others."""

    def __init__(self) -> None:
        self._n, self._counts = 0, Counter[str]()

    def add(self, words: Iterable[str]) -> None:
        """Add the words of one text of the sample."""
        self._n += 1
        self._counts.update(set(words))

    def telling(self, texts: Sequence[tuple[float, Sequence[str]]]) -> list[str]:
        """Return the words that are frequent in some texts and not in the sample, in the order of the text.

        The texts' words come with the texts' coefficients. Of every word in more than one of them, ``p log(p / q)`` is
        computed: p its share of the coefficients, q its share of the sample. The standard error of p at random is
        ``√(q (1 − q) Σ w²) / Σ w`` for coefficients w.
        """
        if not self._n:
            return []
        total = sum(weight for weight, _ in texts) or 1.0
        spread_of_shares = sqrt(sum(weight**2 for weight, _ in texts)) / total
        shares: dict[str, float] = {}
        where: dict[str, list[int]] = {}
        for weight, near in texts:
            for word in set(near):
                shares[word] = shares.get(word, 0.0) + weight / total
                where.setdefault(word, []).append(near[::-1].index(word))
        scores = {}
        for word, p in shares.items():
            q = max(self._counts[word], 1) / self._n
            least = q + SURE * sqrt(q * (1 - q)) * spread_of_shares
            if len(where[word]) > 1 and p >= FREQUENT and p > q and p >= least:
                scores[word] = p * log(p / q)
        best = sorted(scores, key=lambda word: (-scores[word], word))[:WORDS]
        return sorted(best, key=lambda word: -float(np.mean(where[word])))
