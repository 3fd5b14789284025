"""Block weights that are applied while Fishers are computed, against weights applied to exact rows afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import npeff
from language_cases import SmallLanguageModel, token_batches
from npeff.components.recovery import sketch_vectors
from npeff.errors import ArgumentError, ResumeError
from npeff.fishers import passes
from npeff.fishers.block_weights import column_factors
from npeff.fishers.scaling import block_energy
from planted import best_cosines

WEIGHTS = {"embed.weight": 0.25, "up.*": 4.0, "down.bias": 0.0}
SEARCH: dict[str, Any] = {"n_init": 1, "n_replacements": 2, "progress": False, "dtype": "float64", "space": "gram"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return SmallLanguageModel(tied=True).eval()


@pytest.fixture(scope="module")
def data() -> list[dict[str, Tensor]]:
    return token_batches()


def compute(model: nn.Module, data: Any, compress: Any = None, **options: Any) -> npeff.Fishers:
    return npeff.compute_fishers(model, data, compress=compress, rank=3, progress=False, **options)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_rows_are_weighted(model: nn.Module, data: Any, kind: Any) -> None:
    plain, weighted = compute(model, data, kind=kind), compute(model, data, kind=kind, block_weights=WEIGHTS)
    assert weighted.block_weights is not None and weighted.block_weights["up.bias"] == 4
    expected = plain.rows.values * column_factors(plain.parameters, weighted.block_weights, kind)
    np.testing.assert_allclose(weighted.rows.values, expected, rtol=1e-5, atol=1e-7)
    rows = [expected[a:b].astype(np.float64) for a, b in zip(plain.row_offsets, plain.row_offsets[1:], strict=False)]
    norms = [np.linalg.norm(A @ A.T) if kind == "low_rank" else np.linalg.norm(A) for A in rows]
    np.testing.assert_allclose(weighted.norms, norms, rtol=1e-5)


def test_what_mixes_the_parameters_is_weighted_before(model: nn.Module, data: Any) -> None:
    exact = compute(model, data, block_weights=WEIGHTS)
    for sketch in (npeff.Sketch(64), npeff.Sketch(16, form="kronecker")):
        found = compute(model, data, sketch, block_weights=WEIGHTS).rows.values
        expected = sketch_vectors(sketch, exact.parameters, exact.rows.values)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    rows = exact.rows.values.astype(np.float64)
    gram = compute(model, data, npeff.GramOnly(), block_weights=WEIGHTS).rows.values
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-5 * np.abs(gram).max())
    topk = compute(model, data, npeff.TopK(20), block_weights=WEIGHTS)
    largest = np.sort(np.abs(exact.dense(2)).reshape(-1))[-20:]
    found = np.abs(topk.dense(2)).reshape(-1)
    np.testing.assert_allclose(np.sort(found[found > 0]), largest, rtol=1e-5)


def test_balanced_weights_give_every_layer_the_same_share(model: nn.Module, data: Any) -> None:
    fishers = compute(model, data[:1], block_weights="balanced")
    shares: dict[str, float] = {}
    for name, share in block_energy(fishers).items():
        layer = name.rpartition(".")[0]
        shares[layer] = shares.get(layer, 0.0) + share
    # Unit norms are those of the weighted Fishers now, so that the shares are equal up to that.
    assert max(shares.values()) < 3 * min(shares.values())
    plain = block_energy(compute(model, data[:1]))
    assert max(plain.values()) > 20 * min(value for value in plain.values() if value)
    described = fishers.provenance["options"]["block_weights"]
    assert described["choice"] == "balanced" and described["weights"] == fishers.block_weights
    afterwards = npeff.decompose(compute(model, data[:1]), 2, block_weights="balanced", **SEARCH)
    for name, weight in afterwards.block_weights.items():
        ratio = weight / fishers.block_weights[name] * fishers.block_weights["up.weight"]
        assert ratio == pytest.approx(afterwards.block_weights["up.weight"], rel=0.02)


@pytest.mark.parametrize("compress", [None, npeff.GramOnly(), npeff.Sketch(256)], ids=str)
def test_components_are_those_of_weights_applied_afterwards(model: nn.Module, data: Any, compress: Any) -> None:
    given = {**WEIGHTS, "embed.weight": 0.5}
    expected = npeff.decompose(compute(model, data), 3, block_weights=given, **SEARCH)
    before = compute(model, data, compress, block_weights=given)
    components = npeff.decompose(before, 3, **SEARCH)
    assert components.block_weights == expected.block_weights
    if compress is not None:
        components = components.recover(model, data, progress=False)
    vectors = np.stack([components.vector(j) for j in range(3)])
    truth = np.stack([expected.vector(j) for j in range(3)])
    assert best_cosines(vectors, truth).min() > (0.98 if isinstance(compress, npeff.Sketch) else 0.999)
    assert not vectors[:, before.parameters.block("down.bias")].any()
    if not isinstance(compress, npeff.GramOnly):
        encoded = components.encode(compute(model, data, compress, block_weights=components.block_weights))
        np.testing.assert_allclose(encoded.coefficients, components.coefficients, atol=0.01)
    if compress is None:
        afterwards = components.encode(compute(model, data)).coefficients  # the weights that are missing are applied
        np.testing.assert_allclose(afterwards, encoded.coefficients, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(model: nn.Module, data: Any) -> None:
    for wrong, words in (
        ({"nothing": 1.0}, "matches no parameter"),
        ("even", "expected 'energy'"),
        ({"*": 0}, "weight 0"),
    ):
        with pytest.raises(ArgumentError, match=words):
            compute(model, data, block_weights=wrong)
    components = npeff.decompose(compute(model, data, npeff.Sketch(64), block_weights=WEIGHTS), 2, **SEARCH)
    with pytest.raises(ArgumentError, match="compute them with the same block_weights"):
        components.encode(compute(model, data, npeff.Sketch(64)))
    with pytest.raises(ArgumentError, match=r"down\.bias had weight 0"):
        npeff.decompose(compute(model, data, block_weights=WEIGHTS), 2, block_weights={"*": 1.0}, **SEARCH)


def test_work_that_goes_on_keeps_its_weights(
    model: nn.Module, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.h5"

    class Interrupted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield self[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(model, Interrupted(data), npeff.Sketch(64), block_weights="balanced", out=out)
    monkeypatch.setattr(passes, "PilotEnergy", None)  # another pilot would need it
    fishers = compute(model, data, npeff.Sketch(64), block_weights="balanced", out=out)
    assert fishers.block_weights is not None and len(fishers) == sum(int((b["labels"] != -100).sum()) for b in data)
    assert (
        compute(model, data, npeff.Sketch(64), block_weights="balanced", out=out).block_weights == fishers.block_weights
    )
    with pytest.raises(ResumeError, match="block_weights"):
        compute(model, data, npeff.Sketch(64), out=out)
    opened = npeff.load(out)
    assert isinstance(opened, npeff.Fishers) and opened.block_weights == fishers.block_weights
