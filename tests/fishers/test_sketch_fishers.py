"""Sketched Fishers, inner products without rows, and the way back to parameter space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.components.recovery import sketch_vectors
from npeff.errors import ArgumentError, DataError, ModelError, ResumeError, StorageError
from npeff.fishers.options import GramOnly, Sketch, TopK
from npeff.kernels import set_num_threads
from planted import best_cosines


class Small(nn.Module):
    """A look-up, a layer over T positions, one over a single position, a norm, and a Conv1D-like product."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12, padding_idx=0)
        self.layer = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.turned = nn.Parameter(torch.randn(24, 16) / 5)
        self.out = nn.Linear(16, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.relu(self.layer(self.words(words)))).mean(1)
        return self.out(torch.tanh(hidden @ self.turned))


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    """Batches of several sizes and lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (b, t), generator=generator) for b, t in ((9, 5), (7, 5), (9, 3), (5, 8))]


@pytest.fixture(scope="module")
def exact(model: Small, data: list[torch.Tensor]) -> npeff.Fishers:
    return npeff.compute_fishers(model, data, progress=False)


def compute(model: nn.Module, data: Any, compress: Any, **options: Any) -> npeff.Fishers:
    return npeff.compute_fishers(model, data, compress=compress, progress=False, **options)


SKETCHES = [Sketch(64), Sketch(64, seed=3, nonzeros=2), Sketch(16, form="kronecker"), Sketch(16, 1, "kronecker")]


# ---- sketched Fishers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_rows_are_the_sketches_of_the_exact_rows(
    model: Small, data: list[torch.Tensor], exact: npeff.Fishers, sketch: Sketch
) -> None:
    fishers = compute(model, data, sketch)
    assert fishers.sketch == sketch and fishers.rows.values.shape == (exact.rows.n_rows, sketch.d)
    assert fishers.dense(3).shape == (3, sketch.d)
    size = np.linalg.norm(exact.rows.values, axis=1).max()
    expected = sketch_vectors(sketch, exact.parameters, exact.rows.values)
    np.testing.assert_allclose(fishers.rows.values, expected, rtol=0, atol=3e-6 * size)
    np.testing.assert_allclose(fishers.norms, exact.norms, rtol=1e-4)
    np.testing.assert_array_equal(fishers.row_offsets, exact.row_offsets)


def test_two_sided_parameters_come_from_their_factors(
    model: Small, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formed or not, it is one sketch; and here it is not formed."""
    from npeff.fishers.sinks import SketchSink
    from npeff.gradients import blocks

    sketch, taken = Sketch(16, form="kronecker"), []
    put = SketchSink._put_pairs
    monkeypatch.setattr(  # whether factors are taken is decided by their cost, which small models do not reach
        SketchSink, "_put_pairs", lambda self, pairs: (taken.append(pairs.parameter.name), put(self, pairs))
    )
    always = lambda self, parameter, rules: len(rules) == 1 and sketch.two_sided(parameter.shape)  # noqa: E731
    monkeypatch.setattr(SketchSink, "paired", always)
    factored = compute(model, data, sketch)
    assert set(taken) == {"layer.weight", "turned"}
    monkeypatch.setattr(blocks.Tiling, "pairs", lambda *_: None)
    formed = compute(model, data, sketch)
    size = np.abs(formed.rows.values).max()
    np.testing.assert_allclose(factored.rows.values, formed.rows.values, rtol=0, atol=3e-6 * size)
    np.testing.assert_allclose(factored.norms, formed.norms, rtol=1e-5)


def test_batches_and_threads_do_not_change_a_sketch() -> None:
    """Bit for bit, where the gradients themselves are the same: sums of exactly representable products."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3).eval()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    inputs = torch.randint(-8, 9, (12, 40)).float()
    found = []
    for size, threads in ((12, 1), (5, 1), (1, 2), (4, 3)):
        set_num_threads(threads)
        try:
            found.append(compute(model, list(inputs.split(size)), Sketch(32)).rows.values)
        finally:
            set_num_threads(None)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_sketches_are_stored_and_resumed(model: Small, data: list[torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    whole = compute(model, data, Sketch(64, seed=5))

    def cut() -> Any:
        yield from data[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(model, cut(), Sketch(64, seed=5), out=out)
    with pytest.raises(ResumeError, match="seed"):
        compute(model, data, Sketch(64, seed=6), out=out)
    compute(model, data, Sketch(64, seed=5), out=out)
    opened = npeff.load(out)
    assert isinstance(opened, npeff.Fishers) and opened.sketch == Sketch(64, seed=5)
    np.testing.assert_array_equal(opened.rows.values, whole.rows.values)
    with pytest.raises(StorageError, match="published"):
        from npeff.components.published import write_published

        write_published(opened, tmp_path / "theirs.h5")


def test_what_sketches_cannot_do_is_refused(model: Small, data: list[torch.Tensor]) -> None:
    for compress in (Sketch(64), GramOnly()):
        with pytest.raises(ArgumentError, match="compress"):
            compute(model, data, compress, kind="diagonal")
        with pytest.raises(ArgumentError, match="block_weights"):
            npeff.decompose(compute(model, data, compress), 3, block_weights="balanced", progress=False)
    for bad in ({"d": 100}, {"d": 64, "form": "round"}, {"d": 48, "form": "kronecker"}, {"d": 64, "seed": -1}):
        with pytest.raises(ArgumentError):
            Sketch(**bad)
    with pytest.raises(ArgumentError, match="memory"):
        GramOnly(memory="much")
    with pytest.warns(UserWarning, match="no longer than sketches"):
        compute(model, data, Sketch(4096))


# ---- inner products without rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"energy": 0.8}, {"basis": "class"}, {"labels": "sampled", "n_samples": 2}])
@pytest.mark.parametrize("memory", ["1GB", "120kB"])
def test_inner_products_are_exact(model: Small, data: list[torch.Tensor], options: dict[str, Any], memory: str) -> None:
    rows = compute(model, data, None, **options)
    fishers = compute(model, data, GramOnly(memory), **options)
    A = rows.rows.values.astype(np.float64)
    K = A @ A.T
    assert np.abs(fishers.rows.values - K).max() <= 1e-5 * np.abs(K).max()
    np.testing.assert_allclose(fishers.norms, rows.norms, rtol=1e-5)
    np.testing.assert_array_equal(fishers.row_offsets, rows.row_offsets)
    with pytest.raises(ArgumentError, match="GramOnly"):
        fishers.dense(0)


class Images(nn.Module):
    """Convolutions, one of them grouped, and a parameter that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.twice = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x)))).mean((2,)).flatten(1)
        return self.out(self.twice(torch.tanh(self.twice(h))))


@pytest.mark.parametrize("contract", [True, False])
def test_inner_products_of_every_form_of_layer(contract: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from npeff.fishers import exact_gram, layer_gram

    torch.manual_seed(0)
    model = Images().eval()
    images = [torch.randn(b, 1, 8, 8) for b in (4, 3)]
    words = Small().eval()
    texts = [torch.randint(0, 20, (4, 6)), torch.randint(0, 20, (5, 3))]
    monkeypatch.setattr(layer_gram, "MERGED", 4)
    # Private: sizes choose between these ways, and each has to be right at any size.
    chosen = layer_gram._contracted if contract else layer_gram._formed
    monkeypatch.setattr(layer_gram, "_contracted", chosen)
    monkeypatch.setattr(layer_gram, "_formed", chosen)
    sides = [lambda n, parameter, rules: parameter.shape[0] % 3 == 0, lambda n, parameter, rules: True]
    for net, batches in ((model, images), (words, texts)):
        rows = compute(net, batches, None)
        A = rows.rows.values.astype(np.float64)
        for side in sides:
            monkeypatch.setattr(exact_gram, "_factors_are_smaller", side)
            K = compute(net, batches, GramOnly()).rows.values
            assert np.abs(K - A @ A.T).max() <= 1e-5 * np.abs(A @ A.T).max()


def test_inner_products_are_stored_and_opened_again(model: Small, data: list[torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "k.h5"
    fishers = compute(model, data, GramOnly(), out=out)
    again = compute(model, iter(data), GramOnly(), out=out)
    np.testing.assert_array_equal(fishers.rows.values, again.rows.values)
    np.testing.assert_array_equal(fishers[[4, 2]].rows.values, fishers.rows.take(np.r_[12:15, 6:9]).values)
    with pytest.raises(ResumeError):
        compute(model, data, GramOnly(), rank=2, out=out)
    with pytest.raises(DataError, match="second pass"):
        compute(model, iter(data), GramOnly("120kB"))
    with pytest.raises(ArgumentError, match="alone"):
        compute(model, data, GramOnly(1000))


# ---- recovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"labels": "true"}, {"energy": 0.9}], ids=str)
def test_inner_products_give_the_components_of_the_rows(
    model: Small, data: list[torch.Tensor], options: dict[str, Any]
) -> None:
    labelled = [(batch, torch.arange(len(batch)) % 4) for batch in data]
    search = {"n_init": 1, "n_replacements": 3, "progress": False, "space": "gram", "dtype": "float64"}
    rows = npeff.decompose(compute(model, labelled, None, **options), 4, **search)
    components = npeff.decompose(compute(model, labelled, GramOnly(), **options), 4, **search)
    assert components.loss == pytest.approx(rows.loss, abs=1e-5)
    cut = [(x[i : i + 4], y[i : i + 4]) for x, y in labelled for i in range(0, len(x), 4)]
    recovered = components.recover(model, cut, progress=False)
    vectors = np.stack([recovered.vector(j) for j in range(4)])
    assert best_cosines(vectors, rows.vectors).min() > 0.999
    np.testing.assert_allclose(np.abs(vectors @ vectors.T), components.cosines(), atol=1e-5)


@pytest.mark.parametrize("space", ["gram", "rows", "streamed"])
@pytest.mark.parametrize("sketch", [Sketch(128), Sketch(32, form="kronecker")], ids=str)
def test_sketched_components_come_back_from_every_space(
    model: Small, data: list[torch.Tensor], exact: npeff.Fishers, space: Any, sketch: Sketch, tmp_path: Path
) -> None:
    fishers = compute(model, data, sketch)
    components = npeff.decompose(fishers, 3, space=space, n_init=1, n_replacements=2, tolerance=1e-9, progress=False)
    with pytest.raises(ArgumentError, match=r"recover\(model, data, js=\[1\]\)"):
        components.vector(1)
    partly = components.recover(model, data, [1], progress=False)
    assert partly.vector(1).shape == (exact.n_parameters,)
    with pytest.raises(ArgumentError, match="recover"):
        partly.state_dict(0)
    recovered = partly.recover(model, data, [2, 0], progress=False)
    vectors = np.stack([recovered.vector(j) for j in range(3)])
    np.testing.assert_array_equal(vectors[1], partly.vector(1))
    expected = components.row_weights.T.astype(np.float64) @ exact.rows.values
    assert (np.sum(vectors * expected, axis=1) / np.linalg.norm(expected, axis=1)).min() > 1 - 1e-5
    sketched = sketch_vectors(sketch, exact.parameters, vectors)
    cosines = np.sum(sketched * components.vectors, axis=1) / np.linalg.norm(sketched, axis=1)
    assert cosines.min() > 0.99
    opened = npeff.load(recovered.save(tmp_path / "c.h5"))
    np.testing.assert_array_equal(opened.vector(2), recovered.vector(2))
    assert set(opened.state_dict(0)) == {name for name, _ in model.named_parameters()}
    assert sum(opened.block_energy(0).values()) == pytest.approx(1, abs=1e-5)


def test_subsets_are_recovered_from_their_own_examples(
    model: Small, data: list[torch.Tensor], exact: npeff.Fishers
) -> None:
    chosen = [25, 3, 3, 11, 17, 0]
    components = npeff.decompose(
        compute(model, data, Sketch(128))[chosen], 2, n_replacements=1, n_init=1, progress=False
    )
    recovered = components.recover(model, data, progress=False)
    expected = components.row_weights.T.astype(np.float64) @ exact[chosen].rows.values
    for j in range(2):
        assert recovered.vector(j) @ expected[j] / np.linalg.norm(expected[j]) > 1 - 1e-5


def test_recovery_refuses_what_is_not_the_same(model: Small, data: list[torch.Tensor], exact: npeff.Fishers) -> None:
    options = {"n_init": 1, "n_replacements": 1, "progress": False}
    components = npeff.decompose(compute(model, data, Sketch(64)), 2, **options)
    with pytest.raises(DataError, match="other logits"):
        components.recover(model, data[::-1], progress=False)
    with pytest.raises(DataError, match="without"):
        components.recover(model, data[:3], progress=False)
    other = Small().eval()
    with pytest.raises(ModelError):
        components.recover(other, data, progress=False)
    with pytest.raises(ArgumentError, match="parameter space already"):
        npeff.decompose(exact, 2, **options).recover(model, data)
    with pytest.raises(ArgumentError, match="component"):
        components.recover(model, data, [2])
    fishers = compute(model, data, Sketch(64))
    with pytest.raises(ArgumentError, match="expanded"):
        npeff.expand(components, fishers, 1, **options).recover(model, data)
    with pytest.raises(ArgumentError, match="compression"):
        components.encode(exact)
    with pytest.raises(ArgumentError, match="compression"):
        components.encode(compute(model, data, Sketch(64, seed=1)))


def test_sketched_components_encode_and_expand(model: Small, data: list[torch.Tensor]) -> None:
    fishers = compute(model, data, Sketch(256))
    components = npeff.decompose(fishers, 3, n_init=1, n_replacements=2, progress=False)
    encoded = components.encode(fishers)
    assert encoded.kkt.max() < 1e-5
    np.testing.assert_allclose(encoded.unexplained.mean(), components.loss, atol=1e-3)
    larger = npeff.expand(components, fishers, 2, n_init=1, n_replacements=1, progress=False)
    np.testing.assert_allclose(larger.vectors[:3], components.vectors, atol=1e-6)
    assert larger.loss < components.loss
    inner = npeff.decompose(compute(model, data, GramOnly()), 3, n_init=1, n_replacements=1, progress=False)
    for refuse in (lambda: inner.encode(fishers), lambda: components.encode(compute(model, data, GramOnly()))):
        with pytest.raises(ArgumentError, match="GramOnly"):
            refuse()


def test_two_sided_matrices() -> None:
    assert Sketch(16, form="kronecker").two_sided((16, 16)) and not Sketch(16, form="kronecker").two_sided((256,))
    assert not Sketch(16).two_sided((100, 100)) and TopK(3).k == 3
