"""What is remembered of a graph holds for the next one only where both are equal, parameters and sizes included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff


class Alternating(nn.Module):
    """Takes one of two layers of the same shape, by what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.one if bool((x[:, 0] > 0).all()) else self.other
        return self.out(torch.tanh(layer(x)))


@pytest.mark.parametrize("compress", [None, npeff.TopK(20), npeff.Sketch(16)])
def test_graphs_of_equal_operations_on_other_parameters(compress: npeff.Compression | None) -> None:
    torch.manual_seed(0)
    model = Alternating().eval()
    data = [torch.randn(size, 4) for size in (5, 5, 3, 5, 3, 5)]
    for number, batch in enumerate(data):
        batch[:, 0] = batch[:, 0].abs() * (-1) ** number
    together = npeff.compute_fishers(model, data, compress=compress, progress=False)
    apart = [npeff.compute_fishers(model, [batch], compress=compress, progress=False) for batch in data]
    rows = together.rows.dense(0, together.rows.n_rows)
    np.testing.assert_array_equal(rows, np.concatenate([f.rows.dense(0, f.rows.n_rows) for f in apart]))
    np.testing.assert_array_equal(together.norms, np.concatenate([f.norms for f in apart]))
