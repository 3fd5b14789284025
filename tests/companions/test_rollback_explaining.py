"""Explanations, their check by retraining, the command line, and bad input."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from npeff.cli import run
from npeff.companions import rollback
from npeff.companions.rollback import DistMult, MatrixFactorization, Recipe, Record
from npeff.errors import ArgumentError, DataError, ForeignFileError, ModelError, StorageError
from rollback_cases import examples_of, fitted

GROUPS, PEOPLE = 4, 6


def planted() -> tuple[DistMult, np.ndarray, np.ndarray]:
    """People of four groups live where their group lives, which follows from their two friends alone.

    Returns:
        The model, training triples, and one held-out ``lives in`` of every group.
    """
    likes, lives = 0, 1
    person = lambda g, i: g * PEOPLE + i  # noqa: E731
    town = lambda g: GROUPS * PEOPLE + g  # noqa: E731
    friends = [
        (person(g, i), likes, person(g, j))
        for g in range(GROUPS)
        for i in range(PEOPLE)
        for j in range(PEOPLE)
        if i != j
    ]
    homes = [(person(g, i), lives, town(g)) for g in range(GROUPS) for i in range(1, PEOPLE)]
    targets = np.array([(person(g, 0), lives, town(g)) for g in range(GROUPS)])
    return DistMult(GROUPS * (PEOPLE + 1), 2, 8, seed=1), np.array(friends + homes), targets


@pytest.fixture(scope="module")
def trained() -> tuple[DistMult, Record, np.ndarray]:
    model, triples, targets = planted()
    record = rollback.fit(model, triples, Recipe(epochs=20, negatives=27), progress=False)
    return model, record, targets


class RandomOrder(rollback.Explainer):
    """The candidates in random order."""

    def support(self, target, candidates):
        return np.random.default_rng([0, *target]).random(len(candidates))


def test_explanations_of_planted_predictions_are_faithful(trained) -> None:
    model, record, targets = trained
    explainer = rollback.GradientRollback(model, record)
    assert (explainer.predictions(targets) == targets).mean() > 0.9
    found = rollback.faithfulness(explainer, 10, targets, progress=False)
    neighbours = rollback.faithfulness(RandomOrder(model, record), 10, targets, progress=False)
    pd, tc = found
    assert pd >= 75 and tc >= 50
    assert found.drop > 2 * neighbours.drop
    for explanation in found.explanations:  # they are of the target's own group
        group = explanation.target[0] // PEOPLE
        people = record.examples[explanation.positions][:, 0] // PEOPLE
        assert (people == group).mean() >= 0.8


def test_side_by_side_retraining_is_retraining(trained) -> None:
    model, record, targets = trained
    removed = [np.array([3, 80, 121]), np.array([], np.int64)]
    explainer = rollback.GradientRollback(model, record)
    after, before = rollback.trained_without(explainer, targets[:2], removed, progress=False)
    alone = {}
    for i, positions in enumerate(removed):
        single, _, _ = planted()
        tables = rollback.retrain(single, record, [positions])
        single.load_tables({name: table[..., 0] for name, table in tables.items()})
        p = torch.softmax(single(targets[i : i + 1]), 1).detach().numpy()[0]
        np.testing.assert_allclose(after[i], p, atol=1e-4)
        alone[tuple(positions)] = single
    np.testing.assert_allclose(before, explainer.probabilities(targets[:2]), atol=1e-4)
    np.testing.assert_allclose(after[1], before[1], atol=1e-6)
    given, _ = rollback.trained_without(
        explainer, targets[:2], removed, retrain_without=lambda positions: alone[tuple(positions)], progress=False
    )
    np.testing.assert_allclose(given, after, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_examples_left_out_leave_no_trace(optimizer: str) -> None:
    """Removing an example that shares nothing with a step changes nothing there: a row only it touches stays put."""
    model = MatrixFactorization(4, 6, 3)
    pairs = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    recipe = Recipe(epochs=2, negatives=2, optimizer=optimizer)
    record = rollback.fit(model, pairs, recipe, progress=False)
    tables = rollback.retrain(model, record, [np.array([3]), np.array([], int)])
    np.testing.assert_array_equal(tables["users"][3, :, 0], record.initial["users"][3])
    np.testing.assert_allclose(tables["users"][:, :, 1], record.final["users"], atol=1e-6)


def test_influences_rank_single_removals_better_than_chance(trained) -> None:
    model, record, targets = trained
    explainer = rollback.GradientRollback(model, record)
    candidates = explainer.candidates(targets[0])[::4]
    after, before = rollback.trained_without(
        explainer, np.repeat(targets[:1], len(candidates), 0), [c[None] for c in candidates], progress=False
    )
    falls = (before - after)[:, targets[0, -1]]
    assert spearmanr(explainer.influence(targets[0], candidates), falls).statistic > 0.2


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _, triples, targets = planted()
    write = lambda rows: "".join(f"e{h}\tr{r}\te{t}\n" for h, r, t in rows.tolist())  # noqa: E731
    (tmp_path / "train.txt").write_text(write(triples))
    (tmp_path / "test.txt").write_text(write(targets[:2]) + "e12\tr1\t?\n")
    return tmp_path


def test_train_then_explain_from_the_record(files, capsys) -> None:
    options = ["--epochs", "5", "--negatives", "27", "--dim", "8", "--quiet"]
    assert run(["rollback", "train.txt", "--record", "r.h5", *options]) == 0
    assert "r.h5: 140 triples" in capsys.readouterr().out
    assert run(["rollback", "r.h5", "--targets", "test.txt", "-k", "3", "--out", "e.tsv", "--check", "--quiet"]) == 0
    assert "less probable" in capsys.readouterr().err
    with open("e.tsv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert {line["head"] for line in lines} == {"e0", "e6", "e12"} and "?" not in {line["tail"] for line in lines}
    assert all(float(line["influence"]) >= 0 for line in lines) and len(lines) <= 9
    assert run(["rollback", "train.txt", "--targets", "test.txt", "-k", "3", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == (files / "e.tsv").read_text().splitlines()
    assert run(["info", "r.h5"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["train.txt"], 2, "give --targets to explain, or --record"),
        (["bad.txt", "--record", "r.h5"], 1, "line 2: expected head, relation and tail"),
        (["empty.txt", "--record", "r.h5"], 1, "holds no triples"),
        (["train.txt", "--targets", "unknown.txt"], 1, "unknown entity 'e99' in e99 r1 e2"),
        (["train.txt", "--record", "absent/r.h5"], 1, "does not exist"),
        (["train.txt", "--record", "train.txt"], 1, "is not overwritten"),
    ],
)
def test_slips_on_the_command_line(files, capsys, arguments, status, words) -> None:
    (files / "bad.txt").write_text("a\tb\tc\na b c\n")
    (files / "empty.txt").write_text("\n")
    (files / "unknown.txt").write_text("e99\tr1\te2\n")
    before = (files / "train.txt").read_bytes()
    assert run(["rollback", *arguments, "--epochs", "1", "--quiet"]) == status
    assert words in capsys.readouterr().err
    assert (files / "train.txt").read_bytes() == before


# ---- bad input ---------------------------------------------------------------------------------------------


def test_unknown_names_and_rows_are_told(trained) -> None:
    model, record, targets = trained
    explainer = rollback.GradientRollback(model, record)
    vocabulary = rollback.Vocabulary(("egypt", "usa"), ("treaties",))
    with pytest.raises(DataError, match=r"unknown entity 'egipt'.*did you mean 'egypt'"):
        vocabulary.encode([("egipt", "treaties", "usa")])
    with pytest.raises(
        ArgumentError, match=r"row 0 has 99 in column 0, but the model's table 'entities' has rows 0 to 27"
    ):
        explainer.explain([99, 0, 0])
    with pytest.raises(ArgumentError, match=r"integer array \(n, 3\)"):
        rollback.fit(DistMult(3, 1, 2), np.zeros((4, 2), int))
    with pytest.raises(ArgumentError, match="at least 1, got 0"):
        rollback.fit(DistMult(3, 1, 2), np.zeros((0, 3), int))
    with pytest.raises(ArgumentError, match="k: expected"):
        explainer.explain(targets[0], 0)
    with pytest.raises(ArgumentError, match="candidates: expected positions below"):
        explainer.influence(targets[0], np.array([10_000]))
    for wrong in ([10_000], [0.5], [-1], 0):
        with pytest.raises(ArgumentError, match="removed: expected positions"):
            rollback.retrain(model, record, [np.array(wrong)])
    for arguments, words in (
        ({"dim": 0}, "dim: expected an integer ≥ 1"),
        ({"n_relations": 0}, "n_relations: expected"),
        ({"seed": "a"}, "seed: expected"),
    ):
        with pytest.raises(ArgumentError, match=words):
            DistMult(**{"n_entities": 3, "n_relations": 1, **arguments})
    with pytest.raises(ModelError, match=r"tables are bfloat16, .*model.float\(\)"):
        rollback.fit(DistMult(3, 1, 2).bfloat16(), np.zeros((2, 3), int), progress=False)


def test_another_model_than_the_recorded_one_is_refused(trained) -> None:
    _, record, _ = trained
    with pytest.raises(ArgumentError, match="not the one the record ended with"):
        rollback.GradientRollback(planted()[0], record)


def test_optimisers_that_change_other_rows_are_refused() -> None:
    model = DistMult(5, 2, 3)
    examples = examples_of(model, 6)
    Adam, SGD = torch.optim.Adam, torch.optim.SGD
    for optimizer in (
        Adam(model.parameters()),
        SGD(model.parameters(), 0.1, momentum=0.9),
        SGD(model.parameters(), 0.1, weight_decay=0.1),
    ):
        with pytest.raises(ModelError, match="changes rows that have no gradient"):
            rollback.RollbackRecorder(optimizer, model, examples)
    for accepted in (
        SGD(model.parameters(), 0.1),
        torch.optim.Adagrad(model.parameters()),
        torch.optim.RMSprop(model.parameters()),
    ):
        rollback.RollbackRecorder(accepted, model, examples)
    with pytest.raises(ArgumentError, match="does not hold the table 'entities'"):
        rollback.RollbackRecorder(SGD([torch.zeros(1, requires_grad=True)], 0.1), model, examples)


def test_recorder_misuse(tmp_path) -> None:
    model = DistMult(5, 2, 3)
    examples = examples_of(model, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = rollback.RollbackRecorder(optimizer, model, examples, out=tmp_path / "r.h5")
    with pytest.raises(ModelError, match="inside 'with"):
        recorder.step(0)
    with recorder, pytest.raises(ArgumentError, match="position below 6"):
        recorder.step(6)
    with pytest.raises(RuntimeError, match="stop"), recorder:
        raise RuntimeError("stop")
    assert recorder.record is None
    with pytest.raises(ArgumentError, match="expected a FactorModel"):
        rollback.RollbackRecorder(optimizer, torch.nn.Linear(2, 2), examples)
    with pytest.raises(ArgumentError, match="no recipe"):
        with recorder:
            pass
        rollback.faithfulness(rollback.GradientRollback(model, recorder.record), 1, examples[:1], progress=False)


def test_a_training_that_diverges_leaves_the_model_alone() -> None:
    model = DistMult(5, 2, 3)
    before = model.numpy_tables()
    with pytest.raises(ModelError, match="training diverged"), np.errstate(all="ignore"):
        rollback.fit(model, examples_of(model, 20), Recipe(learning_rate=1e6), progress=False)
    for name, table in model.numpy_tables().items():
        np.testing.assert_array_equal(table, before[name])


def test_files_that_are_no_records(tmp_path) -> None:
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(StorageError):
        Record.load(tmp_path / "x.h5")
    _, record = fitted("distmult")
    path = record.save(tmp_path / "r.h5")
    import npeff

    with pytest.raises(ForeignFileError, match="rollback"):
        npeff.load(path)
    raw = bytearray(path.read_bytes())
    path.write_bytes(bytes(raw[: len(raw) // 2]))
    with pytest.raises(StorageError):
        Record.load(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs: expected an integer ≥ 1"),
        ({"negatives": 0}, "negatives: expected an integer ≥ 1"),
        ({"learning_rate": 0}, "learning_rate: expected"),
        ({"optimizer": "lbfgs"}, "optimizer: expected one of 'sgd', 'adagrad', 'adam', got 'lbfgs'"),
    ],
)
def test_recipes_are_checked(options, words) -> None:
    with pytest.raises(ArgumentError, match=words):
        Recipe(**options)
