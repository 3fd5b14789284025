"""Words as integers: a vocabulary of the most frequent ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError
from npeff.short_repr import short_repr

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[!?]")
PADDING, UNKNOWN = 0, 1


def words(text: str) -> list[str]:
    """Lower-case words, numbers, and the signs ! and ?."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class WordVocabulary:
    """Words by id; 0 is padding, 1 any unknown word.

    Attributes:
        words: Names by id.
    """

    words: tuple[str, ...]

    __repr__ = short_repr

    @classmethod
    def of(cls, texts: Iterable[str], size: int = 8000, least: int = 2) -> WordVocabulary:
        """The most frequent words of some texts, ties by spelling.

        Args:
            texts: Training texts.
            size: At most so many ids.
            least: A word must occur so often.

        Raises:
            ArgumentError: ``size`` is below 3.
        """
        if size < 3:
            raise ArgumentError(f"size: expected at least 3, got {size!r}")
        counts = Counter(word for text in texts for word in words(text))
        known = sorted((word for word, n in counts.items() if n >= least), key=lambda word: (-counts[word], word))
        return cls(("<pad>", "<unknown>", *known[: size - 2]))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str], length: int = 64) -> tuple[Tensor, Tensor]:
        """Texts as ids and mask, ``(n, length)`` int64 and bool; longer texts are cut.

        Raises:
            DataError: A text has no word.
        """
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for i, text in enumerate(texts):
            found = [self._ids.get(word, UNKNOWN) for word in words(text)[:length]]
            if not found:
                raise DataError(f"texts: text {i} has no word ({text[:40]!r}); leave it out")
            ids[i, : len(found)] = torch.tensor(found)
        return ids, ids != PADDING
