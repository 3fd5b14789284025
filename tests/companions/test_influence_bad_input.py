"""Influence: slips and unsuitable models get one clear message, and the model stays as it was. And the command."""

import copy

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.cli import run
from npeff.companions.influence import (
    EKFAC,
    ConjugateGradients,
    CrossLossInfluence,
    GaussNewton,
    LiSSA,
    Scores,
    component_influence,
    cross_entropy,
    squared_error,
    unlearn,
)
from npeff.errors import ArgumentError, DataError, ForeignFileError, ModelError, OutOfMemoryError, StorageError
from retraining import minimise
from word_vectors import weat

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = [(X[:8], Y[:8]), (X[8:], Y[8:])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def influence(model, *losses, **options):
    return CrossLossInfluence(
        model, *(losses or (cross_entropy,)), progress=False, **{"damping": 1.0, "max_gradient": 9.0, **options}
    )


def test_too_little_memory_in_a_loss_names_what_cuts_batches(model):
    calls, full = [], []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) in full:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return cross_entropy(model, batch)

    influence(model, loss).scores(DATA, DATA)
    for number in (1, len(calls)):
        calls.clear()
        full[:] = [number]
        with pytest.raises(OutOfMemoryError, match=r"^memory: .*8 bytes.* give smaller batches"):
            influence(model, loss).scores(DATA, DATA)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -1.0}, "damping: expected a finite number ≥ 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected"),
        ({"solver": "newton"}, "solver: expected a solver such as"),
        ({"memory": 0}, "memory: expected an integer"),
        ({"parameters": "nothing"}, "matches none of"),
        ({"solver": ConjugateGradients(tolerance=0)}, "tolerance: expected"),
        ({"solver": ConjugateGradients(preconditioner=3)}, "preconditioner: expected a solver"),
        ({"solver": LiSSA(steps=0)}, "steps: expected an integer"),
        ({"solver": EKFAC(outputs=lambda m, b: m(b[0]))}, "outputs and output_loss both"),
        ({"solver": "ekfac", "damping": 0.0}, "EK-FAC needs damping"),
        ({"solver": "empirical-fisher", "damping": 0.0}, "cannot determine"),
        ({"solver": "exact", "memory": 1000}, "more than memory="),
    ],
)
def test_options(model, options, words):
    with pytest.raises(ArgumentError, match=words):
        influence(model, **options).scores(DATA, DATA)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((X, Y), "one batch, not an iterable"),
        (iter(DATA), "can be read only once"),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4, shuffle=True), "shuffle=False"),
        ([], "yielded no batches"),
    ],
)
def test_data(model, train, words):
    with pytest.raises((ArgumentError, DataError), match=words):
        influence(model).scores(train, DATA)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda m, b: cross_entropy(m, b).mean(), DataError, "one loss per example"),
        (lambda m, b: m(b[0]), DataError, r"expected shape \(8,\)"),
        (lambda m, b: 1.0, DataError, "expected a floating-point tensor"),
        (lambda m, b: cross_entropy(m, b) / 0, DataError, "has the loss"),
        (lambda m, b: m(b[0][:, :2]).sum(1), ModelError, "failed on a batch of tensors"),
        (lambda m, b: b[0].sum(1), ModelError, "do not depend on any selected parameter"),
        (lambda m, b: cross_entropy(m, b) * cross_entropy(m, b).mean(), ModelError, "influence each other"),
    ],
)
def test_losses(model, loss, error, words):
    with pytest.raises(error, match=words):
        influence(model, loss).scores(DATA, DATA)
    with pytest.raises(ArgumentError, match="train_loss: expected callable"):
        influence(model, "loss")


@torch.no_grad()
def no_graph(model, batch):
    return model(batch[0]).mean()


def test_losses_without_a_graph_are_refused(model):
    """Their influence would be 0, and nothing would be unlearned."""
    with pytest.raises(ModelError, match=r"test_loss: its value has no gradient.*torch.no_grad\(\)"):
        influence(model, cross_entropy, no_graph).scores(DATA, DATA)
    with pytest.raises(ModelError, match="loss: its value has no gradient"):
        unlearn(model, torch.no_grad()(cross_entropy), DATA, None, lambda m: 0.0, learning_rate=0.1)


def test_an_untrained_model_is_told_apart(model):
    with pytest.warns(UserWarning, match="not at an optimum of train_loss"):
        influence(model, max_gradient=0.05).fit(DATA)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_an_indefinite_hessian_is_refused_with_the_damping_that_helps(model, solver):
    saddle = lambda m, b: -squared_error(m, (b[0], m(b[0]).detach() + 1))  # noqa: E731
    with pytest.raises(ModelError, match=r"not positive definite.*set damping ≥"):
        influence(model, saddle, solver=solver, damping=0.0).scores(DATA, DATA)


def test_lissa_that_diverges_says_so(model):
    with pytest.raises(ModelError, match="LiSSA diverged"):
        influence(model, solver=LiSSA(steps=2000, scale=0.1)).scores(DATA, DATA)


def test_cg_that_stops_early_says_so(model):
    minimise(model, cross_entropy, DATA, weight_decay=1e-3, tolerance=1e-9)
    with pytest.warns(UserWarning, match="conjugate gradients stopped after 1 passes"):
        influence(model, damping=1e-3, solver=ConjugateGradients(1e-8, max_iterations=1)).scores(DATA, DATA)


def test_gauss_newton_checks_its_loss(model):
    outputs = lambda m, b: m(b[0])  # noqa: E731
    for loss, words in (
        (lambda out, b: out.square().sum(1), "differs from train_loss"),
        (lambda out, b: -nn.functional.cross_entropy(out, b[1], reduction="none"), "differs from train_loss"),
    ):
        with pytest.raises(ArgumentError, match=words):
            influence(model, solver=GaussNewton(outputs, loss)).fit(DATA)
    concave = lambda m, b: -cross_entropy(m, b)  # noqa: E731
    with pytest.raises(ArgumentError, match="not convex in the outputs"):
        influence(
            model,
            concave,
            solver=GaussNewton(outputs, lambda out, b: -nn.functional.cross_entropy(out, b[1], reduction="none")),
        ).fit(DATA)
    with pytest.raises(DataError, match=r"outputs: expected shape \(8, C\)"):
        influence(model, solver=GaussNewton(lambda m, b: m(b[0])[0], lambda out, b: out.sum(1))).fit(DATA)


def test_models_without_per_example_gradients_are_refused():
    noisy = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).double().train()
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        influence(noisy).fit(DATA)


def test_a_model_that_changed_after_fit(model):
    fitted = influence(model).fit(DATA)
    model[0].weight.data += 1
    with pytest.raises(ModelError, match=r"changed since fit\(\)"):
        fitted.scores(DATA, DATA)


def test_results_and_files(model, tmp_path):
    with pytest.raises(ArgumentError, match=r"call fit\(data\) first"):
        influence(model).solve(torch.zeros(1, 20))
    with pytest.raises(ArgumentError, match=r"ending in \.h5 or \.csv"):
        influence(model).scores(DATA, DATA, out=tmp_path / "s.txt")
    with pytest.raises(StorageError, match="does not exist"):
        influence(model).scores(DATA, DATA, out=tmp_path / "absent" / "s.h5")
    scores = Scores(np.zeros((3, 2)), np.zeros(2), np.zeros(2), 3)
    for call, words in (
        (lambda: scores.top(-1), "k: expected"),
        (lambda: scores.top(1, test=2), "test: expected"),
        (lambda: scores.top(1, direction="up"), "direction: expected"),
        (lambda: scores.group([3]), "indices: expected"),
        (lambda: scores.group([1, 1]), "no training example comes twice"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ForeignFileError, match="not one written by npeff"):
        Scores.load(tmp_path / "other.h5")
    with pytest.raises(StorageError, match="no such file"):
        Scores.load(tmp_path / "absent.h5")


def test_a_failing_run_leaves_no_file_and_the_model_as_it_was(model, tmp_path):
    before, path = copy.deepcopy(model.state_dict()), tmp_path / "s.h5"
    bad = [DATA[0], (X[8:] * float("nan"), Y[8:])]
    with pytest.raises(DataError):
        influence(model).fit(DATA).scores(bad, DATA, out=path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_components_of_another_model_are_refused(model):
    fishers = npeff.compute_fishers(model, DATA, progress=False)
    components = npeff.decompose(fishers, 2, n_init=1, n_replacements=0, progress=False)
    estimator = influence(model)
    with pytest.raises(ArgumentError, match=r"influence: expected CrossLossInfluence\(model"):
        component_influence(model, components, 0, DATA, DATA)
    with pytest.raises(ArgumentError, match="j: expected a component below 2"):
        component_influence(estimator, components, 2, DATA, DATA)
    with pytest.raises(DataError, match="data: it has 1 examples, and example"):
        component_influence(estimator, components, 0, DATA, [(X[:1], Y[:1])])
    model[0].weight.data += 1
    with pytest.raises(ModelError, match="its model is not that of the components"):
        component_influence(estimator, components, 0, DATA, DATA)


def test_weat_and_unlearn(model):
    table = np.eye(5)
    for targets, attributes, words in (
        (([0], [1, 2]), ([3], [4]), "two sets of one size"),
        (([0], [0]), ([3], [4]), "without common words"),
        (([0], [9]), ([3], [4]), "rows between 0 and 4"),
        ((["a"], ["b"]), ([3], [4]), "need vocabulary="),
        (([0], [1]), ([3, 3], [4]), "no word twice"),
        (([0], [1]), ([], [4]), "at least one"),
    ):
        with pytest.raises(ArgumentError, match=words):
            weat(table, targets, attributes)
    with pytest.raises(ArgumentError, match="not in the vocabulary: x"):
        weat(table, (["x"], ["a"]), ([3], [4]), vocabulary={"a": 0})
    with pytest.raises(ArgumentError, match="neither harmful nor helpful"):
        unlearn(model, cross_entropy, None, None, lambda m: 0.0, learning_rate=1.0)


# ---- the command -------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn
from npeff.companions.influence import cross_entropy
from retraining import minimise

X = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()

def train():
    return [(X[:10], Y[:10]), (X[10:], Y[10:])]

def test():
    return [(X[:4], Y[:4])]

def model():
    torch.manual_seed(0)
    made = nn.Linear(3, 2).double()
    minimise(made, cross_entropy, train(), weight_decay=1e-2, tolerance=1e-9)
    return made

def margin(model, batch):
    return model(batch[0])[:, 0]
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.py").write_text(SCRIPT)
    return ["influence", "it.py:model", "it.py:train", "it.py:test", "--weight-decay", "0.01", "--quiet"]


@pytest.mark.parametrize("solver", ["cg", "exact", "gauss-newton", "ekfac", "empirical-fisher", "identity"])
def test_the_command_writes_what_the_class_computes(script, capsys, solver):
    damping = ["--damping", "0.01"]
    assert run([*script, *damping, "--solver", solver, "--test-loss", "it.py:margin", "--out", "s.h5"]) == 0
    captured = capsys.readouterr()
    assert "20 × 4 scores" in captured.out and "raises the test loss" in captured.out
    assert Scores.load("s.h5").values.shape == (20, 4)


def test_the_command_on_a_component(script, capsys):
    assert run(["fishers", "it.py:model", "it.py:train", "--exact", "--out", "f.h5", "--quiet"]) == 0
    assert run(["decompose", "f.h5", "--n-components", "2", "--out", "c.h5", "--quiet"]) == 0
    script[3] = "it.py:train"
    assert run([*script, "--component", "c.h5:1", "--out", "s.csv"]) == 0
    assert "the coefficients" in capsys.readouterr().out


def test_the_command_misused(script, capsys):
    for arguments, status, words in (
        (["--out", "s.txt"], 1, "ending in .h5"),
        (["--out", "s.h5", "--tolerance", "1e-3", "--solver", "exact"], 2, "belongs to --solver cg"),
        (["--out", "s.h5", "--component", "c.h5:1", "--test-loss", "it.py:margin"], 2, "give one of them"),
        (["--out", "s.h5", "--component", "c.h5"], 2, "expected FILE:J"),
        (["--out", "s.h5", "--component", "c.h5:²"], 2, "expected FILE:J"),
        (["--out", "s.h5", "--component", "none.h5:1"], 2, "there is no file"),
        (["--out", "s.h5", "--train-loss", "it.py:absent"], 1, "has no 'absent'"),
        (["--out", "s.h5", "--train-loss", "it.py:margin", "--solver", "gauss-newton"], 2, "needs the curvature"),
    ):
        assert run([*script, *arguments]) == status, arguments
        assert words in capsys.readouterr().err
