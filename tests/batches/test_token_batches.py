"""Batches under a budget of tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import npeff


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 200), st.booleans())
def test_every_sequence_once_and_none_too_many(lengths: list[int], tokens: int, sort: bool) -> None:
    batches = npeff.TokenBatches(lengths, tokens, sort=sort)
    found = list(batches)
    assert len(found) == len(batches)
    assert all(batch and len(batch) * max(lengths[i] for i in batch) <= tokens for batch in found)
    flat = [i for batch in found for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert flat == batches.order.tolist()
    if not sort:
        assert flat == list(range(len(lengths)))
    for before, after in pairwise(found):  # no batch could have taken one more
        assert (len(before) + 1) * max(lengths[i] for i in [*before, after[0]]) > tokens


def test_too_long_is_refused() -> None:
    with pytest.raises(npeff.ArgumentError, match="sequence 1"):
        npeff.TokenBatches([3, 9], 8)
    for lengths in ([0], [2.5], ["a"], [[1]]):
        with pytest.raises(npeff.ArgumentError, match="lengths"):
            npeff.TokenBatches(lengths, 8)
    for tokens in (2.5, True, "8"):
        with pytest.raises(npeff.ArgumentError, match="tokens: expected an integer"):
            npeff.TokenBatches([1], tokens)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 5, padding_idx=0)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens)).sum(1))


def test_fishers_come_back_in_the_order_of_the_data() -> None:
    torch.manual_seed(0)
    model = Bag().eval()
    texts = [torch.randint(1, 12, (n,)) for n in (2, 7, 3, 1, 5, 6)]
    batches = npeff.TokenBatches([len(text) for text in texts], 14)
    loader = DataLoader(texts, batch_sampler=batches, collate_fn=lambda some: pad_sequence(some, batch_first=True))
    fishers = npeff.compute_fishers(model, loader, kind="diagonal", progress=False)[np.argsort(batches.order)]
    for i, text in enumerate(texts):
        alone = npeff.compute_fishers(model, [text[None]], kind="diagonal", progress=False)
        np.testing.assert_allclose(fishers.dense(i), alone.dense(0), rtol=1e-5, atol=1e-8)
