"""Positions as examples in the gradient engine: one forward pass per sequence, the Fisher of every place right."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import npeff
from language_cases import SmallLanguageModel, fishers_of_places, token_batches
from npeff.gradients import blocks

TILES = [1 << 20, 40]


def rows_agree(fishers, expected, rtol=3e-6):
    for i, dense in enumerate(expected):
        rows = fishers.dense(i).astype(np.float64)
        found = rows.ravel() if fishers.kind == "diagonal" else rows.T @ rows
        wanted = dense.diagonal() if fishers.kind == "diagonal" else dense
        assert np.abs(found - wanted).max() <= rtol * np.abs(dense).max()
        assert abs(fishers.norms[i] - np.linalg.norm(wanted)) <= 10 * rtol * np.linalg.norm(wanted)


@pytest.fixture(scope="module", params=["right", "left"])
def case(request):
    data = token_batches(request.param, every=2, counts=((7, 3, 5), (6,), (4, 4)))
    data[0]["labels"][1] = -100  # a sequence without a place
    models = {tied: SmallLanguageModel(tied) for tied in (False, True)}
    return {tied: (model, data, *fishers_of_places(model, data)) for tied, model in models.items()}


@pytest.fixture(params=[None, 150_000], ids=["at once", "in parts"])
def kept(request, monkeypatch):
    """How many bytes of output gradients are kept: few make many passes over one graph."""
    if request.param is not None:
        monkeypatch.setattr("npeff.fishers.budget.KEPT_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("elements", TILES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_each_place_has_its_fisher(case, kept, kind, tied, elements, monkeypatch):
    monkeypatch.setattr(blocks, "TILE_ELEMENTS", elements)
    model, data, expected, logits = case[tied]
    fishers = npeff.compute_fishers(model, data, kind=kind, progress=False)
    rows_agree(fishers, expected)
    np.testing.assert_allclose(fishers.logits, logits, atol=1e-5)
    assert fishers.ids.tolist() == list(range(len(expected)))
    assert {line["rule"] for line in fishers.coverage}.isdisjoint({"torch.func", "loop", "zero"})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [None, [1, 4, 9]])
def test_passes_begin_below_an_output_layer_without_a_fisher(case, kept, bias, outputs, monkeypatch):
    model, data, _, _ = case[False]
    model = copy.deepcopy(model)
    if bias:
        model.head = torch.nn.Linear(8, 11)
    begun = []
    real = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, *more, **rest: begun.append(out) or real(out, *more, **rest)
    )
    names = [name for name, _ in model.named_parameters() if "head" not in name and "embed" not in name]
    given = (
        data
        if outputs is None
        else [npeff.Batch({**b, "labels": b["labels"].clamp_max(2)}, outputs=outputs) for b in data]
    )
    fishers = npeff.compute_fishers(model, given, parameters=names, progress=False)
    assert {edge.node.name() for edge in begun[-3:]} == {"ViewBackward0"}  # of the head's input
    call = None if outputs is None else lambda m, b: m(b["input_ids"], b["attention_mask"])[..., outputs]
    rows_agree(fishers, fishers_of_places(model, data, call, names)[0])


class LargeInputs(torch.nn.Module):
    """Token 9 has inputs of a layer so large that its gradient fits float32, and sums of its entries do not."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 64)
        self.layer, self.head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 11)
        with torch.no_grad():
            self.layer.weight.mul_(1e-38)
            self.head.weight.mul_(4.0)
            self.head.bias[0] = 110.0  # confident: the Fisher itself fits

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.head(self.layer(torch.where((input_ids == 9)[..., None], 3e38 * x.tanh(), x)))


def test_a_sketch_that_overflows_names_its_place():
    torch.manual_seed(0)
    ids, labels = torch.tensor([[1, 2], [3, 4], [5, 9]]), torch.tensor([[-100, -100], [-100, 3], [-100, 7]])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    data = [{key: value[1:2] for key, value in whole.items()}, whole]
    how = {"parameters": ["layer.weight"], "compress": npeff.Sketch(16), "progress": False}
    with pytest.raises(npeff.DataError, match="the sketch of example 2 overflows float32"):
        npeff.compute_fishers(LargeInputs(), data, **how)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_top_k_of_each_place(case, kept, kind, monkeypatch):
    monkeypatch.setattr("npeff.fishers.topk_sink._FEWEST", 1)
    model, data, expected, _ = case[True]
    exact = npeff.compute_fishers(model, data, kind=kind, progress=False)
    some = npeff.compute_fishers(model, data, kind=kind, compress=npeff.TopK(60), progress=False)
    for i in range(len(expected)):
        wanted, found = exact.dense(i).ravel(), some.dense(i).ravel()
        assert (found != 0).sum() == 60
        np.testing.assert_allclose(found[found != 0], wanted[found != 0], rtol=1e-4, atol=1e-8)
        assert np.abs(found[found != 0]).min() >= np.sort(np.abs(wanted))[-60] * (1 - 1e-4)
    np.testing.assert_allclose(some.norms, exact.norms, rtol=1e-5)


@pytest.mark.parametrize("form", ["flat", "kronecker"])
@pytest.mark.parametrize("tied", [False, True])
def test_sketches_of_each_place(case, kept, form, tied, monkeypatch):
    monkeypatch.setattr(npeff.Sketch, "two_sided", lambda self, shape: self.form == "kronecker" and len(shape) == 2)
    monkeypatch.setattr("npeff.fishers.sinks._ON_HOST", npeff.fishers.sinks._Costs(0.0, 0.0, 1.0))  # from factors
    model, data, expected, _ = case[tied]
    sketched = npeff.compute_fishers(model, data, compress=npeff.Sketch(64, form=form), progress=False)
    alone = [
        {key: value[[s]] for key, value in batch.items() if key != "labels"}
        | {"labels": torch.where(torch.arange(len(batch["labels"][0])) == t, batch["labels"][[s]], -100)}
        for batch in data
        for s, t in (batch["labels"] != -100).nonzero().tolist()
    ]
    one_by_one = npeff.compute_fishers(model, alone, compress=npeff.Sketch(64, form=form), progress=False)
    assert len(sketched) == len(expected)
    for i in range(len(expected)):
        np.testing.assert_allclose(sketched.dense(i), one_by_one.dense(i), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sketched.norms, [np.linalg.norm(dense) for dense in expected], rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_inner_products_of_all_places(case, kept, tied):
    model, data, expected, logits = case[tied]
    fishers = npeff.compute_fishers(model, data, compress=npeff.GramOnly(), progress=False)
    exact = npeff.compute_fishers(model, data, progress=False)
    rows = np.concatenate([exact.dense(i) for i in range(len(expected))]).astype(np.float64)
    gram = rows @ rows.T
    np.testing.assert_allclose(fishers.rows.row_gram(torch.float64), gram, atol=1e-5 * np.abs(gram).max())
    np.testing.assert_allclose(fishers.logits, logits, atol=1e-5)
    assert fishers.labels.tolist() == exact.labels.tolist()
    assert fishers.places is not None and exact.places is not None
    np.testing.assert_array_equal(fishers.places, exact.places)


def test_a_sequence_goes_forward_once_however_many_places_it_has(monkeypatch):
    model, (batch,) = SmallLanguageModel(), token_batches(counts=((7, 6, 6),))
    sequences, places = [], []
    model.register_forward_hook(lambda module, given, output: sequences.append(len(output)))
    real = npeff.fishers.passes.factorise
    monkeypatch.setattr("npeff.fishers.passes.factorise", lambda z, *more: places.append(len(z)) or real(z, *more))
    monkeypatch.setattr("npeff.fishers.budget.KEPT_BYTES", 150_000)
    npeff.compute_fishers(model, [batch], progress=False)
    # Two sequences, and each of them alone, to choose the rules; all; half of them; the first two again at the end.
    assert sequences == [2, 1, 1, 3, 2, 2]
    assert sum(places) == 19 and len(places) > 2


def test_memory_bounds_forward_passes_and_places(case):
    model, data, expected, _ = case[False]
    rows_agree(npeff.compute_fishers(model, data, memory=12_000, progress=False), expected)


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 0.7}, {"labels": "sampled", "n_samples": 2}, {"labels": "true"}]
)
def test_options_of_the_factor(case, kept, options):
    model, data, expected, _ = case[False]
    fishers = npeff.compute_fishers(model, data, progress=False, **options)
    alone = [
        {key: value[[s]] for key, value in batch.items()}
        for batch in data
        for s in range(len(batch["labels"]))
        if (batch["labels"][s] != -100).any()
    ]
    one_by_one = npeff.compute_fishers(model, alone, progress=False, **options)
    assert fishers.ranks.tolist() == one_by_one.ranks.tolist()
    for i in range(len(expected)):
        np.testing.assert_allclose(fishers.dense(i), one_by_one.dense(i), atol=1e-5)


def test_some_outputs_alone(case):
    model, data, _, _ = case[True]
    kept = [npeff.Batch({**batch, "labels": batch["labels"].clamp_max(2)}, outputs=[1, 4, 9]) for batch in data]
    fishers = npeff.compute_fishers(model, kept, progress=False)
    expected, logits = fishers_of_places(
        model, data, lambda m, b: m(b["input_ids"], b["attention_mask"])[..., [1, 4, 9]]
    )
    rows_agree(fishers, expected)
    np.testing.assert_allclose(fishers.logits, logits, atol=1e-5)
    assert set(fishers.ranks) == {2}


class Scaled(SmallLanguageModel):
    """A model with a parameter that no rule serves."""

    def __init__(self):
        super().__init__()
        self.power = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask).sinh() ** 1 * self.power.cos() + self.power**2


def test_parameters_without_a_rule_are_right_too(case, kept):
    data, model = case[False][1], Scaled()
    for kind in ("low_rank", "diagonal"):
        fishers = npeff.compute_fishers(model, data, kind=kind, progress=False)
        rows_agree(fishers, fishers_of_places(model, data)[0], rtol=1e-5)
    assert {line["rule"] for line in fishers.coverage if line["parameter"] == "power"} == {"torch.func"}


def test_a_model_that_mixes_sequences_is_refused():
    class Mixed(SmallLanguageModel):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask)
            return logits - logits.mean(0)

    with pytest.raises(npeff.ModelError, match="examples influence each other"):
        npeff.compute_fishers(Mixed(), token_batches(), progress=False)


def test_a_batch_by_the_users_take(case):
    model, data, expected, _ = case[False]
    own = [npeff.Batch(b, len(b["labels"]), lambda c, at: {key: value[at] for key, value in c.items()}) for b in data]
    rows_agree(npeff.compute_fishers(model, own, memory=12_000, progress=False), expected)
