"""compute_fishers from end to end: data, selection, compression, resuming, and everything that must be
refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from npeff.compress import TopK
from npeff.computation import compute_fishers
from npeff.errors import ArgumentError, DataError, ModelError, ResumeError
from oracles import dense_fishers, dense_jacobians, largest

N = 9


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    body = [
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    ]
    return nn.Sequential(*body).eval()


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))


Y = torch.arange(N) % 3


def fishers_of(model: nn.Module, data: Any, **options: Any) -> Any:
    return compute_fishers(model, data, progress=False, **options)


def exact(model: nn.Module, x: Tensor, names: tuple[str, ...], likelihood: str = "categorical") -> np.ndarray:
    return dense_fishers(*dense_jacobians(model, [x[i : i + 1] for i in range(len(x))], names), likelihood)


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
    p = torch.softmax(torch.from_numpy(some.logits), 1).numpy()
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


# Refusals


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d in training mode"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "track_running_stats"),
        (nn.Dropout(0.5), "Dropout is active"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    ],
)
def test_layers_without_per_example_gradients_are_refused(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ModelError, match=words) as caught:
        fishers_of(model, [torch.randn(3, 4)])
    assert "1 (" in str(caught.value)


def test_examples_that_influence_each_other_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - x.mean(dim=0))

    class Mixed(nn.Module):
        """The same logits alone and in the batch, but not the same gradients: only autograd can see it."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.power = nn.Linear(4, 3), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.exp(self.power)
            mean = y.mean(dim=0)
            return self.head(y + (mean - mean.detach()))

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + torch.rand(())

    x = torch.randn(5, 4)
    for model, words in (
        (Centred(), "influence each other"),
        (Mixed(), "influence each other"),
        (Noisy(), "deterministic"),
    ):
        with pytest.raises(ModelError, match=words):
            fishers_of(model, [x])


def test_a_forward_pass_hidden_from_autograd_is_refused(model: nn.Module, x: Tensor) -> None:
    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return m(batch)

    with pytest.raises(ModelError, match="no_grad"):
        fishers_of(model, [x], forward=forward)


def test_non_finite_values_are_named(model: nn.Module, x: Tensor) -> None:
    bad = x.clone()
    bad[7] = float("nan")
    with pytest.raises(DataError, match="example 7"):
        fishers_of(model, bad.split(3))
    with pytest.raises(DataError, match="example 7"):
        fishers_of(model, [bad])

    class Root(nn.Module):
        """Finite logits, infinite gradient where the input is zero."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))
            self.head = nn.Linear(4, 3)

        def forward(self, v: Tensor) -> Tensor:
            return self.head(torch.sqrt((v + self.shift).clamp_min(0)))

    v = torch.rand(6, 4) + 0.5
    v[4, 2] = 0.0
    for options in ({}, {"kind": "diagonal"}, {"compress": TopK(3)}):
        for size in (2, 6):
            with pytest.raises(DataError, match=r"example 4 .* shift\[2\]"):
                fishers_of(Root(), v.split(size), **options)


def test_a_perfectly_confident_example_is_kept_as_zero(model: nn.Module, x: Tensor) -> None:
    for options in ({}, {"compress": TopK(7)}, {"kind": "diagonal"}, {"energy": 0.9}):
        batch = x[:3]
        flagged = {"x": batch, "sure": torch.tensor([0.0, 2e3, 0.0])}
        fishers = fishers_of(
            model, [flagged], forward=lambda m, b: m(b["x"]) + b["sure"][:, None] * torch.eye(3)[0], **options
        )
        assert fishers.zero.tolist() == [False, True, False]
        assert not fishers.dense(1).any()


def test_model_changed_during_the_work(model: nn.Module, x: Tensor) -> None:
    def visible() -> Any:
        yield x
        with torch.no_grad():
            model[3].bias.add_(1)
        yield x

    def hidden() -> Any:
        yield x
        model[3].bias.data += 1
        yield x

    for data in (visible(), hidden()):
        with pytest.raises(ModelError, match="changed"):
            fishers_of(model, data)


def test_wrong_arguments(model: nn.Module, x: Tensor) -> None:
    for options, words in (
        ({"kind": "full"}, "kind"),
        ({"device": "nowhere"}, "device"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ArgumentError, match=words):
            fishers_of(model, [x], **options)
    with pytest.raises(ArgumentError, match="model"):
        fishers_of(lambda v: v, [x])
    with pytest.raises(ArgumentError, match="meta"):
        fishers_of(nn.Linear(2, 2, device="meta"), [x])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ArgumentError, match="one device"):
        fishers_of(mixed, [x])


# Memory, pieces, files


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_no_tensor_holds_all_examples_rows_and_parameters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import npeff.gradients.tiles as tiles

    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 4096)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(200, 16),
        nn.Linear(16, 64),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 64, 32),
        nn.Linear(32, 5),
    )
    m, batch, rank = sum(p.numel() for p in model.parameters()), 16, 4
    with Largest() as seen:
        fishers_of(model, [torch.randint(0, 200, (batch, 4))], kind=kind, compress=TopK(100))
    assert seen.numel <= max(p.numel() for p in model.parameters()) * 1.01
    assert seen.numel * 20 < batch * rank * m


def test_tiles_and_pieces_do_not_change_the_result(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npeff.gradients import budget, tiles

    whole = fishers_of(model, [(x, Y)], compress=TopK(60))
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(budget, "KEPT_BYTES", 3000)
    pieces = fishers_of(model, [(x, Y)], compress=TopK(60))
    for i in range(N):
        np.testing.assert_allclose(pieces.dense(i), whole.dense(i), atol=2e-6)
    np.testing.assert_allclose(pieces.norms, whole.norms, rtol=1e-5)
    assert pieces.ids.tolist() == list(range(N))


@pytest.mark.parametrize(("memory", "most"), [(2_000, 1), (20_000, N - 1), ("1MB", N)])
def test_batches_are_cut_to_a_memory(model: nn.Module, x: Tensor, memory: int | str, most: int, tmp_path: Path) -> None:
    whole = fishers_of(model, [(x, Y)], compress=TopK(60))
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    cut = fishers_of(model, [(x, Y)], compress=TopK(60), memory=memory, out=tmp_path / "cut.h5")
    assert sizes[0] == 2  # the trial
    assert max(sizes[1:]) <= most
    assert (max(sizes) == N) == (most == N)
    for i in range(N):
        np.testing.assert_allclose(cut.dense(i), whole.dense(i), atol=2e-6)
    assert cut.ids.tolist() == list(range(N))
    again = fishers_of(model, [(x, Y)], compress=TopK(60), out=tmp_path / "cut.h5")  # memory does not enter the result
    np.testing.assert_array_equal(again.rows.values, cut.rows.values)
    hook.remove()
    with pytest.raises(ArgumentError, match="memory"):
        fishers_of(model, [(x, Y)], memory="much")


def test_work_resumes_where_it_stopped(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    batches = [(x[i : i + 3], Y[i : i + 3]) for i in range(0, N, 3)]
    bad = [*batches[:2], (batches[2][0] * float("inf"), batches[2][1])]
    wanted = fishers_of(model, batches, compress=TopK(40), out=tmp_path / "whole.h5")
    with pytest.raises(DataError, match="example 6"):
        fishers_of(model, bad, compress=TopK(40), out=tmp_path / "stopped.h5")
    with pytest.raises(ResumeError):
        fishers_of(model, batches, compress=TopK(41), out=tmp_path / "stopped.h5")
    got = fishers_of(model, batches, compress=TopK(40), out=tmp_path / "stopped.h5")
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "stopped.h5").read_bytes()
    np.testing.assert_array_equal(got.rows.values, wanted.rows.values)
    assert got.provenance["model_digest"] == wanted.provenance["model_digest"]


def test_progress_goes_to_stderr_and_can_be_silenced(
    model: nn.Module, x: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    compute_fishers(model, x.split(3))
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert not shown.out
    compute_fishers(model, x.split(3), progress=False)
    silent = capsys.readouterr()
    assert not silent.err
    assert not silent.out
