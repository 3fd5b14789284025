"""Recording, rolling back, and what it must equal: exact removal, autograd's steps, dense recomputation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.companions import rollback
from npeff.companions.rollback import DistMult, FactorModel, Recipe, Record
from rollback_cases import MODELS, N_ENTITIES, N_RELATIONS, examples_of, fitted

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.SparseAdam,
}


def train_with_torch(model, examples, recipe, recorder, optimizer, sparse) -> None:
    for epoch in range(recipe.epochs):
        order, candidates = recipe.schedule(epoch, examples[:, -1], model.n_answers)
        for d in order.tolist():
            optimizer.zero_grad()
            scores = model(examples[d : d + 1])[0, torch.from_numpy(candidates[d])]
            (-torch.log_softmax(scores, 0)[0]).backward()
            if sparse:
                for table in model.tables.values():
                    rows = torch.nonzero(table.grad.abs().sum(1)).flatten()
                    table.grad = torch.sparse_coo_tensor(rows[None], table.grad[rows], table.shape)
            recorder.step(d)


def probability(model: FactorModel, example: np.ndarray) -> float:
    with torch.no_grad():
        return torch.softmax(model(example[None]), 1)[0, example[-1]].item()


# ---- models ------------------------------------------------------------------------------------------------


def test_scores_are_the_published_formulas() -> None:
    contexts = np.array([[1, 2, 0], [3, 0, 5]])
    model = MODELS["distmult"]()
    E, R = (model.tables[name].detach().numpy() for name in ("entities", "relations"))
    expected = np.einsum("nk,nk,ek->ne", E[contexts[:, 0]], R[contexts[:, 1]], E)
    np.testing.assert_allclose(model(contexts).detach().numpy(), expected)
    model = MODELS["complex"]()
    E, R = (model.tables[name].detach().numpy() for name in ("entities", "relations"))
    E, R = E[:, :3] + 1j * E[:, 3:], R[:, :3] + 1j * R[:, 3:]
    expected = np.einsum("nk,nk,ek->ne", E[contexts[:, 0]], R[contexts[:, 1]], E.conj()).real
    np.testing.assert_allclose(model(contexts).detach().numpy(), expected)
    model = MODELS["matrix"]()
    P, Q = (model.tables[name].detach().numpy() for name in ("users", "items"))
    np.testing.assert_allclose(model(contexts[:, :2]).detach().numpy(), P[contexts[:, 0]] @ Q[:, :-1].T + Q[:, -1])


@pytest.mark.parametrize("kind", MODELS)
def test_query_gradients_are_autograds(kind: str) -> None:
    model = MODELS[kind]()
    examples = examples_of(model, 5)
    rows = [
        model.tables[table][examples[:, j]].T.detach().requires_grad_() for j, table in enumerate(model.columns[:-1])
    ]
    gradient = torch.randn(model.tables[model.answers].shape[1], 5, dtype=torch.float64)
    expected = torch.autograd.grad(model.query(rows), rows, gradient)
    found = model.query_gradient([row.detach().numpy() for row in rows], gradient.numpy())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy())


# ---- recording ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_fit_records_what_torch_does(kind: str, optimizer: str, all_rows: bool) -> None:
    fast, slow = MODELS[kind](), MODELS[kind]()
    examples = examples_of(fast, 12)
    examples[0, 0] = min(examples[0, -1], len(fast.tables[fast.columns[0]]) - 1)  # where it can be: head = tail
    recipe = Recipe(epochs=2, negatives=4, learning_rate=0.05, optimizer=optimizer)
    record = rollback.fit(fast, examples, recipe, all_rows=all_rows, progress=False)
    stepper = OPTIMIZERS[optimizer](slow.parameters(), 0.05)
    with rollback.RollbackRecorder(stepper, slow, examples, all_rows=all_rows) as recorder:
        train_with_torch(slow, examples, recipe, recorder, stepper, optimizer == "adam")
    other = recorder.record
    assert other is not None and other.all_rows == all_rows
    for name in fast.tables:
        np.testing.assert_allclose(record.final[name], other.final[name], atol=1e-9)
        ours, theirs = record.updates[name], other.updates[name]
        np.testing.assert_array_equal(ours.offsets, theirs.offsets)
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_allclose(ours.values, theirs.values, atol=1e-6)


class Translation(FactorModel):
    """A model of the user's: ``(h + r) · t``; both context rows have one gradient, the same array."""

    columns = ("entities", "entities", "entities")

    def __init__(self) -> None:
        super().__init__({"entities": N_ENTITIES}, {"entities": 4}, 0.5, 0)

    def query(self, context):
        return context[0] + context[1]

    def query_gradient(self, context, gradient):
        return [gradient, gradient]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_shared_between_rows(optimizer: str) -> None:
    fast, slow = Translation().double(), Translation().double()
    examples = np.array([[1, 1, 2], [3, 4, 3], [5, 6, 7], [5, 5, 5]])
    recipe = Recipe(epochs=2, negatives=4, learning_rate=0.05, optimizer=optimizer)
    record = rollback.fit(fast, examples, recipe, progress=False)
    stepper = OPTIMIZERS[optimizer](slow.parameters(), 0.05)
    with rollback.RollbackRecorder(stepper, slow, examples) as recorder:
        train_with_torch(slow, examples, recipe, recorder, stepper, optimizer == "adam")
    ours, theirs = record.updates["entities"], recorder.record.updates["entities"]
    np.testing.assert_allclose(record.final["entities"], recorder.record.final["entities"], atol=1e-9)
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-6)


def test_all_updates_add_up_to_the_training() -> None:
    for kind in MODELS:
        _, record = fitted(kind, all_rows=True)
        for name, updates in record.updates.items():
            total = np.zeros_like(record.initial[name])
            np.add.at(total, updates.rows, updates.values)
            np.testing.assert_allclose(record.initial[name] + total, record.final[name], atol=1e-5)


def test_a_record_has_the_examples_own_rows() -> None:
    _, record = fitted("distmult")
    for d, (head, relation, tail) in enumerate(record.examples.tolist()):
        for name, rows in (("entities", {head, tail}), ("relations", {relation})):
            _, found, _ = record.updates[name].of(np.array([d]))
            assert found.tolist() == sorted(rows)


@pytest.mark.parametrize("on_disk", [False, True])
def test_records_survive_the_disk(tmp_path, on_disk: bool) -> None:
    names = {"entities": [f"e{i}" for i in range(N_ENTITIES)]}
    model, record = fitted("complex", out=tmp_path / "r.h5" if on_disk else None, names=names)
    if not on_disk:
        record.save(tmp_path / "r.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["r.h5"]  # no temporary file is left
    opened, (_, memory) = Record.load(tmp_path / "r.h5", verify=True), fitted("complex", names=names)
    for name in model.tables:
        for part in ("offsets", "rows", "values"):
            np.testing.assert_array_equal(getattr(opened.updates[name], part), getattr(memory.updates[name], part))
        np.testing.assert_array_equal(opened.initial[name], memory.initial[name])
    assert opened.recipe == memory.recipe and opened.names == names and not opened.all_rows
    again = opened.model()
    assert torch.equal(again(opened.examples), model(opened.examples))
    assert rollback.GradientRollback(again, opened).explain(opened.examples[0], 3).positions.size


def test_negatives_are_different_and_never_the_answer() -> None:
    answers = np.arange(50) % 20
    for k in (1, 3, 12, 19, 40):
        order, candidates = Recipe(negatives=k).schedule(0, answers, 20)
        assert sorted(order) == list(range(50)) and candidates.shape == (50, 1 + min(k, 19))
        assert (candidates[:, 0] == answers).all() and candidates.min() >= 0 and candidates.max() < 20
        assert all(len(set(row)) == len(row) for row in candidates.tolist())
        np.testing.assert_array_equal(candidates, Recipe(negatives=k).schedule(0, answers, 20)[1])
        assert not np.array_equal(order, Recipe(negatives=k).schedule(1, answers, 20)[0])


# ---- rolling back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_rollback_of_one_step_is_exact_removal(kind: str) -> None:
    untouched, model = MODELS[kind](), MODELS[kind]()
    example = examples_of(model, 1)
    record = rollback.fit(model, example, Recipe(epochs=1, negatives=4), all_rows=True, progress=False)
    influence = rollback.GradientRollback(model, record).influence(example[0], np.array([0]))
    assert influence[0] == pytest.approx(probability(model, example[0]) - probability(untouched, example[0]), abs=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_rollback_of_the_last_step_is_exact_removal(kind: str) -> None:
    """Two examples, one epoch: without the one that came last, training is what came before it."""
    model = MODELS[kind]()
    examples = examples_of(model, 2)
    examples[1] = examples[0]  # they share rows: the last step lands on what the first one moved
    examples[1, -1] = (examples[0, -1] + 1) % model.n_answers
    recipe = Recipe(epochs=1, negatives=4)
    last = int(recipe.schedule(0, examples[:, -1], model.n_answers)[0][-1])
    record = rollback.fit(model, examples, recipe, all_rows=True, progress=False)
    explainer = rollback.GradientRollback(model, record)
    after, before = rollback.trained_without(explainer, examples[:1], [np.array([last])], progress=False)
    influence = explainer.influence(examples[0], np.array([last]))[0]
    answer = examples[0, -1]
    assert before[0, answer] == pytest.approx(probability(model, examples[0]), abs=1e-9)
    assert influence == pytest.approx(before[0, answer] - after[0, answer], abs=1e-7)


@cache
def _record_of(kind: str, all_rows: bool) -> tuple[FactorModel, Record]:
    return fitted(kind, all_rows=all_rows)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(MODELS)), st.booleans(), st.integers(0, 29), st.integers(0, 10_000))
def test_influence_is_that_of_changed_tables(kind: str, all_rows: bool, of: int, seed: int) -> None:
    """Oracle: subtract γ[d] from whole tables, run the model again."""
    model, record = _record_of(kind, all_rows)
    explainer = rollback.GradientRollback(model, record)
    target = examples_of(model, 1, seed)[0]
    influence = explainer.influence(target, np.array([of]))[0]
    changed = MODELS[kind]()
    tables = {name: table.copy() for name, table in record.final.items()}
    for name, updates in record.updates.items():
        _, rows, values = updates.of(np.array([of]))
        tables[name][rows] -= values
    changed.load_tables(tables)
    assert influence == pytest.approx(probability(model, target) - probability(changed, target), abs=1e-9)


def test_any_number_of_candidates_at_a_time(monkeypatch) -> None:
    model, record = _record_of("distmult", False)
    explainer = rollback.GradientRollback(model, record)
    whole = explainer.influence(record.examples[3])
    one = [explainer.influence(record.examples[3], c[None])[0] for c in explainer.candidates(record.examples[3])]
    np.testing.assert_allclose(whole, one, atol=1e-12)
    monkeypatch.setattr("npeff.companions.rollback.explain.CHUNK_BYTES", 1)
    np.testing.assert_allclose(explainer.influence(record.examples[3]), whole, atol=1e-12)


def test_candidates_share_an_entity_or_a_relation() -> None:
    model, record = _record_of("distmult", False)
    head, relation, tail = target = [2, 1, 7]
    expected = [d for d, (h, r, t) in enumerate(record.examples.tolist()) if {h, t} & {head, tail} or r == relation]
    explainer = rollback.GradientRollback(model, record)
    assert explainer.candidates(target).tolist() == expected
    found = explainer.explain(target, 5)
    influences = explainer.influence(target)
    assert found.n_candidates == len(expected) and (found.influences >= 0).all()
    np.testing.assert_array_equal(found.influences, np.sort(influences[influences >= 0])[::-1][:5])
    assert set(found.positions) <= set(expected)


def test_float32_is_close_to_float64() -> None:
    model = DistMult(N_ENTITIES, N_RELATIONS, 4)
    examples = examples_of(model, 30)
    single = rollback.fit(model, examples, Recipe(epochs=3, negatives=4), progress=False)
    double, record = _record_of("distmult", False)
    assert single.final["entities"].dtype == np.float32
    np.testing.assert_allclose(
        rollback.GradientRollback(model, single).influence(examples[0]),
        rollback.GradientRollback(double, record).influence(examples[0]),
        atol=1e-5,
    )
