"""Positions in texts as examples: batches of tokens, and descriptions of the examples in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from npeff.batches.batches import Batch
from npeff.batches.places import IGNORED, TokenBatches
from npeff.errors import ArgumentError, DataError, check_integer
from npeff.language.texts import Text, read_texts
from npeff.language.tokens import Ids, Tokens, Where, WordTokens, check_vocabulary, finder, tokenize
from npeff.models.targets import load_tokenizer

UNKNOWN = -1
"""The label of a place whose next token is not known."""


@dataclass(frozen=True)
class Place:
    """One example in a form for readers.

    Attributes:
        tokens: Texts of the tokens that the model sees; together they are the text, or what ``context=`` keeps of it.
        index: Which of them the model predicts from: the logits at this token are the example's.
        label: The word that is right; empty where it is not known.
        text: Which of the texts, from 0.
    """

    tokens: tuple[str, ...]
    index: int
    label: str
    text: int


@dataclass(frozen=True)
class _Sequence:
    """Tokens that go through the model together.

    Attributes:
        text: Which text they are of.
        kept: ``(t,)`` which of the text's tokens they are.
        ids: ``(t,)`` their numbers.
        labels: ``(t,)`` the class at each place; −1 unknown, −100 no place.
    """

    text: int
    kept: Ids
    ids: Ids
    labels: Ids


class Places:
    """Batches of tokens for a language model, and the positions in them that are examples.

    An example is a *place*: a position in a text, and what the model predicts there. The object is iterated as any data
    of :func:`npeff.compute_fishers`, as often as wanted; examples are numbered from 0 as the batches hold them, text by
    text and from left to right. The content of a batch is a mapping: ``input_ids`` and ``attention_mask`` ``(b, T)``,
    padded to the longest of its sequences, and ``labels`` ``(b, T)``: at a place the token that comes next (nothing is
    left to shift), −1 where it is not known; −100 at every other position.

    Args:
        tokenizer: The model's own tokenizer, a fast one of the transformers package.
        texts: A list of texts or a pandas column; a list of mappings, a pandas frame, a ``datasets.Dataset`` or a
            mapping of columns; or the path of a .txt (a text per line), .jsonl, .csv, .tsv or .parquet file, or of a
            folder that ``Dataset.save_to_disk`` wrote.
        where: ``"last"``: the last token of each text. ``"every"``: each token of the text. Another string is a regular
            expression: the token with the last character of each match. Or ``where(text, tokens) -> positions``, given
            the texts of the tokens. Tokens that the tokenizer adds are places only if a function
            names their positions.
        answers: Words, each one token where it continues the text (mostly with a space before it). The prediction is
            restricted to these tokens and renormalised; classes are positions in this list.
        context: Tokens that are kept before each place, which is then a sequence of its own; tokens that the tokenizer
            puts before every text stay. None: the whole text; one
            forward pass serves all of its places.
        text_column: The column of the texts, where there are columns.
        label_column: The column of the labels: the right word, one token, at the text's last place; with
            ``answers``, either the word or its index among them. Without a column, the next token is right.
        batch_tokens: The most tokens in a batch, padding included.
        sort: Take texts by length, the longest first: less padding, and examples in that order.
        padding_side: ``"right"``, or ``"left"``, which adds ``position_ids`` to the batches.

    Attributes:
        places: ``(n, 2)`` int64: the text of each example, from 0, and the position among the text's tokens.
        labels: ``(n,)`` int64: the class of each example, −1 where it is unknown.
        outputs: ``(a,)`` int64: the tokens of ``answers``; None without.

    Raises:
        ArgumentError: An argument is wrong, or an answer or a label is not one token.
        DataError: The texts cannot be read, or there is no place in any of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Any,
        where: Where = "last",
        *,
        answers: Sequence[str] | None = None,
        context: int | None = None,
        text_column: str = "text",
        label_column: str | None = None,
        batch_tokens: int = 1024,
        sort: bool = False,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        for name, value, least in (("context", context, 0), ("batch_tokens", batch_tokens, 1)):
            if value is not None:
                check_integer(name, value, least)
        if not isinstance(text_column, str):
            raise ArgumentError(f"text_column: expected the name of a column, got {text_column!r}")
        if not isinstance(sort, bool):
            raise ArgumentError(f"sort: expected True or False, got {sort!r}")
        if padding_side not in ("right", "left"):
            raise ArgumentError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")
        if answers is not None and (
            isinstance(answers, str)
            or not isinstance(answers, Sequence)
            or not all(isinstance(word, str) for word in answers)
            or not len(set(answers)) == len(answers) > 1
        ):
            raise ArgumentError(f"answers: expected at least two different words in a list, got {answers!r}")
        self.tokenizer = tokenizer
        self._options = {
            "where": where,
            "answers": answers and list(answers),
            "context": None if context is None else int(context),
            "text_column": text_column,
            "label_column": label_column,
            "batch_tokens": int(batch_tokens),
            "sort": sort,
            "padding_side": padding_side,
        }
        self.answers = None if answers is None else tuple(answers)
        self.outputs: Ids | None = None
        self._context, self._left = context, padding_side == "left"
        self._words = WordTokens(tokenizer)
        self._texts = read_texts(texts, text_column, label_column)
        find = finder(where, tokenizer)
        sequences = []
        for number, (text, tokens) in enumerate(
            zip(self._texts, tokenize(tokenizer, [text.text for text in self._texts]), strict=True)
        ):
            positions = find(tokens, text)
            if len(positions):
                sequences += self._sequences(number, tokens, positions)
        if not sequences:
            raise DataError(f"where: {where!r} finds no place in any of the {len(self._texts)} texts")
        self._words.warn("label_column" if answers is None else "answers", stacklevel=2)
        lengths = [len(sequence.ids) for sequence in sequences]
        if (longest := max(lengths)) > batch_tokens:
            source = self._texts[sequences[lengths.index(longest)].text].source
            raise ArgumentError(
                f"batch_tokens: expected at least {longest}, the number of tokens of {source}, got {batch_tokens}; "
                "allow more, cut the texts, or keep fewer tokens before each place by context="
            )
        self._batches = TokenBatches(lengths, batch_tokens, sort=sort)
        self._sequences_read = [sequences[i] for i in self._batches.order.tolist()]
        self._ends = np.cumsum([int((s.labels != IGNORED).sum()) for s in self._sequences_read])
        self.labels = np.concatenate([s.labels[s.labels != IGNORED] for s in self._sequences_read])
        positions = np.concatenate([s.kept[s.labels != IGNORED] for s in self._sequences_read])
        numbers = np.repeat([s.text for s in self._sequences_read], np.diff(self._ends, prepend=0))
        self.places = np.stack([numbers.astype(np.int64), positions], axis=1)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def n_examples(self) -> int:
        """Number of places, n."""
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches."""
        for numbers in self._slices():
            yield self._batch(self._sequences_read[numbers])

    def _slices(self) -> Iterator[slice]:
        start = 0
        for numbers in self._batches:
            yield slice(start, start + len(numbers))
            start += len(numbers)

    def _batch(self, sequences: list[_Sequence]) -> Batch:
        """Pad some sequences to the longest of them."""
        shape = (len(sequences), max(len(sequence.ids) for sequence in sequences))
        padding = self.tokenizer.pad_token_id
        ids = np.full(shape, 0 if padding is None else padding, np.int64)
        labels, mask = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids)
            columns = slice(shape[1] - length, None) if self._left else slice(length)
            ids[row, columns], labels[row, columns], mask[row, columns] = sequence.ids, sequence.labels, 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._left:
            batch["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        content = {name: torch.from_numpy(values) for name, values in batch.items()}
        return Batch(content, outputs=None if self.outputs is None else torch.from_numpy(self.outputs), places=True)

    def describe(self) -> dict[str, Any]:
        """Describe the tokenizer, the options and the places for the provenance, JSON-able."""
        described = {"tokenizer": getattr(self.tokenizer, "name_or_path", ""), **self._options}
        if callable(described["where"]):
            described["where"] = None
        digests = {"vocabulary": self._vocabulary, "digest": self._digest(self.n_examples)}
        return described | {"n_examples": self.n_examples, **digests}

    @cached_property
    def _vocabulary(self) -> str:
        """Compute blake2b of the tokenizer's tokens and their numbers, without tokens that were added to it later."""
        size, every = self.tokenizer.vocab_size, self.tokenizer.get_vocab().items()
        tokens = sorted((int(number), token) for token, number in every if number < size)
        return hashlib.blake2b(repr(tokens).encode(), digest_size=16).hexdigest()

    def check_same(self, description: Mapping[str, Any]) -> None:
        """Check that these places begin as those that :meth:`describe` described; fewer than those pass unchecked.

        Raises:
            DataError: They are others.
        """
        n = description.get("n_examples")
        if n is None or n > self.n_examples or self._digest(n) == description["digest"]:
            return
        raise DataError(
            "data: these places are not those that the Fishers were computed from; pass the same texts in the same "
            "order, with the same tokenizer, where=, answers=, context= and sort="
        )

    def _digest(self, n: int) -> str:
        """Compute blake2b of the outputs, and of the tokens and positions of the first n places."""
        digest = hashlib.blake2b(repr(None if self.outputs is None else self.outputs.tolist()).encode(), digest_size=16)
        for sequence, end in zip(self._sequences_read, self._ends.tolist(), strict=True):
            at = np.flatnonzero(sequence.labels != IGNORED)
            for part in (sequence.ids, at[: n - (end - len(at))]):
                digest.update(f"{len(part)},".encode() + part.astype("<i8").tobytes())
            if end >= n:
                break
        return digest.hexdigest()

    @classmethod
    def described(cls, description: Mapping[str, Any], texts: Any) -> Places:
        """Make the places of texts as :meth:`describe` says, with the tokenizer of that path.

        Raises:
            ArgumentError: They were found by a callable, or there is no such tokenizer.
        """
        digests = "n_examples", "vocabulary", "digest"
        options = {name: value for name, value in description.items() if name not in digests}
        tokenizer = options.pop("tokenizer")
        if options["where"] is None:
            raise ArgumentError(
                "where: these places were found by a callable; make Places with the same one, in Python"
            )
        return cls(load_tokenizer(tokenizer), texts, **options)

    def check_model(self, model: nn.Module) -> None:
        """Check that a model takes these tokens, and sequences as long as these.

        Raises:
            ArgumentError: The tokenizer has more tokens than the model, or a sequence is longer than the model's limit.
        """
        check_vocabulary(model, self.tokenizer)
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        longest = max(self._sequences_read, key=lambda sequence: len(sequence.ids))
        if limit is not None and len(longest.ids) > limit:
            raise ArgumentError(
                f"texts: {self._texts[longest.text].source} has {len(longest.ids)} tokens, and {type(model).__name__} "
                f"was made for at most {limit}; cut the text, or keep fewer tokens before each place by context="
            )

    def example(self, number: int) -> Place:
        """Describe an example in words.

        Args:
            number: Which one, from 0.

        Raises:
            ArgumentError: There is no such example.
        """
        if not isinstance(number, int | np.integer) or not 0 <= number < self.n_examples:
            raise ArgumentError(f"number: expected an example from 0 to {self.n_examples - 1}, got {number!r}")
        sequence = self._sequences_read[int(np.searchsorted(self._ends, number, side="right"))]
        text = self._texts[sequence.text].text
        pieces = next(tokenize(self.tokenizer, [text])).pieces(self.tokenizer)
        index = int(np.searchsorted(sequence.kept, self.places[number, 1]))
        label = int(self.labels[number])
        (word,) = self.output_names([label]) if label >= 0 else ("",)
        return Place(tuple(pieces[i] for i in sequence.kept), index, word, sequence.text)

    def output_names(self, classes: Sequence[int]) -> list[str]:
        """Name some classes by their words: tokens as they continue a text, or the answers; ``<unused …>`` for others.

        Args:
            classes: As in ``labels``, or positions among the model's logits.
        """
        if self.answers is not None:
            return [self.answers[i] for i in classes]
        # Some tokenizers drop a space at the beginning: what another token before it does not change is the word.
        (before,) = self.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        start = len(self._decoded([before]))
        return [self._decoded([before, int(i)])[start:] or f"<unused {int(i)}>" for i in classes]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _sequences(self, number: int, tokens: Tokens, positions: Ids) -> list[_Sequence]:
        """Make the sequences of one text: one, or one for each place where the context is limited."""
        own = tokens.added == 0
        labels = np.full(len(tokens.ids), IGNORED, np.int64)
        following = np.where(np.append(own[1:], False), np.append(tokens.ids[1:], 0), UNKNOWN)
        # A masked token is not followed by what it stands for.
        labels[positions] = np.where(tokens.ids[positions] == self._words.mask, UNKNOWN, following[positions])
        if self.answers is not None:
            outputs = self._answer_tokens(tokens, positions)
            known, at = (labels[positions, None] == outputs).nonzero()
            labels[positions] = UNKNOWN
            labels[positions[known]] = at
        if (given := self._texts[number].label) is not None:
            labels[positions[-1]] = self._class(given, self._texts[number], tokens, int(positions[-1]))
        if self._context is None:
            return [_Sequence(number, np.arange(len(tokens.ids)), tokens.ids, labels)]
        lead, found = tokens.n_leading, []
        for p in positions.tolist():
            kept = np.append(np.arange(min(lead, p)), np.arange(max(p - self._context, min(lead, p)), p + 1))
            only = np.where(kept == p, labels[p], IGNORED)
            found.append(_Sequence(number, kept, tokens.ids[kept], only))
        return found

    def _class(self, given: Any, text: Text, tokens: Tokens, position: int) -> int:
        """The class that a label of the texts' source stands for.

        Raises:
            ArgumentError: It is no word of one token, or none of the answers.
        """
        what = f"label of {text.source}"
        if self.answers is None:
            if not isinstance(given, str):
                raise ArgumentError(f"{what}: expected the word that comes next, got {given!r}; numbers need answers=")
            return self._words.after(tokens, position, given, what)
        if isinstance(given, str) and given in self.answers:
            return self.answers.index(given)
        words = [word.strip() for word in self.answers]
        try:
            index = int(given) if isinstance(given, str) or given == int(given) else -1
        except (TypeError, ValueError, OverflowError):
            index = -1
        if index >= 0 and str(index) in words:
            raise ArgumentError(
                f"{what}: {given!r} may be the answer {self.answers[words.index(str(index))]!r} or a position from 0; "
                f"give the answer as it stands in answers={list(self.answers)}"
            )
        if isinstance(given, bool | np.bool_) or not 0 <= index < len(self.answers):
            raise ArgumentError(
                f"{what}: expected one of the answers {', '.join(map(repr, self.answers))} or its position from 0, got "
                f"{given!r}"
            )
        return index

    def _answer_tokens(self, tokens: Tokens, positions: Ids) -> Ids:
        """The tokens of the answers, the same at every place.

        Raises:
            ArgumentError: An answer is not one token, or another one at another place.
        """
        assert self.answers is not None
        for p in positions[np.unique(tokens.ids[positions], return_index=True)[1]].tolist():
            found = np.array([self._words.after(tokens, p, word, "answers") for word in self.answers], np.int64)
            if self.outputs is None:
                self.outputs = found
            if len(set(found.tolist())) < len(found) or (found != self.outputs).any():
                raise ArgumentError(
                    "answers: expected a token for each answer, another one for each, the same after every text; they "
                    f"are {found.tolist()} after {tokens.text[-24:]!r}, elsewhere {self.outputs.tolist()}"
                )
        assert self.outputs is not None
        return self.outputs


def places_of(data: object) -> Places | None:
    """Return the places that data are, or that a wrapper holds as ``data``; None for other data."""
    return next((found for found in (data, getattr(data, "data", None)) if isinstance(found, Places)), None)


def check_places(data: object, about: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Check that places are those that Fishers were computed from, as far as these are on record, and fit the model.

    Args:
        data: Any data; what are no places passes.
        about: The provenance of the Fishers.
        model: The model.

    Raises:
        ArgumentError: The model does not take these tokens, or as many.
        DataError: They are other places.
    """
    if (places := places_of(data)) is None:
        return
    if model is not None:
        places.check_model(model)
    if (described := about.get("places")) is not None:
        places.check_same(described)


def check_same_outputs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that what two provenances describe predicts among the same tokens, as far as that is on record.

    Args:
        theirs: The provenance of Fishers.
        ours: The provenance of the Fishers of components.

    Raises:
        ArgumentError: The answers, or the tokenizers, differ; both are named.
    """
    given, own = theirs.get("places"), ours.get("places")
    if given is None or own is None:
        return
    if given["answers"] != own["answers"]:
        said, wanted = ("all tokens" if words is None else str(words) for words in (given["answers"], own["answers"]))
        raise ArgumentError(
            f"fishers: expected the answers of the components, {wanted}, got {said}; compute them with the same "
            "answers= in the same order"
        )
    vocabularies = {one.get("vocabulary") for one in (given, own)} - {None}  # older files do not say
    if len(vocabularies) > 1:
        said, wanted = (repr(one["tokenizer"]) if one["tokenizer"] else "one without a name" for one in (given, own))
        raise ArgumentError(
            f"fishers: expected the tokens of the components' tokenizer, {wanted}, got those of {said}, which has "
            "others; make the places with the same tokenizer"
        )
