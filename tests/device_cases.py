"""A model and a comparison of Fishers, for tests on devices."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import npeff
from npeff.fishers.rows import SparseRows


class Words(nn.Module):
    """A look-up, whose runs begin where the data says, layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12, padding_idx=0)
        self.layer = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.out = nn.Linear(24, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(torch.relu(self.layer(self.words(words)))).mean(1))


def words_and_data() -> tuple[Words, list[torch.Tensor]]:
    """Make the model, and three batches of five words an example."""
    torch.manual_seed(0)
    model = Words().eval()
    return model, [torch.randint(0, 20, (b, 5)) for b in (9, 7, 9)]


def same(one: npeff.Fishers, other: npeff.Fishers, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(one.row_offsets, other.row_offsets)
    np.testing.assert_allclose(one.norms, other.norms, rtol=1e-6)
    np.testing.assert_array_equal(one.logits, other.logits)
    if isinstance(one.rows, SparseRows):
        assert isinstance(other.rows, SparseRows)
        np.testing.assert_array_equal(one.rows.indptr, other.rows.indptr)
        np.testing.assert_array_equal(one.rows.indices, other.rows.indices)
    scale = np.abs(one.rows.values).max()
    np.testing.assert_allclose(other.rows.values, one.rows.values, rtol=tolerance, atol=tolerance * scale)
