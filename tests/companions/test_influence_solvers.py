"""Every solver against the dense object: Hessian, Gauss–Newton, Fisher, and EK-FAC by its definition."""

import numpy as np
import pytest
import torch
from torch import nn

from influence_cases import batches, classifier_case, estimator, flat_gradient, margin, regression_case
from npeff.companions.influence import (
    EKFAC,
    ConjugateGradients,
    CrossLossInfluence,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Identity,
    LiSSA,
    cross_entropy,
    squared_error,
)
from retraining import minimise


@pytest.fixture
def regression():
    return regression_case()


@pytest.fixture
def classifier():
    return classifier_case()


def outputs(model, batch):
    return model(batch[0])


def output_loss(values, batch):
    return nn.functional.cross_entropy(values, batch[1], reduction="none")


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradients(tolerance=1e-12),
        ConjugateGradients(tolerance=1e-12, preconditioner=EKFAC(outputs, output_loss)),
        ConjugateGradients(tolerance=1e-12, preconditioner=EmpiricalFisher()),
    ],
    ids=["cg", "cg + ekfac", "cg + fisher"],
)
def test_iterative_solvers_agree_with_the_exact_one(classifier, solver):
    model, _, test, x, y = classifier
    data = batches(x, y, size=40)
    exact = estimator(model, solver=Exact(), damping=1e-2).scores(data, test).values
    scores = estimator(model, solver=solver, damping=1e-2).scores(data, test)
    np.testing.assert_allclose(scores.values, exact, atol=1e-5 * np.abs(exact).max())
    assert (scores.residuals < 1e-5).all()


def test_lissa_needs_its_final_scale_and_has_it(regression):
    """On one batch the series is without noise: it must be the exact inverse, whatever the scale."""
    model, x, y, tx, ty = regression
    solve = lambda solver: CrossLossInfluence(model, squared_error, solver=solver, damping=0.2, progress=False)  # noqa: E731
    exact = solve("exact").scores([(x, y)], [(tx, ty)]).values
    for scale in (None, 7.0):
        scores = solve(LiSSA(steps=200, scale=scale)).scores([(x, y)], [(tx, ty)])
        np.testing.assert_allclose(scores.values, exact, atol=1e-6 * np.abs(exact).max())
        assert (scores.residuals < 1e-6).all()


def test_lissa_on_batches_is_near_and_reports_its_residual(regression):
    model, x, y, tx, ty = regression
    solve = lambda solver: CrossLossInfluence(model, squared_error, solver=solver, damping=0.2, progress=False)  # noqa: E731
    exact = solve("exact").scores([(x, y)], [(tx, ty)]).values
    with pytest.warns(UserWarning, match="relative residual"):
        scores = solve(LiSSA(steps=300)).scores(batches(x, y, size=10), [(tx, ty)])
    assert np.corrcoef(scores.values.ravel(), exact.ravel())[0, 1] > 0.9
    assert 0 < scores.residuals.max() < 1
    assert any("scale" in note for note in scores.provenance["notes"])


def test_a_preconditioner_saves_passes(classifier):
    model, _, _, x, y = classifier
    vectors = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    passes = []
    for before in (None, EKFAC(outputs, output_loss)):
        solver = ConjugateGradients(tolerance=1e-10, preconditioner=before)
        fitted = estimator(model, solver=solver, damping=1e-4).fit([(x, y)])
        solution = fitted.solve(vectors)
        assert float(solution.residual.max()) < 1e-9
        passes.append(solution.iterations)
    assert passes[1] < passes[0]


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("few", [True, False], ids=["woodbury", "matrix"])
def test_gauss_newton_and_fisher_equal_their_dense_form(classifier, size, few):
    model, _, test, x, y = classifier
    x, y = (x[:12], y[:12]) if few else (x, y)  # 24 rows or 80, of 56 parameters
    data = batches(x, y, size=size)
    losses = cross_entropy(model, (x, y))
    left = torch.stack([flat_gradient(loss, model).detach() for loss in losses])
    right = torch.stack([flat_gradient(v, model).detach() for b in test for v in margin(model, b)])
    logits = model(x)
    jacobian = torch.stack([torch.stack([flat_gradient(v, model).detach() for v in row]) for row in logits])
    p = torch.softmax(logits, 1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    dense = {
        GaussNewton(outputs, output_loss): torch.einsum("ncm,ncd,ndk->mk", jacobian, inner, jacobian) / len(x),
        EmpiricalFisher(): left.T @ left / len(x),
    }
    for solver, curvature in dense.items():
        curvature = curvature + 0.02 * torch.eye(len(curvature), dtype=torch.float64)
        expected = -left @ torch.linalg.solve(curvature, right.T)
        scores = estimator(model, solver=solver, damping=1e-2, max_gradient=9.0).scores(data, test)
        np.testing.assert_allclose(scores.values, expected.numpy(), rtol=1e-6, atol=1e-9)


def test_gauss_newton_is_the_hessian_of_a_linear_model(regression):
    model, x, y, tx, ty = regression
    square = lambda values, batch: (values - batch[1]).square().sum(1) / 2  # noqa: E731
    found = [
        CrossLossInfluence(model, squared_error, solver=solver, damping=0.1, progress=False).scores(
            [(x, y)], [(tx, ty)]
        )
        for solver in (Exact(), GaussNewton(outputs, square), ConjugateGradients(1e-12))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other.values, found[0].values, rtol=1e-8)


def ekfac_oracle(model, x, y, layers, ridge, vectors):
    """EK-FAC by its definition: dense bases, per-example gradients as matrices, the empirical Fisher."""
    gradients = [
        [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
        for loss in cross_entropy(model, (x, y))
    ]
    result = torch.empty_like(vectors)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for weight, bias, a, delta in layers:  # a (n, T, p), delta (n, T, q)
        left = torch.linalg.eigh(torch.einsum("ntq,ntv->qv", delta, delta))[1]
        right = torch.linalg.eigh(torch.einsum("ntp,ntu->pu", a, a))[1]
        per_example = torch.einsum("ntq,ntp->nqp", delta, a)
        own = gradients[0][0][names.index(weight)]
        torch.testing.assert_close(per_example[0][:, : own[0].numel()].reshape(own.shape), own)
        moments = (left.T @ per_example @ right).square().mean(0) + ridge
        w = names.index(weight)
        part = vectors[:, starts[w] : starts[w + 1]].reshape(len(vectors), own.shape[0], -1)
        if bias:
            c = names.index(bias)
            part = torch.cat([part, vectors[:, starts[c] : starts[c + 1], None]], 2)
        solved = left @ ((left.T @ part @ right) / moments) @ right.T
        if bias:
            result[:, starts[c] : starts[c + 1]] = solved[:, :, -1]
            solved = solved[:, :, :-1]
        result[:, starts[w] : starts[w + 1]] = solved.flatten(1)
    return result


@pytest.mark.parametrize("size", [7, 40])
def test_ekfac_equals_its_definition(classifier, size):
    model, _, _, x, y = classifier
    hidden: dict[str, torch.Tensor] = {}
    handles = [
        model[i].register_forward_hook(lambda _, inputs, out, i=i: hidden.update({f"in{i}": inputs[0], f"out{i}": out}))
        for i in (0, 3, 5)
    ]
    loss = cross_entropy(model, (x, y)).sum()
    deltas = torch.autograd.grad(loss, [hidden[f"out{i}"] for i in (0, 3, 5)])
    for handle in handles:
        handle.remove()
    under = nn.functional.unfold(hidden["in0"], 3).mT.detach()
    ones = torch.ones(len(x), 1, 1, dtype=torch.float64)
    layers = [
        ("0.weight", "0.bias", torch.cat([under, torch.ones_like(under[..., :1])], 2), deltas[0].flatten(2).mT),
        ("3.weight", None, hidden["in3"][:, None].detach(), deltas[1][:, None]),
        ("5.weight", "5.bias", torch.cat([hidden["in5"][:, None].detach(), ones], 2), deltas[2][:, None]),
    ]
    vectors = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    expected = ekfac_oracle(model, x, y, layers, 2e-2, vectors)
    fitted = estimator(model, solver="ekfac", damping=1e-2, max_gradient=9.0).fit(batches(x, y, size=size))
    solution = fitted.solve(vectors)
    torch.testing.assert_close(solution.x, expected, rtol=1e-8, atol=1e-10)
    assert float(solution.residual.max()) < 1e-10


def test_ekfac_is_exact_where_the_curvature_is_a_kronecker_product():
    """One linear layer under squared loss: H = I ⊗ E[xxᵀ], and the Gauss–Newton rows give it exactly."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 5, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    model = nn.Linear(5, 2).double()
    square = lambda values, batch: (values - batch[1]).square().sum(1) / 2  # noqa: E731
    minimise(model, squared_error, [(x, y)], tolerance=1e-10)
    scores = [
        CrossLossInfluence(model, squared_error, solver=solver, damping=0.05, progress=False).scores([(x, y)], [(x, y)])
        for solver in (Exact(), EKFAC(outputs, square))
    ]
    np.testing.assert_allclose(scores[1].values, scores[0].values, rtol=1e-9, atol=1e-12)


def test_ekfac_takes_grouped_convolutions_sequences_and_names_the_rest():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.mix = nn.Linear(4, 4)
            self.conv = nn.Conv1d(4, 4, 3, groups=2)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            h = torch.tanh(self.mix(self.embed(tokens))).mT
            return self.head(self.norm(torch.tanh(self.conv(h)).mean(2)))

    model = Net().double().eval()
    tokens, y = torch.randint(0, 9, (20, 6)), torch.randint(0, 3, (20,))
    fitted = estimator(model, solver="ekfac", damping=0.1, max_gradient=9.0)
    scores = fitted.scores(batches(tokens, y), [(tokens[:4], y[:4])])
    (note,) = scores.provenance["notes"]
    assert "embed.weight" in note and "norm.weight" in note and "conv.weight" not in note and "mix" not in note
    full = estimator(model, solver=EmpiricalFisher(), damping=0.1, max_gradient=9.0).scores(
        batches(tokens, y), [(tokens[:4], y[:4])]
    )
    assert np.corrcoef(scores.values.ravel(), full.values.ravel())[0, 1] > 0.8


def test_identity_is_the_gradient_product(classifier):
    model, data, test, x, y = classifier
    left = torch.stack([flat_gradient(v, model).detach() for v in cross_entropy(model, (x, y))])
    right = torch.stack([flat_gradient(v, model).detach() for b in test for v in margin(model, b)])
    scores = estimator(model, solver=Identity()).scores(data, test)
    np.testing.assert_allclose(scores.values, -(left @ right.T).numpy(), rtol=1e-8, atol=1e-12)
