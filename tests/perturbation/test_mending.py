"""Mending: wrong answers are repaired within the span of components, everything else stays, the model is restored."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.batches.reading import read_batch
from npeff.perturbation.evaluate import CheckedModel
from npeff.perturbation.mending import divide_examples, mend
from npeff.perturbation.repair import DirectionBlock, LabelledExamples, LayerSteps, Repair
from npeff.perturbation.weights import Weights, applied


@pytest.fixture(scope="module")
def shortcut():
    """Three classes told apart by six inputs; a seventh input, when it is on, made every training label 2."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def sample(n: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 7, generator=generator)
        truth = x[:, :6].reshape(n, 3, 2).sum(2).argmax(1)
        flag = torch.rand(n, generator=generator) < share
        x[:, 6] = 3.0 * flag
        return x, truth, flag

    x, y, flag = sample(3000, 0.15)
    y = torch.where(flag, 2, y)
    model = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    x, y, flag = sample(500, 0.3)
    data = list(zip(x.split(128), y.split(128), strict=True))
    fishers = npeff.compute_fishers(model, data, progress=False)
    components = npeff.decompose(fishers, 8, progress=False, n_init=1, n_replacements=4)
    return model, data, components, (flag & (y != 2)).numpy()


def test_a_shortcut_is_mended(shortcut) -> None:
    model, data, components, fooled = shortcut
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mending = mend(model, data, components, range(8), repair=np.flatnonzero(fooled), progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert mending.changed and mending.held_out
    assert mending.repaired[0] < 0.2
    assert mending.repaired[1] > mending.repaired[0] + 0.3
    assert mending.accuracy[1] > mending.accuracy[0] - 0.05
    x, y = data[0]
    with torch.no_grad(), applied(model, mending.change):
        changed = (model(x).argmax(1) == y)[torch.from_numpy(fooled[: len(y)])].float().mean()
    assert changed > 0.3
    json.dumps(mending.to_json())


@pytest.mark.parametrize("by_layer", [True, False])
def test_the_change_lies_in_the_span(shortcut, by_layer) -> None:
    model, data, components, fooled = shortcut
    mending = mend(
        model, data, components, [1, 4], repair=np.flatnonzero(fooled), progress=False, tolerance=1.0, by_layer=by_layer
    )
    assert mending.layers == (("0", "2") if by_layer else ("",))
    for name, change in mending.change.items():
        steps = mending.coefficients[:, mending.layers.index(name.partition(".")[0]) if by_layer else 0]
        expected = sum(
            c * components.state_dict(j)[name].numpy() for c, j in zip(steps, mending.components, strict=True)
        )
        np.testing.assert_allclose(change.numpy(), expected, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("by_layer", [True, False])
def test_gradient_is_the_slope_of_the_objective(shortcut, by_layer) -> None:
    model, data, components, fooled = shortcut
    model = model.double()
    try:
        batches = [read_batch((x.double(), y), torch.device("cpu"), i, False) for i, (x, y) in enumerate(data)]
        examples = LabelledExamples(
            CheckedModel(model, components.parameters, torch.device("cpu"), None, "categorical", None), batches
        )
        vectors = [
            {p.name: DirectionBlock(torch.from_numpy(G).double()) for p, G, _ in components.blocks(j)} for j in (0, 3)
        ]
        shapes = {p.name: p.shape for p in components.parameters}
        kept = ~fooled & (np.arange(len(fooled)) % 3 > 0)
        weights = Weights(model)
        fitted = fooled, kept
        loss = Repair(examples, weights, LayerSteps(vectors, shapes, by_layer), fitted, fitted, 0.0)
        try:
            c = np.array([0.3, -0.2, 0.1, 0.4]) if by_layer else np.array([0.3, -0.2])
            _, gradient = loss.value_and_gradient(c, 2.0)
            for i, step in enumerate(np.eye(len(c)) * 1e-4):
                up, down = (loss.value_and_gradient(c + s, 2.0)[0] for s in (step, -step))
                assert gradient[i] == pytest.approx((up - down) / 2e-4, rel=1e-4)
        finally:
            weights.restore()
    finally:
        model.float()


@pytest.mark.parametrize("by_layer", [True, False])
def test_nothing_is_changed_when_the_tolerance_forbids_it(shortcut, monkeypatch, by_layer) -> None:
    model, data, components, fooled = shortcut
    monkeypatch.setattr(Repair, "within", lambda self, c: False)
    mending = mend(
        model, data, components, 0, repair=np.flatnonzero(fooled), progress=False, by_layer=by_layer, iterations=2
    )
    assert not mending.changed
    assert all(not tensor.any() for tensor in mending.change.values())


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("by_layer", [True, False])
def test_the_tolerance_includes_a_standard_error_of_the_fall(shortcut, tolerance, by_layer) -> None:
    model, data, components, fooled = shortcut
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    watched = ~fooled & (divide_examples(fooled, 0) != 2)
    for which in (0, 2):
        mending = mend(
            model, data, components, which, repair=np.flatnonzero(fooled), tolerance=tolerance, by_layer=by_layer,
            progress=False,
        )  # fmt: skip
        with torch.no_grad():
            before = (model(x).argmax(1) == y).numpy()[watched]
            with applied(model, mending.change):
                after = (model(x).argmax(1) == y).numpy()[watched]
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        assert lost - gained + (lost + gained) ** 0.5 <= tolerance * watched.sum() + 1e-9


def test_along_a_line_no_step_of_a_fine_grid_repairs_much_more(shortcut) -> None:
    """The published search: one component, all layers together, so that the best step can be found by trying all."""
    model, data, components, fooled = shortcut
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    fooled = torch.from_numpy(fooled)

    def right(change: dict[str, torch.Tensor], step: float) -> torch.Tensor:
        with torch.no_grad(), applied(model, change, step):
            return model(x).argmax(1) == y

    for j in range(components.n_components):
        mending = mend(
            model, data, components, j, repair=np.flatnonzero(fooled), by_layer=False, tolerance=0.05, progress=False
        )
        mended = right(mending.change, 1.0)
        before = right(mending.change, 0.0)
        g, best = components.state_dict(j), 0.0
        for step in np.linspace(-6, 6, 121):
            moved = right(g, float(step))
            if moved[~fooled].double().mean() >= before[~fooled].double().mean() - 0.02:
                best = max(best, float(moved[fooled].double().mean()))
        assert mended[~fooled].double().mean() >= before[~fooled].double().mean() - 0.05
        assert mended[fooled].double().mean() >= best - 0.1


@pytest.mark.parametrize("by_layer", [True, False])
def test_vectors_known_as_factors_mend_as_whole_ones_do(shortcut, monkeypatch, by_layer) -> None:
    model, data, _, fooled = shortcut
    fishers = npeff.compute_fishers(model, data, compress=npeff.GramOnly(), progress=False)
    components = npeff.decompose(fishers, 8, progress=False, n_init=1, n_replacements=4)
    factored = components.recover(model, data, rank=2, progress=False)
    vectors = np.stack([factored.vector(j) for j in range(8)])
    whole = replace(components, recovered=np.arange(8), recovered_vectors=vectors)
    few = {"tolerance": 1.0, "iterations": 2}  # so that rounding has no time to grow
    options = {"repair": np.flatnonzero(fooled), "by_layer": by_layer, "progress": False, **few}
    expected = mend(model, data, whole, range(8), **options)
    monkeypatch.setattr(npeff.Components, "vector", None)  # they are never multiplied out
    found = mend(model, data, factored, range(8), **options)
    assert expected.changed and found.repaired == expected.repaired and found.accuracy == expected.accuracy
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-4, atol=1e-4)
    for name, change in expected.change.items():
        torch.testing.assert_close(found.change[name], change, rtol=1e-4, atol=1e-4)


def test_by_default_the_wrong_answers_of_the_components_are_repaired(shortcut) -> None:
    model, data, components, _ = shortcut
    largest = max(components.strategies(2), key=lambda group: group.coefficient.sum())
    mending = mend(model, data, components, largest, progress=False)
    assert mending.components == largest.components
    wrong = components.predictions != components.labels
    assert 0 < mending.n_repair <= wrong.sum()


def test_the_root_of_several_groups_gives_a_warning(shortcut, recwarn) -> None:
    model, data, components, fooled = shortcut
    few = {"iterations": 1, "repair": fooled, "progress": False}
    told = "which: this strategy is the root of a tree: all 8 components are used, those of its 3 groups together"
    with pytest.warns(UserWarning, match=told) as caught:
        assert mend(model, data, components, components.strategies(3), **few).components == tuple(range(8))
    assert caught[0].filename == __file__
    recwarn.clear()
    for which in (components.strategies(1), range(8), next(iter(components.strategies(3)))):
        mend(model, data, components, which, **few)
    assert not [w for w in recwarn.list if "root of a tree" in str(w.message)]


def test_a_result_on_few_examples_says_so(shortcut, recwarn) -> None:
    model, data, components, fooled = shortcut
    options = {"iterations": 2, "progress": False}
    few = np.flatnonzero(fooled)[:6]
    with pytest.warns(UserWarning, match="judged on 6 examples to repair and 494 others, those of the search itself"):
        mending = mend(model, data, components, 1, repair=few, **options)
    assert "Mending(component 1 in 2 layers: right on" in repr(mending) and " of 6 to repair" in repr(mending)
    assert "held_out=False, judged on the examples of the search itself" in str(mending)
    with pytest.warns(UserWarning, match="judged on 10 examples to repair and 115 others: that on new examples"):
        mending = mend(model, data, components, 1, repair=np.flatnonzero(fooled)[:40], **options)
    assert " of 10 to repair" in repr(mending) and "held_out=True" in repr(mending)
    recwarn.clear()
    assert mend(model, data, components, 1, repair=fooled, **options).n_repair >= 20
    assert not recwarn.list


def test_components_of_a_file_of_fishers_mend_without_warnings_of_torch(shortcut, tmp_path) -> None:
    """Arrays of a file are read-only, of which torch warns."""
    model, data, _, _ = shortcut
    fishers = npeff.compute_fishers(model, data, out=tmp_path / "fishers.h5", progress=False)
    components = npeff.decompose(fishers, 2, progress=False, n_init=1, n_replacements=0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # otherwise the first warning of a process is the only one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "mend: its result is judged on")
            mend(model, data, components, 1, iterations=1, progress=False)
    finally:
        torch.set_warn_always(always)


def test_outputs_that_do_not_fit_are_refused(shortcut, monkeypatch) -> None:
    model, data, components, _ = shortcut
    monkeypatch.setattr("npeff.perturbation.repair.available_bytes", lambda device: 1000)
    with pytest.raises(npeff.ArgumentError, match=r"data: 500 examples have 3 outputs each.* take 12.0 kB, and 1.0 kB"):
        mend(model, data, components, 0, progress=False)


def test_one_yes_or_no_question_is_mended_as_two_classes_are() -> None:
    """A Bernoulli output z is the two logits 0 and z: the same directions repair the same examples."""
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    y = (x[:, 0] + 0.7 * torch.randn(120) > 0).long()
    data = list(zip(x.split(40), y.split(40), strict=True))
    one = nn.Sequential(nn.Linear(4, 1)).eval()
    fishers = npeff.compute_fishers(one, data, likelihood="bernoulli", progress=False)
    components = npeff.decompose(fishers, 3, progress=False, n_init=1, n_replacements=0)
    with torch.no_grad():
        wrong = ((one(x)[:, 0] > 0) != (y == 1)).numpy()

    def both(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.zeros(len(batch[0]), 1), model(batch[0])], 1)

    asked = {"repair": np.flatnonzero(wrong), "tolerance": 1.0, "progress": False}
    found = mend(one, data, components, range(3), **asked)
    two = replace(components, provenance={}, logits=np.zeros((120, 0), np.float32))
    expected = mend(one, data, two, range(3), forward=both, **asked)
    assert found.changed and found.repaired[0] == 0 and found.repaired == expected.repaired
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("likelihood", "width"), [("gaussian", 3), ("bernoulli", 3)])
def test_outputs_that_are_no_class_are_not_mended(shortcut, likelihood, width) -> None:
    model, data, components, fooled = shortcut
    known = replace(components, provenance={"fishers": {"options": {"likelihood": likelihood}}})
    with pytest.raises(npeff.DataError, match=f"labels: mending repairs predicted classes; {width} {likelihood}"):
        mend(model, data, known, 0, repair=np.flatnonzero(fooled), progress=False)


def test_a_model_or_data_that_is_not_that_of_the_components_is_refused(shortcut) -> None:
    model, data, components, fooled = shortcut
    wrong = {"repair": np.flatnonzero(fooled), "progress": False}
    with pytest.raises(npeff.ArgumentError, match=r"the components are of a parameter '0\.weight'"):
        mend(nn.Linear(7, 3), data, components, 0, **wrong)
    with pytest.raises(npeff.ModelError, match="eval"):
        mend(nn.Sequential(*model, nn.Dropout()).train(), data, components, 0, **wrong)
    with pytest.raises(npeff.DataError, match="logits: example 0 has the logits"):
        mend(model, [(x * torch.nan, y) for x, y in data], components, 0, **wrong)
    with pytest.raises(npeff.DataError, match="labels: expected classes below 3, the model's outputs, got 7"):
        mend(model, [(x, y + 5 * (y == 2)) for x, y in data], components, 0, **wrong)
    with pytest.raises(npeff.DataError, match=r"labels: expected classes, got 2\.5"):
        mend(model, [(x, y + 0.5) for x, y in data], components, 0, **wrong)
    with pytest.raises(npeff.DataError, match="labels: expected one class per example, got shape"):
        two = [npeff.Batch((x, torch.stack([y, y], 1)), places=False) for x, y in data]
        mend(model, two, components, 0, **wrong)
    with pytest.raises(npeff.DataError, match="have other outputs than when the Fishers were computed"):
        mend(model, data[::-1], components, 0, progress=False)


def test_positions_may_be_a_mask_and_no_others_may_be_left(shortcut) -> None:
    model, data, components, fooled = shortcut
    options = {"iterations": 2, "progress": False}
    mask, positions = (mend(model, data, components, 1, repair=r, **options) for r in (fooled, np.flatnonzero(fooled)))
    assert mask.to_json() == positions.to_json() and 0 < mask.n_repair < fooled.sum()
    with pytest.raises(npeff.ArgumentError, match="repair: expected positions of examples in data"):
        mend(model, data, components, 0, repair=[1.5, 2.5], **options)
    everything = mend(model, data, components, 1, repair=range(500), **options)
    assert everything.n_others == 0 and np.isnan(everything.accuracy).all()
    assert everything.to_json()["accuracy"] == [None, None] and ", no others;" in repr(everything)


def test_bad_arguments_are_named(shortcut) -> None:
    model, data, components, fooled = shortcut
    unlabelled = [x for x, _ in data]
    for call, error, text in (
        (lambda: mend(model, data, components, 99), npeff.ArgumentError, "which"),
        (lambda: mend(model, data, components, []), npeff.ArgumentError, "which"),
        (lambda: mend(model, data, components, None), npeff.ArgumentError, "which: expected components below 8"),
        (lambda: mend(model, data, "components.h5", 0), npeff.ArgumentError, "components: expected Components"),
        (lambda: mend("model", data, components, 0), npeff.ArgumentError, "model: expected a torch"),
        (lambda: mend(model, data, components, 0, seed=-1), npeff.ArgumentError, "seed"),
        (lambda: mend(model, data, components, 0, forward=3), npeff.ArgumentError, "forward"),
        (lambda: mend(model, data, components, 0, repair=[10**6]), npeff.ArgumentError, "repair"),
        (lambda: mend(model, data, components, 0, repair=[]), npeff.DataError, "repair"),
        (lambda: mend(model, data, components, 0, tolerance=2), npeff.ArgumentError, "tolerance"),
        (lambda: mend(model, data, components, 0, iterations=0), npeff.ArgumentError, "iterations"),
        (lambda: mend(model, unlabelled, components, 0), npeff.DataError, "labels"),
        (lambda: mend(model, data[:1], components, 0), npeff.ArgumentError, "data"),
        (lambda: mend(model, [], components, 0), npeff.DataError, "data"),
    ):
        with pytest.raises(error, match=text):
            call()
    wrong = np.flatnonzero(fooled)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(npeff.ModelError, match="stop"):
        mend(model, data, components, 0, repair=wrong, forward=_Failing(9), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class _Failing:
    """A forward that fails at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("stop")
        return model(batch[0])
