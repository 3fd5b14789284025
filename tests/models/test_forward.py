"""The call of a model: which of its logits are made."""

from __future__ import annotations

import pytest
import torch

from language_cases import VOCABULARY, token_batches
from npeff.batches.reading import read_batches
from npeff.models.forward import call_model
from tiny_language import model_of

pytest.importorskip("transformers")


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
    assert made == ([6, 6] if kind == "bert" else [2, 3, 2, 6]), "the argument is tried before"
    some = call_model(model, None, batch.take(torch.tensor([1, 3])))
    torch.testing.assert_close(some, logits[[1, 3]])
