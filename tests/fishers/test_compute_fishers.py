"""compute_fishers from end to end: data, selection, compression."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import TopK
from oracles import largest
from small_network import N, Y, exact, fishers_of, model, network, x

__all__ = ["model", "x"]  # fixtures

# Data


def test_every_kind_of_batch_gives_the_same(model: nn.Module, x: Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = model

        def forward(self, pixels: Tensor, scale: float = 1.0) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.core(pixels * scale))

    wanted = fishers_of(model, [(x, Y)])
    assert wanted.labels.tolist() == Y.tolist()
    assert wanted.ids.tolist() == list(range(N))
    np.testing.assert_allclose(wanted.logits, model(x).detach(), rtol=1e-6)
    variants = [
        fishers_of(model, [x]),
        fishers_of(model, [[x]]),
        fishers_of(model, DataLoader(TensorDataset(x, Y), batch_size=4)),
        fishers_of(model, iter([(x.numpy(), Y.numpy())])),
        fishers_of(model, [(x, Y.tolist())]),
        fishers_of(Named(), [{"pixels": x, "labels": Y}]),
        fishers_of(Named(), [{"pixels": x, "scale": 1.0}]),
        fishers_of(model, [(x, Y, "extra")], forward=lambda m, batch: m(batch[0])),
    ]
    for got in variants:
        np.testing.assert_allclose(got.rows.values, wanted.rows.values, atol=1e-5)
    assert variants[0].labels.tolist() == [-1] * N
    assert variants[5].labels.tolist() == Y.tolist()


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], DataError, "no batches"),
        (iter([]), DataError, "no batches"),
        (torch.zeros(4, 1, 8, 8), ArgumentError, "iterable of batches"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), ArgumentError, "one batch"),
        (TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4)), ArgumentError, "DataLoader"),
        ([(torch.zeros(1, 8, 8), torch.tensor(1))], DataError, "one example"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(3))], DataError, "4 inputs and 3 labels"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(4), 1)], DataError, "forward="),
        ([torch.zeros(0, 1, 8, 8)], DataError, "empty"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(4, 7))], DataError, "labels"),
        (["text"], DataError, "str"),
        (7, ArgumentError, "int"),
    ],
)
def test_unusable_data_is_refused_with_the_reason(
    model: nn.Module, data: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fishers_of(model, data)


def test_misshapen_logits_are_refused(model: nn.Module, x: Tensor) -> None:
    for forward, words in (
        (lambda m, b: m(b)[:, :, None], r"\(9, 3, 1\)"),
        (lambda m, b: m(b)[:4], r"\(4, 3\)"),
        (lambda m, b: (m(b), 1), "tuple"),
        (lambda m, b: m(b).argmax(1, keepdim=True), "floating"),
    ):
        with pytest.raises(DataError, match=words):
            fishers_of(model, [x], forward=forward)


def test_regression_and_binary_heads(x: Tensor) -> None:
    single = network(1)
    for likelihood in ("gaussian", "bernoulli"):
        got = fishers_of(single, [(x, torch.rand(N))], likelihood=likelihood, forward=lambda m, b: m(b[0])[:, 0])
        assert got.logits.shape == (N, 1)
        wanted = exact(single, x, got.parameters.names, likelihood)
        for i in range(N):
            rows = got.dense(i).astype(np.float64)
            assert np.linalg.norm(rows.T @ rows - wanted[i]) <= 1e-5 * np.linalg.norm(wanted[i])
    with pytest.raises(ArgumentError, match="bernoulli"):
        fishers_of(single, [x])
    assert set(fishers_of(network(2), [x]).ranks) == {1}


def test_max_examples_cuts_the_last_batch(model: nn.Module, x: Tensor) -> None:
    some = fishers_of(model, [(x[:4], Y[:4]), (x[4:], Y[4:])], max_examples=6)
    assert len(some) == 6
    assert some.labels.tolist() == Y[:6].tolist()
    with pytest.raises(ArgumentError, match="max_examples"):
        fishers_of(model, [x], max_examples=0)


# Compression and kinds


@pytest.mark.parametrize("k", [1, 50, 5000])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_top_k_keeps_the_largest_of_all_rows_together(model: nn.Module, x: Tensor, kind: str, k: int) -> None:
    whole = fishers_of(model, [x], kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = fishers_of(model, x.split(4), kind=kind, compress=TopK(k))
    again = fishers_of(model, [x], kind=kind, compress=TopK(min(k, whole.dense(0).size)))
    for i in range(N):
        np.testing.assert_array_equal(again.dense(i), largest(whole.dense(i), k))
        np.testing.assert_allclose(some.dense(i), again.dense(i), atol=2e-6)
    np.testing.assert_allclose(some.norms, whole.norms, rtol=1e-5)


def test_k_beyond_the_entries_is_recorded(model: nn.Module, x: Tensor) -> None:
    with pytest.warns(UserWarning, match="TopK"):
        fishers = fishers_of(model, [x], compress=TopK(10**9))
    assert fishers.provenance["options"]["compress"]["k_effective"] == 2 * fishers.n_parameters
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="k:"):
            TopK(bad)
    with pytest.raises(ArgumentError, match="compress"):
        fishers_of(model, [x], compress=5)


def test_bases_agree_and_truncated_ones_have_ranks(model: nn.Module, x: Tensor) -> None:
    reduced, classes = fishers_of(model, [x]), fishers_of(model, [x], basis="class")
    some = fishers_of(model, x.split(2), basis="class", min_prob=0.3)
    sparse = fishers_of(model, x.split(2), basis="class", min_prob=0.3, compress=TopK(400))
    assert set(reduced.ranks) == {2}
    assert set(classes.ranks) == {3}
    p = torch.softmax(torch.from_numpy(np.asarray(some.logits)), 1).numpy()
    np.testing.assert_array_equal(some.ranks, np.maximum((p >= 0.3).sum(axis=1), 1))
    np.testing.assert_array_equal(sparse.ranks, some.ranks)
    for i in range(N):
        a, b = reduced.dense(i), classes.dense(i)
        np.testing.assert_allclose(a.T @ a, b.T @ b, atol=1e-5)
        order = np.argsort(-p[i], kind="stable")[: some.ranks[i]]
        np.testing.assert_allclose(some.dense(i), b[order], atol=1e-5)
        np.testing.assert_allclose(sparse.dense(i), largest(some.dense(i), 400), atol=1e-5)
    diagonal = fishers_of(model, [x], kind="diagonal", basis="class")
    np.testing.assert_allclose(diagonal.dense(0), np.square(classes.dense(0)).sum(axis=0), atol=1e-6)


def test_sampled_and_true_labels(model: nn.Module, x: Tensor) -> None:
    one = fishers_of(model, [x], labels="sampled", n_samples=2, seed=5)
    other = fishers_of(model, x.split(2), labels="sampled", n_samples=2, seed=5)
    np.testing.assert_allclose(one.rows.values, other.rows.values, atol=1e-5)
    assert set(one.ranks) == {2}
    true = fishers_of(model, [(x, Y)], labels="true")
    diagonal = fishers_of(model, [(x, Y)], labels="true", kind="diagonal")
    twin = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(twin(x[2:3]), Y[2:3])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(twin.parameters()))]).numpy()
    np.testing.assert_allclose(true.dense(2)[0], -gradient, atol=1e-6)
    np.testing.assert_allclose(diagonal.dense(2), gradient**2, atol=1e-6)
    with pytest.raises(DataError, match="labels"):
        fishers_of(model, [x], labels="true")


# Selection


def test_selection_by_pattern(model: nn.Module, x: Tensor) -> None:
    whole = fishers_of(model, [x])
    for patterns, names in (
        ("5.*", ["5.weight", "5.bias"]),
        (["*.weight", "!0.*"], ["3.weight", "5.weight"]),
        (["!*.bias"], ["0.weight", "3.weight", "5.weight"]),
    ):
        some = fishers_of(model, [x], parameters=patterns)
        assert list(some.parameters.names) == names
        columns = np.concatenate([np.arange(whole.n_parameters)[whole.parameters.block(name)] for name in names])
        np.testing.assert_allclose(some.rows.values, whole.rows.values[:, columns], atol=1e-6)
    for patterns in ("nothing.*", ["5.*", "nope"], ["5.*", "!*"], [], [3]):
        with pytest.raises(ArgumentError, match="parameters"):
            fishers_of(model, [x], parameters=patterns)


def test_tied_parameters_answer_to_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).sum(dim=1))

    assert fishers_of(Tied(), [torch.ones(2, 3, dtype=torch.long)], parameters="head.*").parameters.names == (
        "embed.weight",
    )


def test_the_model_is_left_exactly_as_it_was(model: nn.Module, x: Tensor) -> None:
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[1].train()
    before = {name: (p.requires_grad, p.grad is None, p._version, p.data_ptr()) for name, p in model.named_parameters()}

    def broken() -> Any:
        yield x
        raise KeyboardInterrupt

    fishers = fishers_of(model, [x])
    assert fishers.n_parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(KeyboardInterrupt):
        fishers_of(model, broken())
    assert before == {
        name: (p.requires_grad, p.grad is None, p._version, p.data_ptr()) for name, p in model.named_parameters()
    }
    assert (model[3].weight.grad == 1).all()
    assert model[1].training
    assert not any(module._forward_hooks for module in model.modules())


def test_works_inside_no_grad_and_inference_mode(model: nn.Module, x: Tensor) -> None:
    wanted = fishers_of(model, [x])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            np.testing.assert_array_equal(fishers_of(model, [x * 1]).rows.values, wanted.rows.values)
