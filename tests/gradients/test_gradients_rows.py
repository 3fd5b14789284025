"""Models that give rows to other examples than a batch-first layout does: every batch, against the dense oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npeff.companions.influence import EKFAC, ConjugateGradients, CrossLossInfluence, EmpiricalFisher
from npeff.errors import ModelError
from npeff.fishers.computation import compute_fishers
from npeff.fishers.options import GramOnly, Sketch, TopK
from npeff.gradients import selfcheck
from npeff.perturbation import mean_fisher
from oracles import dense_fishers, dense_jacobians

N, T = 6, 4


class Body(nn.Module):
    """Embeds tokens, a layer on all of them, a read-out of their mean; how rows move is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5, padding_idx=0)
        self.layer = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def pooled(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.layer(self.embed(ids))))
        return (h * (ids > 0)[..., None]).sum(1) / (ids > 0).sum(1, keepdim=True)


class SortsByLength(Body):
    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True)
        return self.head(self.pooled(ids[order]))[order.argsort()]


class SortsByScore(Body):
    def forward(self, ids: Tensor) -> Tensor:
        pooled = self.pooled(ids)
        order = pooled[:, 0].argsort()
        return self.head(pooled[order])[order.argsort()]


class SortsByPermutationMatrix(Body):
    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True)
        back = torch.eye(len(ids), dtype=self.head.weight.dtype)[order.argsort()]
        return back @ self.head(self.pooled(ids[order]))


class SortsInPython(Body):
    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True).tolist()
        sorted_out = self.head(self.pooled(ids[order]))
        return torch.stack([sorted_out[order.index(i)] for i in range(len(order))])


class OneLongRow(Body):
    """All tokens of all examples end to end, without padding."""

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1)
        h = torch.tanh(self.norm(self.layer(self.embed(ids[ids > 0]))))
        owner = torch.repeat_interleave(torch.arange(len(ids)), lengths)
        sums = torch.zeros(len(ids), 5, dtype=h.dtype).index_add(0, owner, h)
        return self.head(sums / lengths[:, None])


class SplitRow(OneLongRow):
    """The same, pooled by pieces."""

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1).tolist()
        h = torch.tanh(self.norm(self.layer(self.embed(ids[ids > 0]))))
        return self.head(torch.stack([piece.mean(0) for piece in h.split(lengths)]))


class Experts(Body):
    """Each token goes to one of two experts; an expert's rows are no example's."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).flatten(0, 1)
        chosen = ids.flatten() % 2
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).nonzero().flatten()
            out = out.index_add(0, mine, torch.tanh(expert(h[mine])))
        return self.head(out.view(*ids.shape, 5).mean(1))


class Branch(Body):
    """A branch for examples with a large token, of which the first batch has none; its rows come in another order."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.pooled(ids)
        large = (ids == 8).any(1)
        if bool(large.any()):
            extra = torch.tanh(self.layer(h.flip(0))).flip(0)
            h = h + torch.where(large[:, None], extra, 0.0)
        return self.head(h)


class Gate(Body):
    """The same without a branch: its factor is zero in all of the first batch."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.pooled(ids)
        gate = (ids == 8).any(1).to(h.dtype)[:, None]
        return self.head(h + gate * torch.tanh(self.layer(h.flip(0))).flip(0))


MODELS = [
    *(SortsByLength, SortsByScore, SortsByPermutationMatrix, SortsInPython, OneLongRow, SplitRow),
    *(Experts, Branch, Gate),
]


def batches() -> list[Tensor]:
    """Three batches: the first with lengths in order and no token 8, the second without order, the third with both."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for lengths, top in (((4, 4, 4, 4, 4, 4), 8), ((2, 4, 3, 4, 4, 1), 8), ((3, 1, 4, 4, 2, 4), 9)):
        ids = torch.randint(1, 8, (N, T), generator=generator)
        ids[torch.arange(T) >= torch.tensor(lengths)[:, None]] = 0
        if top == 9:
            ids[1, 0] = ids[2, 0] = 8
        found.append(ids)
    return found


def errors(model: nn.Module, data: list[Tensor], **options: Any) -> tuple[float, Any]:
    """The largest relative error of an example's Fisher, and the Fishers."""
    fishers = compute_fishers(model, data, progress=False, **options)
    names = [name for name, _ in model.named_parameters()]
    examples = [ids[i : i + 1] for ids in data for i in range(len(ids))]
    truth = dense_fishers(*dense_jacobians(model, examples, names))
    worst = 0.0
    for i, expected in enumerate(truth):
        rows = fishers.dense(i).astype(np.float64)
        found = np.diag(rows) if fishers.kind == "diagonal" else rows.T @ rows
        expected = np.diag(np.diag(expected)) if fishers.kind == "diagonal" else expected
        worst = max(worst, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    return worst, fishers


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("make", MODELS)
def test_rows_that_move_are_right_in_every_batch(make: Callable[[], nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    assert errors(make().eval(), batches(), kind=kind)[0] < 1e-5


@pytest.mark.parametrize("make", MODELS)
def test_rows_that_move_are_right_when_the_first_batch_is_not_sorted(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert errors(make().eval(), batches()[::-1])[0] < 1e-5


@pytest.mark.parametrize("make", [SortsByLength, OneLongRow, Experts])
def test_inner_products_of_rows_that_move_are_right(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    _, exact = errors(model, batches())
    gram = compute_fishers(model, batches(), compress=GramOnly(), progress=False)
    rows = np.concatenate([exact.dense(i) for i in range(len(exact))])
    np.testing.assert_allclose(gram.rows.values, rows @ rows.T, atol=1e-5 * float(np.abs(rows @ rows.T).max()))


def test_a_rule_that_serves_stays_until_its_rows_move() -> None:
    torch.manual_seed(0)
    model = SortsByLength().eval()
    first, all_of_them = (compute_fishers(model, data, progress=False) for data in (batches()[:1], batches()))
    assert all(line["reason"] == "agrees with autograd" for line in first.coverage)
    reasons = {line["parameter"]: line["reason"] for line in all_of_them.coverage}
    assert "rows of an example" in reasons["layer.weight"]


class Hidden(Body):
    """Moves rows by values through a broadcast product, which the graph of other models has too."""

    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True)
        back = torch.eye(len(ids), dtype=self.head.weight.dtype)[order.argsort()]
        return (back[:, :, None] * self.head(self.pooled(ids[order]))[None]).sum(1)


def test_rows_that_move_unseen_are_noticed_by_the_share_of_batches_that_is_checked() -> None:
    torch.manual_seed(0)
    sorted_batch, unsorted = batches()[:2]
    model = Hidden().eval()
    data = [sorted_batch] * selfcheck.EVERY + [unsorted]  # the first is checked with its own passes
    with pytest.raises(ModelError, match="15 batches since the last check may be wrong"):
        compute_fishers(model, data, progress=False)
    assert errors(model, [unsorted, sorted_batch])[0] < 1e-5


@pytest.mark.parametrize("compress", [TopK(40), Sketch(64)])
def test_compressed_rows_that_move_equal_those_of_single_examples(compress: Any) -> None:
    torch.manual_seed(0)
    model = SortsByLength().eval()
    together = compute_fishers(model, batches(), compress=compress, progress=False)
    singles = [ids[i : i + 1] for ids in batches() for i in range(N)]
    alone = compute_fishers(model, singles, compress=compress, progress=False)
    for i in range(len(together)):
        np.testing.assert_allclose(together.dense(i), alone.dense(i), atol=1e-5)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("solver", [EKFAC(), EmpiricalFisher(), ConjugateGradients()])
@pytest.mark.parametrize("make", [SortsByLength, OneLongRow, Experts])
def test_influence_of_rows_that_move_equals_that_of_single_examples(make: Callable[[], nn.Module], solver: Any) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    labelled = [(ids, torch.arange(N) % 3) for ids in batches()]
    singles = [(ids[i : i + 1], labels[i : i + 1]) for ids, labels in labelled for i in range(N)]
    scores = []
    for data in (labelled, singles):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model is not at an optimum
            influence = CrossLossInfluence(model, losses, losses, solver=solver, damping=1.0, progress=False)
            scores.append(np.asarray(influence.scores(data, data).values))
    if isinstance(solver, EKFAC):  # layers that no rule serves are diagonal there; what they share is the gradients
        assert scores[0].shape == scores[1].shape
    else:
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-6 * np.abs(scores[1]).max())


def test_the_mean_fisher_of_rows_that_move_is_right() -> None:
    torch.manual_seed(0)
    model = SortsByLength().eval()
    _, fishers = errors(model, batches(), kind="diagonal")
    found = mean_fisher(model, batches(), progress=False)
    expected = np.mean([fishers.dense(i) for i in range(len(fishers))], axis=0)
    flat = np.concatenate([found[p.name].numpy().reshape(-1) for p in fishers.parameters])
    np.testing.assert_allclose(flat, expected, rtol=1e-4, atol=1e-8)
