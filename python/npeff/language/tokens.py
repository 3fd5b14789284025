"""Texts as tokens: which characters each token stands for, which tokens are places, and words that are one token."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from npeff.errors import ArgumentError, DataError
from npeff.language.texts import Text, is_unicode

Ids = npt.NDArray[np.int64]
Where = str | Callable[[str, list[str]], Iterable[int]]

AT_ONCE = 1_000
"""Texts that the tokenizer is given at a time."""

BEFORE_WORDS = ".,:;!?)]}=>"
"""Characters, beside letters and digits, that a word follows with a space between."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text.

    Attributes:
        text: The text.
        ids: ``(t,)`` their numbers.
        spans: ``(t, 2)`` the characters that each stands for, as start and end; empty for tokens that the tokenizer
            adds of its own, and for white space where the tokenizer says so.
        added: ``(t,)`` 1 for tokens that the tokenizer adds of its own, else 0.
    """

    text: str
    ids: Ids
    spans: Ids
    added: Ids

    @property
    def own(self) -> Ids:
        """Positions of the tokens that stand for a part of the text."""
        return np.flatnonzero(self.added == 0)

    @property
    def n_leading(self) -> int:
        """The number of tokens that the tokenizer put before the text."""
        own = self.own
        return int(own[0]) if len(own) else len(self.ids)

    def pieces(self, tokenizer: Any) -> list[str]:
        """Cut the text into the parts that the tokens stand for; tokens that were added have their own names."""
        found, end = [], 0
        for token, stop, added in zip(self.ids.tolist(), self.spans[:, 1].tolist(), self.added.tolist(), strict=True):
            found.append(str(tokenizer.convert_ids_to_tokens(token)) if added else self.text[end:stop])
            end = max(end, stop)
        return found


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Iterator[Tokens]:
    """Iterate over the tokens of each text.

    Raises:
        ArgumentError: The tokenizer does not know the characters of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            "tokenizer: expected a fast tokenizer of transformers (AutoTokenizer.from_pretrained), which knows the "
            f"characters of each token, got {type(tokenizer).__name__}"
        )
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        wanted = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_attention_mask": False}
        read = tokenizer(some, **wanted, verbose=False)
        columns = read["input_ids"], read["offset_mapping"], read["special_tokens_mask"]
        for text, ids, spans, added in zip(some, *columns, strict=True):
            yield Tokens(
                text, np.array(ids, np.int64), np.array(spans, np.int64).reshape(-1, 2), np.array(added, np.int64)
            )


def prompt_ids(tokenizer: Any, text: str) -> Ids:
    """Return the tokens ``(t,)`` of a text that is to be continued: without those that the tokenizer puts after it."""
    if not getattr(tokenizer, "is_fast", False):  # any other is trusted to put none
        return np.asarray(tokenizer(text, return_tensors="pt")["input_ids"]).reshape(-1).astype(np.int64)
    (tokens,) = tokenize(tokenizer, [text])
    return tokens.ids[: tokens.own[-1] + 1] if len(tokens.own) else tokens.ids[:0]


def finder(where: Where, tokenizer: Any) -> Callable[[Tokens, Text], Ids]:
    """Make the function that finds the places of a text: ``(p,)`` positions of tokens, ascending.

    Raises:
        ArgumentError: ``where`` is neither a regular expression nor callable.
    """
    if where == "last":
        return lambda tokens, text: tokens.own[-1:]
    if where == "every":
        return lambda tokens, text: tokens.own
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ArgumentError(
                f"where: expected 'last', 'every', a regular expression or a callable; {where!r} is none: {error}"
            ) from error
        return lambda tokens, text: _of_matches(pattern, tokens)
    if not callable(where):
        raise ArgumentError(f"where: expected 'last', 'every', a regular expression or a callable, got {where!r}")

    def called(tokens: Tokens, text: Text) -> Ids:
        positions = where(tokens.text, tokens.pieces(tokenizer))
        try:
            given = list(positions)
            found = sorted({operator.index(position) for position in given})
        except (TypeError, ValueError) as error:
            raise DataError(f"where: expected positions of tokens of {text.source}, got {positions!r}") from error
        if any(str(getattr(position, "dtype", type(position).__name__)).endswith("bool") for position in given):
            raise DataError(
                f"where: expected positions of tokens of {text.source}, got True and False: give the numbers"
            )
        if found and not 0 <= found[0] <= found[-1] < len(tokens.ids):
            raise DataError(f"where: expected positions from 0 to {len(tokens.ids) - 1} of {text.source}, got {found}")
        return np.array(found, np.int64)

    return called


def _of_matches(pattern: re.Pattern[str], tokens: Tokens) -> Ids:
    """The tokens that hold the last character of each match; of several for one character, the last."""
    own = tokens.own
    ends = np.array([match.end() for match in pattern.finditer(tokens.text) if match.end() > match.start()], np.int64)
    starts = tokens.spans[own, 0]
    return np.unique(own[np.maximum(np.searchsorted(starts, ends - 1, side="right") - 1, 0)]) if len(own) else own


class WordTokens:
    """Finds the token of a word that follows a place, or that stands in place of a masked token.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        mask: The number of the token that masks others; −1 where there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        mask = getattr(tokenizer, "mask_token_id", None)
        self.mask = -1 if mask is None else int(mask)
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, str], int] = {}  # by the token before
        self._spaced: dict[str, str] = {}  # words, and what they may be meant to be

    def after(self, tokens: Tokens, position: int, word: str, what: str) -> int:
        """Find the token of a word after the token at a position of a text.

        Raises:
            ArgumentError: The word is not one token there; ``what`` names it.
        """
        last = int(tokens.ids[position])
        if (key := (last, word)) not in self._known:
            before = "" if last == self.mask else tokens.text[: tokens.spans[position, 1]]
            self._known[key] = continuation(self._tokenizer, before, word, what)
            if word not in self._spaced and (meant := with_space(self._tokenizer, before, word)):
                self._spaced[word] = meant
        return self._known[key]

    def warn(self, name: str, stacklevel: int) -> None:
        """Warn where words were given without the space before them; ``name`` is that of the argument."""
        if pairs := list(self._spaced.items())[:4]:
            given, meant = (", ".join(map(repr, words)) for words in zip(*pairs, strict=True))
            warnings.warn(
                f"{name}: got {given}, without a space before, and the tokenizer has other tokens for {meant}, which "
                "are what mostly comes next in a text; give these if you mean words of their own",
                stacklevel=stacklevel + 1,
            )


def continuation(tokenizer: Any, before: str, word: str, what: str) -> int:
    """Find the token of a word that continues a text.

    Args:
        tokenizer: The tokenizer.
        before: The text before the word; empty: the word alone.
        word: The word.
        what: Names the word in messages: ``"answers"``, ``"label of text 3"``.

    Raises:
        ArgumentError: The word is several tokens, or none, or the token of unknown words, or changes those before it.
    """
    if not is_unicode(word):
        raise ArgumentError(f"{what}: expected a word of one token, and {word!r} has half a surrogate pair")
    (start, whole) = tokenize(tokenizer, [before, before + word])
    first, both = start.ids[start.own].tolist(), whole.ids[whole.own].tolist()
    if both[: len(first)] == first and len(both) == len(first) + 1:
        if both[-1] == getattr(tokenizer, "unk_token_id", None) and word.strip() != tokenizer.unk_token:
            raise ArgumentError(
                f"{what}: expected a word that the tokenizer knows, and {word!r} becomes {tokenizer.unk_token!r}, as "
                "all words that it does not know"
            )
        return int(both[-1])
    kept = [i for i in whole.own.tolist() if whole.spans[i, 1] > len(before)]
    pieces = [piece for i, piece in enumerate(whole.pieces(tokenizer)) if i in set(kept)]
    after = f" after {before[-24:]!r}" if before else ""
    shown = ", ".join(map(repr, pieces)) or "none"
    hint = ""
    if before and before[-1].isspace():
        hint = "; the text ends in white space, which most tokenizers put at the beginning of the next word: cut it off"
    elif word and not word[0].isspace():
        hint = f"; perhaps with a space before it, {' ' + word!r}"
    raise ArgumentError(f"{what}: expected a word of one token, and {word!r}{after} becomes {shown}{hint}")


def with_space(tokenizer: Any, before: str, word: str) -> str | None:
    """Return a word with a space before it, where that is another token and what one would write after a text.

    Args:
        tokenizer: The tokenizer.
        before: The text before the word.
        word: A word that is one token there.
    """
    if not before or word[0].isspace() or not (before[-1].isalnum() or before[-1] in BEFORE_WORDS):
        return None
    texts = list(tokenize(tokenizer, [before, before + word, f"{before} {word}"]))
    start, plain, spaced = (tokens.ids[tokens.own].tolist() for tokens in texts)
    return f" {word}" if len(spaced) == len(plain) and spaced[:-1] == start and spaced != plain else None


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Check that a model embeds all tokens of a tokenizer, where both say how many there are.

    Raises:
        ArgumentError: The tokenizer has more.
    """
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of models of transformers that have none
        embedding = None
    known = getattr(embedding, "num_embeddings", None)
    if known is not None and hasattr(tokenizer, "__len__") and len(tokenizer) > known:
        raise ArgumentError(
            f"tokenizer: it has {len(tokenizer)} tokens, and {type(model).__name__} embeds {known}; pass the tokenizer "
            "of this model, or resize its embeddings: model.resize_token_embeddings(len(tokenizer))"
        )
