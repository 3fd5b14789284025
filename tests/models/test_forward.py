"""The call of a model: which of its logits are made, and which entries of a batch it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from language_cases import VOCABULARY, token_batches
from npeff.batches.reading import read_batches
from npeff.models.forward import call_model
from tiny_language import model_of


class Scorer(nn.Module):
    """Class scores of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).mean(1))


class Reader(Scorer):
    def forward(self, ids: torch.Tensor, text: list[str]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(ids) * torch.tensor([len(t) for t in text])[:, None]


class Keywords(Scorer):
    def forward(self, ids: torch.Tensor, **others: Any) -> torch.Tensor:  # type: ignore[override]
        assert not others, f"unknown {list(others)}"
        return super().forward(ids)


def test_texts_go_to_the_models_that_take_them() -> None:
    ids, texts = torch.arange(8).view(4, 2), ["a", "bc", "def", "ghij"]
    batch = {"ids": ids, "labels": torch.tensor([0, 1, 2, 0]), "text": texts}
    without = {name: value for name, value in batch.items() if name != "text"}
    quiet = {"progress": False}
    model = Scorer().eval()
    for given in (batch, {**batch, "text": np.array(texts)}, {**without, "sentence": tuple(texts)}):
        found = npeff.compute_fishers(model, [given], **quiet)
        np.testing.assert_array_equal(found.rows.values, npeff.compute_fishers(model, [without], **quiet).rows.values)
    (read,) = read_batches([batch], torch.device("cpu"), False, True)
    reader = Reader().eval()
    torch.testing.assert_close(call_model(reader, None, read), reader(ids, texts))
    with pytest.raises(npeff.ModelError, match=r"the text entry 'text' of the batch went to the model too: forward="):
        npeff.compute_fishers(Keywords().eval(), [batch], **quiet)
    with pytest.raises(npeff.ModelError, match="unexpected keyword argument 'more'") as refused:
        npeff.compute_fishers(model, [{**batch, "more": ids}], **quiet)
    assert "text entry" not in str(refused.value), "it was left out"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba", "bert"])
def test_logits_before_the_first_place_are_not_made(kind: str) -> None:
    pytest.importorskip("transformers")
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
