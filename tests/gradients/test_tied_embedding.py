"""A table that is used as embedding and as output layer is not formed for sketches and selections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from npeff.fishers.sinks import SketchSink
from npeff.gradients.rules import Rule
from npeff.models.parameters import Parameter


class Tied(nn.Module):
    """Predicts the last word; one row of the table may be padding."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8, padding_idx=padding)
        self.mix = nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.table(words))).mean(dim=1)
        return nn.functional.linear(hidden, self.table.weight)


def always(sink: SketchSink, parameter: Parameter, rules: list[Rule]) -> bool:
    """Take the factors of all matrices."""
    return len(rules) == 1 and sink._sketch.two_sided(parameter.shape)  # the sketch that the sink was made with


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("compress", [npeff.TopK(60), npeff.Sketch(16, form="kronecker")])
def test_in_factors_as_formed(monkeypatch: pytest.MonkeyPatch, padding: int | None, kind: Any, compress: Any) -> None:
    if kind == "diagonal" and isinstance(compress, npeff.Sketch):
        pytest.skip("there are no such sketches")
    torch.manual_seed(0)
    model = Tied(padding).eval()
    data = [torch.tensor([[0, 3, 3, 7], [5, 5, 5, 5], [1, 2, 3, 4]]), torch.randint(0, 40, (4, 4))]
    options: dict[str, Any] = {"kind": kind, "compress": compress, "labels": "sampled", "n_samples": 2}
    formed = npeff.compute_fishers(model, data, progress=False, **options)
    shapes: list[str] = []
    monkeypatch.setattr("npeff.gradients.blocks.TILE_ELEMENTS", 100)
    monkeypatch.setattr(SketchSink, "paired", always)
    plain = npeff.gradients.blocks.Tiling.tied
    monkeypatch.setattr("npeff.gradients.blocks.Tiling.tied", lambda *given: shapes.append("tied") or plain(*given))
    factored = npeff.compute_fishers(model, data, progress=False, **options)
    assert shapes
    np.testing.assert_allclose(factored.norms, formed.norms, rtol=1e-5)
    if isinstance(compress, npeff.TopK):
        one, other = (fishers.rows.dense(0, fishers.rows.n_rows) for fishers in (factored, formed))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    else:
        largest = np.abs(formed.rows.values).max()
        np.testing.assert_allclose(factored.rows.values, formed.rows.values, atol=2e-6 * largest)
