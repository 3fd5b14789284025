"""Texts of language models: unrelated data whose perplexity is measured, and prompts that are continued."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.batches.reading import check_data, read_batches
from npeff.errors import ArgumentError, DataError, NpeffError
from npeff.language.places import Places, check_places
from npeff.language.tokens import check_vocabulary, prompt_ids
from npeff.perturbation.effect import Continuation
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.weights import TensorsByName, Weights

Array = npt.NDArray[Any]
Prompt = tuple[int | None, Tensor]
"""Position of the example whose text it is, or None, and its tokens ``(1, t)``."""

MOST_TOKENS = 4096
"""Tokens of unrelated texts that go through the model together; a longer text is refused."""


def unrelated_batches(
    data: Any, model: nn.Module, tokenizer: Any, device: torch.device, any_layout: bool, places: bool | None
) -> list[Batch]:
    """Read unrelated data, if any: batches with labels, or texts, every token of which is an example.

    The tokenizer is that of the examples' data; without one there are no texts.

    Raises:
        ArgumentError: It is no iterable of batches, or texts that cannot be read.
        DataError: It has no labels.
    """
    if data is None:
        return []
    texts = isinstance(data, str | os.PathLike) or (
        isinstance(data, Sequence) and any(isinstance(d, str) for d in data)
    )
    if texts and tokenizer is None:
        raise ArgumentError(
            "unrelated: got texts, and the data has no tokenizer to read them with; pass "
            "data=npeff.language.Places(tokenizer, …), or for unrelated batches whose labels are the next tokens"
        )
    try:
        if texts:
            data = Places(tokenizer, data, where="every", batch_tokens=MOST_TOKENS)
        check_places(data, {}, model)
    except NpeffError as error:
        raise type(error)(f"unrelated: {error}") from error
    batches = list(read_batches(check_data(data), device, any_layout, places))
    if not batches or any(batch.labels is None for batch in batches):
        what = "it yielded no batches" if not batches else "its batches have no labels"
        raise DataError(f"unrelated: {what}; perplexity is of labels: the tokens to predict, as in data")
    if not any(bool((batch.labels >= 0).any()) for batch in batches if batch.labels is not None):
        raise DataError(
            "unrelated: none of its labels is known, and perplexity is of labels; of texts, take the tokens that come "
            "next: npeff.language.Places(tokenizer, texts, where='every')"
        )
    return batches


class Writer:
    """Continues prompts greedily, so that the same weights give the same continuations.

    The model has ``generate``, as those of transformers; the data's tokenizer ``tokenizer(text, return_tensors="pt")``
    and ``decode``.

    Raises:
        ArgumentError: There is no ``generate``, or no tokenizer.
        DataError: A text has no tokens, or more than the model was made for.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, prompts: int | str | Sequence[str] | None, n_tokens: int
    ) -> None:
        self._model, self._tokenizer, self._n_tokens = model, tokenizer, n_tokens
        self._n_examples = int(prompts) if isinstance(prompts, int | np.integer) else 0
        self._given: list[Prompt] = []
        if not prompts:
            return
        if not callable(getattr(model, "generate", None)):
            raise ArgumentError(
                f"prompts: {type(model).__name__} has no generate(), so it continues no text; pass a causal language "
                "model of transformers, or leave prompts out"
            )
        if tokenizer is None:
            raise ArgumentError(
                "prompts: the data has no tokenizer to read them with; pass data=npeff.language.Places(tokenizer, …), "
                "or data with an attribute tokenizer"
            )
        try:
            check_vocabulary(model, tokenizer)
        except ArgumentError as error:
            raise ArgumentError(f"prompts: {error}") from error
        for text in () if isinstance(prompts, int | np.integer) else [prompts] if isinstance(prompts, str) else prompts:
            try:
                tokens = torch.from_numpy(prompt_ids(tokenizer, text))[None]
            except (TypeError, ValueError) as error:
                raise DataError(f"prompts: the tokenizer fails on {text!r}: {type(error).__name__}: {error}") from error
            if self._room(tokens) < 1:
                raise DataError(
                    f"prompts: {text[:40]!r}… has {tokens.shape[1]} tokens, more than {type(model).__name__} was made "
                    "for; give a shorter text"
                )
            if not tokens.numel():
                raise DataError(f"prompts: {text!r} has no tokens; give at least one word")
            self._given.append((None, tokens))

    def continued(
        self,
        weights: Weights,
        changes: Sequence[tuple[TensorsByName, float] | None],
        examples: Array,
        ids: Array,
        slices: Sequence[BatchSlice],
    ) -> tuple[Continuation, ...]:
        """Continue every prompt at the model's own weights, and with them moved down and up.

        ``changes`` are direction and magnitude of the move down and of the move up, None for no such move; ``examples``
        are indices of the top examples, in ``slices``, the largest coefficients first, and ``ids`` the positions in the
        data of all indices.
        """
        wanted = examples[: self._n_examples].tolist()
        own = {index: tokens for one in slices if wanted for index, tokens in _tokens(one) if index in wanted}
        prompts = [*self._given, *((int(ids[index]), own[index]) for index in wanted)]
        if not prompts:
            return ()
        base = self._texts(prompts)
        moved: list[list[str | None]] = []
        for change in changes:
            if change is None:
                moved.append([None] * len(prompts))
                continue
            with weights.at(*change):
                moved.append([*self._texts(prompts)])
        return tuple(
            Continuation(example, self._decoded(tokens[0]), *texts)
            for (example, tokens), *texts in zip(prompts, base, *moved, strict=True)
        )

    @torch.no_grad()
    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        device = next(self._model.parameters()).device
        ends, padding = (getattr(self._tokenizer, name, None) for name in ("eos_token_id", "pad_token_id"))
        texts = []
        for _, tokens in prompts:
            told = self._model.generate(  # type: ignore[operator]  # checked above
                input_ids=tokens.to(device),
                attention_mask=torch.ones_like(tokens, device=device),
                max_new_tokens=min(self._n_tokens, self._room(tokens)),
                do_sample=False,
                num_beams=1,
                pad_token_id=ends if padding is None else padding,
            )
            texts.append(self._decoded(told[0, tokens.shape[1] :]))
        return texts

    def _room(self, tokens: Tensor) -> int:
        """How many tokens can follow within the length that the model was made for; the last one is not read."""
        limit = getattr(getattr(self._model, "config", None), "max_position_embeddings", None)
        return self._n_tokens if limit is None else int(limit) - tokens.shape[1] + 1

    def _decoded(self, tokens: Tensor) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _tokens(one: BatchSlice) -> Iterator[tuple[int, Tensor]]:
    """Index and tokens up to the place, without padding, of each example.

    Raises:
        ArgumentError: The data has no tokens.
    """
    content, places = one.batch.content, one.batch.places
    if not isinstance(content, Mapping) or not isinstance(content.get("input_ids"), Tensor):
        raise ArgumentError(
            "prompts: expected texts, since the data's batches are no mappings with input_ids whose tokens could be "
            "continued"
        )
    tokens, mask = content["input_ids"], content.get("attention_mask")
    for index, row in zip(one.indices.tolist(), one.rows.tolist(), strict=True):
        sequence, end = (row, tokens.shape[1]) if places is None else (int(places[row, 0]), int(places[row, 1]) + 1)
        kept = tokens[sequence, :end]
        yield index, (kept if mask is None else kept[mask[sequence, :end].bool()])[None]
