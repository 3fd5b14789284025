"""Sums of rows against dense rows: whole vectors and factors, in both orders of summation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from language_cases import SmallLanguageModel, token_batches
from npeff.components import row_sums
from npeff.components.factored import RangeSketch, slots
from npeff.errors import ArgumentError, DataError

OPTIONS: dict[str, Any] = {"n_init": 1, "n_replacements": 1, "progress": False}


class Mixed(nn.Module):
    """A table that is the output layer too, a convolution, a product ``x W`` over positions, linear layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 32)
        self.convolution = nn.Conv1d(32, 64, 3, padding=1)
        self.turned = nn.Parameter(torch.randn(64, 80) / 8)
        self.norm = nn.LayerNorm(80)
        self.back = nn.Linear(80, 32)

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.relu(self.convolution(self.words(words).mT)).mT @ self.turned
        return self.back(torch.tanh(self.norm(hidden)))[:, -1] @ self.words.weight.T


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 200, (b, t), generator=generator) for b, t in ((9, 5), (7, 5), (9, 3), (5, 8))]


def decomposed(model: nn.Module, data: Any, r: int, rank: int = 3) -> tuple[npeff.Components, np.ndarray]:
    """Components of inner products, and their vectors as sums of dense rows in float64, of unit norm."""
    rows = npeff.compute_fishers(model, data, rank=rank, progress=False).rows.values.astype(np.float64)
    fishers = npeff.compute_fishers(model, data, rank=rank, compress=npeff.GramOnly(), progress=False)
    components = npeff.decompose(fishers, r, **OPTIONS)
    assert components.row_weights is not None
    expected = components.row_weights.T.astype(np.float64) @ rows
    return components, expected / np.linalg.norm(expected, axis=1, keepdims=True)


@pytest.mark.parametrize("enough", [1, 64, 10_000])
@pytest.mark.parametrize("r", [2, 5])
def test_whole_vectors_are_the_sums_of_rows(
    model: Mixed, data: list[Tensor], enough: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "ENOUGH", enough)  # how many rows wait for each other decides nothing
    components, expected = decomposed(model, data, r)  # fewer, or more, than the rows of an example
    recovered = components.recover(model, data, progress=False)
    for j in range(r):
        np.testing.assert_allclose(recovered.vector(j), expected[j], atol=2e-6)


@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_places_of_sequences(tied: bool, r: int) -> None:
    model, data = SmallLanguageModel(tied).eval(), token_batches()
    components, expected = decomposed(model, data, r)
    recovered = components.recover(model, data, progress=False)
    factored = components.recover(model, data, rank=2, progress=False)
    for j in range(r):
        np.testing.assert_allclose(recovered.vector(j), expected[j], atol=2e-6)
        kept = 1 - float(factored.factored_lost[j].sum())
        assert factored.vector(j) @ expected[j] == pytest.approx(np.sqrt(kept), abs=0.05)


@pytest.mark.parametrize("r", [2, 5])
def test_factors_of_a_low_rank_matrix_are_exact(model: Mixed, r: int) -> None:
    few = [torch.tensor([[3, 7], [7, 3]])]  # every block is a sum of at most 4 outer products
    components, expected = decomposed(model, few, r)
    recovered = components.recover(model, few, rank=4, progress=False)
    assert recovered.factored_vectors is not None and recovered.recovered is None and not recovered.not_recovered
    sketched = [s.parameter.name for s in slots(components.parameters, 4) if s.rank and RangeSketch(s.size, 4).smaller]
    assert sketched == ["turned", "words.weight", "convolution.weight"]
    assert recovered.factored_lost.max() < 1e-10
    for j in range(r):
        np.testing.assert_allclose(recovered.vector(j), expected[j], atol=5e-6)


def test_what_factors_lose_is_measured(model: Mixed, data: list[Tensor]) -> None:
    components, expected = decomposed(model, data, 4)
    recovered = components.recover(model, data, rank=2, progress=False)
    for j in range(4):
        vector = recovered.vector(j).astype(np.float64)
        kept = 1 - float(recovered.factored_lost[j].sum())
        assert 0.2 < kept < 1
        np.testing.assert_allclose(vector @ expected[j], np.sqrt(kept), atol=0.03)


@pytest.mark.parametrize("decay", [0.3, 0.8])
def test_projections_give_factors_near_the_best(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, k, rank, draws = 90, 120, 3, 40
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for size in (n, k))
    G = (U * decay ** torch.arange(n)) @ V[:, :n].T
    best, true, told = float((decay ** (2 * torch.arange(rank, n))).sum()), [], []
    for seed in range(draws):
        sketch = RangeSketch((n, k), rank)
        generator.manual_seed(seed)
        for name, shape in (("right", sketch.right.shape), ("left", sketch.left.shape)):
            sketch.__dict__[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        assert sketch.smaller
        left, right, lost = sketch.factors((G @ sketch.right)[None], (sketch.left.T @ G)[None])
        true.append(float((G - left[0] @ right[0]).square().sum()))
        told.append(float(lost))
    assert np.mean(true) < 1.5 * best
    assert np.mean(told) == pytest.approx(np.mean(true), rel=0.2)  # the mean of the estimates is the truth


def test_vectors_of_both_forms_in_one_file(model: Mixed, data: list[Tensor], tmp_path: Path) -> None:
    components, expected = decomposed(model, data, 4)
    whole = components.recover(model, data, [2], progress=False)
    both = whole.recover(model, data, [2, 0], rank=2, progress=False)
    assert both.factored.tolist() == [0] and both.recovered.tolist() == [2] and both.not_recovered == [1, 3]
    assert both.recover(model, [], [0, 2], rank=2, progress=False) is both, "nothing is computed twice"
    opened = npeff.load(both.save(tmp_path / "c.h5"))
    assert isinstance(opened, npeff.Components) and opened.rank == 2
    for j in (0, 2):
        np.testing.assert_array_equal(opened.vector(j), both.vector(j))
    np.testing.assert_allclose(opened.vector(2), expected[2], atol=2e-6)
    other = opened.recover(model, data, [1], rank=3, progress=False)  # a file has factors of one rank
    assert other.rank == 3 and other.factored.tolist() == [0, 1]
    assert other.factored_lost[0].sum() < both.factored_lost[0].sum()
    with pytest.raises(ArgumentError, match="rank: expected an integer ≥ 1"):
        components.recover(model, data, rank=0)


# ---- vectors when they are asked for ---------------------------------------------------------------------------------


def test_vectors_that_are_asked_for_are_recovered_once_and_kept(
    model: Mixed, data: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, expected = decomposed(model, data, 4)
    path = components.save(tmp_path / "c.h5")
    opened = npeff.load(path)
    assert isinstance(opened, npeff.Components)
    with pytest.raises(ArgumentError, match="give them"):
        opened.state_dict(1)
    with pytest.raises(DataError, match="once only"):
        opened.state_dict(1, model, iter(data))
    tensors = opened.state_dict(1, model, data, progress=False)
    np.testing.assert_allclose(np.concatenate([t.flatten() for t in tensors.values()]), expected[1], atol=2e-6)
    npeff.perturb(model, data, opened, 2, n_random=0, curve=0, n_resamples=0, top=8, baseline="all", progress=False)
    again = npeff.load(path)
    assert isinstance(again, npeff.Components) and again.not_recovered == [0, 3]
    monkeypatch.setattr(row_sums, "RowSums", None)  # another pass would need it
    for j in (1, 2):
        opened.state_dict(j)
        again.save_state_dict(j, tmp_path / "g.safetensors", model, data)


def test_a_file_of_other_components_is_left_alone(model: Mixed, data: list[Tensor], tmp_path: Path) -> None:
    components, _ = decomposed(model, data, 4)
    other, _ = decomposed(model, data, 3)
    path = components.save(tmp_path / "c.h5")
    other.save(path)
    components.state_dict(0, model, data, progress=False)
    found = npeff.load(path)
    assert isinstance(found, npeff.Components) and len(found) == 3 and len(found.not_recovered) == 3
    path.unlink()
    with pytest.warns(UserWarning, match="could not be kept"):
        components.state_dict(1, model, data, progress=False)
    assert components.not_recovered == [2, 3]
