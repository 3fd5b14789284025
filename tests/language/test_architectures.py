"""Fishers of places in the architectures of language models, compared with one backward pass per class."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from language_cases import VOCABULARY, token_batches
from npeff.batches.batches import read_batches
from npeff.models.forward import call_model
from tiny_language import model_of

pytest.importorskip("transformers")

DIRECTIONS = 6


def projected(model: nn.Module, data: Any, names: list[str]) -> np.ndarray:
    """``Vᵀ F V`` of each place with random directions V, by plain autograd: ``(n, k, k)``."""
    model = copy.deepcopy(model).float()
    tensors = [model.get_parameter(name) for name in names]
    found = []
    for batch in data:
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        for sequence, position in (batch["labels"] != -100).nonzero().tolist():
            z = logits[sequence, position]
            rows = [torch.autograd.grad(one, tensors, retain_graph=True, materialize_grads=True) for one in z]
            flat = torch.stack([torch.cat([g.ravel() for g in row]) for row in rows]).double()
            moved, p = flat @ directions(flat.shape[1]), z.detach().double().softmax(0)
            found.append((moved.T @ (torch.diag(p) - torch.outer(p, p)) @ moved).numpy())
    return np.stack(found)


def directions(n_parameters: int) -> Tensor:
    return torch.randn(n_parameters, DIRECTIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def agree(model: nn.Module, data: Any, tolerance: float = 1e-4, **options: Any) -> None:
    fishers = npeff.compute_fishers(model, data, progress=False, **options)
    v = directions(fishers.n_parameters).numpy()
    rows = [fishers.dense(i).astype(np.float64) @ v for i in range(len(fishers))]
    found = np.stack([row.T @ row for row in rows])
    exact = projected(model, data, [parameter.name for parameter in fishers.parameters])
    np.testing.assert_allclose(found, exact, atol=tolerance * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma2", "mamba", "bert"])
def test_places_have_the_fishers_of_autograd(kind: str, side: str) -> None:
    model = model_of(kind, vocab_size=VOCABULARY)
    agree(model, token_batches(side, every=2, counts=((5, 3), (4,))), parameters="blocks" if side == "left" else None)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tied: bool) -> None:
    agree(model_of("llama", vocab_size=VOCABULARY, tie_word_embeddings=tied), token_batches(every=2, counts=((4, 3),)))


def test_half_precision() -> None:
    model = model_of("llama", vocab_size=VOCABULARY)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    agree(rounded, token_batches(every=2, counts=((4,), (3,))), tolerance=0.1, parameters="blocks")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba", "bert"])
def test_logits_before_the_first_place_are_not_made(kind: str) -> None:
    model = model_of(kind, vocab_size=VOCABULARY)
    (content,) = token_batches("left", counts=((6, 5),))
    content["labels"][:, :4] = -100
    made = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda module, given, logits: made.append(logits.shape[1]))
    (batch,) = read_batches([content], torch.device("cpu"), False, True)
    logits = call_model(model, None, batch)
    whole = model(**{name: tensor for name, tensor in content.items() if name != "labels"}).logits
    torch.testing.assert_close(logits, whole[content["labels"] != -100])
    assert made == [6 if kind == "bert" else 2, 6]
    some = call_model(model, None, batch.take(torch.tensor([1, 3])))
    torch.testing.assert_close(some, logits[[1, 3]])
