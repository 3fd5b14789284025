"""Continuations of prompts by a language model, at its own weights and at moved ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, DataError
from npeff.perturbation.effect import Continuation
from npeff.perturbation.weights import TensorsByName, Weights


class Writer:
    """Continues prompts greedily, so that the same weights give the same texts.

    Args:
        model: A model with ``generate``, as those of transformers.
        tokenizer: Of the data: ``tokenizer(text, return_tensors="pt")``, ``decode``.
        prompts: Texts.
        n_tokens: Tokens of a continuation, at most.

    Raises:
        ArgumentError: There is no ``generate``, or no tokenizer.
        DataError: A prompt has no tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str], n_tokens: int) -> None:
        self._model, self._tokenizer, self._n_tokens = model, tokenizer, n_tokens
        self._prompts = list(prompts)
        if self._prompts and not callable(getattr(model, "generate", None)):
            raise ArgumentError(
                f"prompts: {type(model).__name__} has no generate(), so it continues no text; pass a causal language "
                "model of transformers, or leave prompts out"
            )
        if self._prompts and tokenizer is None:
            raise ArgumentError(
                "prompts: the data has no tokenizer to read them with; pass data=npeff.language.Places(tokenizer, …), "
                "or data with an attribute tokenizer"
            )
        device = next(model.parameters()).device
        self._inputs = [
            {name: part.to(device) for name, part in tokenizer(text, return_tensors="pt").items()}
            for text in self._prompts
        ]
        for text, inputs in zip(self._prompts, self._inputs, strict=True):
            if not inputs["input_ids"].numel():
                raise DataError(f"prompts: {text!r} has no tokens; give at least one word")

    def continued(
        self, weights: Weights, changes: Mapping[int, tuple[TensorsByName, float]]
    ) -> tuple[Continuation, ...]:
        """Continue every prompt at the model's own weights, and with them moved.

        Args:
            weights: Moves the model.
            changes: Direction and magnitude by sign.
        """
        if not self._prompts:
            return ()
        texts = {0: self._texts()}
        for sign, (direction, magnitude) in changes.items():
            with weights.at(direction, magnitude):
                texts[sign] = self._texts()
        every = [texts.get(sign, [None] * len(self._prompts)) for sign in (0, 1, -1)]
        return tuple(Continuation(prompt, *told) for prompt, *told in zip(self._prompts, *every, strict=True))

    @torch.no_grad()
    def _texts(self) -> list[str]:
        return [self._text(inputs) for inputs in self._inputs]

    def _text(self, inputs: Mapping[str, Tensor]) -> str:
        padding = getattr(self._tokenizer, "pad_token_id", None)
        ends = getattr(self._tokenizer, "eos_token_id", None)
        told = self._model.generate(  # type: ignore[operator]  # checked above
            **inputs,
            max_new_tokens=self._n_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=ends if padding is None else padding,
        )
        return str(self._tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
