"""Bad arguments, data and models are refused with a message that helps; models that change leave nothing behind."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.errors import ArgumentError, DataError, ModelError, OutOfMemoryError, ResumeError, StorageError
from npeff.fishers.computation import compute_fishers
from npeff.fishers.shards import FisherWriter
from npeff.models.devices import usable_device
from npeff.models.parameters import model_digest


def mlp(n_outputs=3, activation=nn.ReLU, n_inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_inputs, 8), activation(), nn.Linear(8, n_outputs)).eval()


def batches(n=20, size=5, labels=True):
    generator = torch.Generator().manual_seed(1)
    inputs, classes = torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)
    parts = list(zip(inputs.split(size), classes.split(size), strict=True))
    return parts if labels else [part[0] for part in parts]


def fishers(model=None, data=None, **options):
    return compute_fishers(model or mlp(), batches() if data is None else data, progress=False, **options)


def interrupted(data, after, action):
    """The batches; ``action`` is called once ``after`` of them were taken and the next one is asked for."""
    for number, batch in enumerate(data):
        if number == after:
            action()
        yield batch


@pytest.fixture
def tiny_shards(monkeypatch):
    monkeypatch.setitem(FisherWriter.__init__.__kwdefaults__, "shard_bytes", 1)


class Stop(Exception):
    pass


def stop():
    raise Stop


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_a_model_changed_through_data_leaves_no_poisoned_shard(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setitem(FisherWriter.__init__.__kwdefaults__, "shard_bytes", shard_bytes)
    out, model = tmp_path / "f.h5", mlp()
    with pytest.raises(ModelError, match="changed while"):
        fishers(model, interrupted(batches(), 2, lambda: model[0].weight.data.mul_(2)), out=out)
    expected = fishers()
    resumed = fishers(out=out)
    np.testing.assert_array_equal(resumed.norms, expected.norms)


def test_tainted_blocks_are_dropped_when_the_work_is_interrupted(tmp_path):
    out, model = tmp_path / "f.h5", mlp()

    def spoil():
        model[0].weight.data.mul_(2)

    data = interrupted(interrupted(batches(), 1, spoil), 3, stop)
    with pytest.raises((Stop, ModelError)):
        fishers(model, data, out=out)
    assert list(tmp_path.iterdir()) == []


def test_a_second_check_refuses_the_changed_model_too():
    from npeff.models.parameters import ModelWatch

    model = mlp()
    watch = ModelWatch(model)
    with torch.no_grad():
        model[0].bias.add_(1)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"0\.bias changed"):
            watch.check()


@pytest.mark.parametrize("finished", [False, True])
def test_another_function_with_the_same_weights_is_not_resumed(tmp_path, tiny_shards, finished):
    out = tmp_path / "f.h5"
    if finished:
        fishers(out=out)
    else:
        with pytest.raises(Stop):
            fishers(data=interrupted(batches(), 2, stop), out=out)
    with pytest.raises(ResumeError, match="other logits"):
        fishers(out=out, forward=lambda model, batch: 2 * model(batch[0]))
    with pytest.raises(ResumeError):
        fishers(mlp(activation=nn.GELU), out=out)
    changed = [(batches()[0][0] + 1, batches()[0][1]), *batches()[1:]]
    with pytest.raises(ResumeError, match="contents differ"):
        fishers(data=changed, out=out)
    np.testing.assert_array_equal(fishers(out=out).norms, fishers().norms)


def test_the_digest_covers_the_architecture_but_no_addresses():
    class Odd(nn.Linear):
        def extra_repr(self):
            return f"key={object()!r}"

    assert model_digest(mlp()) == model_digest(mlp()) != model_digest(mlp(activation=nn.Tanh))
    torch.manual_seed(0)
    odd = Odd(2, 2)
    assert model_digest(odd) == model_digest(odd)


def test_train_mode_during_the_work_is_refused():
    model = mlp()
    with pytest.raises(ModelError, match="training mode"):
        fishers(model, interrupted(batches(), 2, model.train))


@pytest.mark.parametrize("device", ["meta", "foo", "cuda:63", "hpu", 3.5])
def test_unusable_devices_never_harm_the_model(device):
    model = mlp()
    with pytest.raises(ArgumentError, match=r"^device: .*npeff doctor"):
        fishers(model, device=device)
    assert next(model.parameters()).device.type == "cpu"
    assert usable_device("cpu") == torch.device("cpu")


def test_errors_within_the_model_name_the_batch():
    with pytest.raises(ModelError, match=r"inputs \(5, 6\) float32.*RuntimeError.*forward=") as caught:
        fishers(mlp(n_inputs=7))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ModelError, match=r"^forward: .*ZeroDivisionError"):
        fishers(forward=lambda model, batch: 1 / 0)
    with pytest.raises(ModelError, match='rename "label"'):
        fishers(data=[{"x": torch.randn(4, 6), "label": torch.zeros(4)}])


class Full(torch.autograd.Function):
    """Finds no memory in the forward pass, the backward pass, or none of a real allocation."""

    @staticmethod
    def forward(ctx, x, when):
        if when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        if when == "allocation":
            torch.empty(1 << 55)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")


@pytest.mark.parametrize("when", ["forward", "backward", "allocation"])
@pytest.mark.parametrize("work", ["fishers", "gram", "mean", "recover", "perturb", "mend"])
def test_too_little_memory_names_what_cuts_batches(when, work):
    enough = work in ("recover", "perturb", "mend")

    def full(model, batch):
        return model(batch[0]) if enough else Full.apply(model(batch[0]), when)

    model = mlp()
    if enough:
        made = fishers(model, forward=full, compress=None if work == "mend" else npeff.Sketch(16))
        components = npeff.decompose(made, n_components=1, n_init=1, progress=False)
        enough = False
    how = {"forward": full, "progress": False}
    call = {
        "fishers": lambda: npeff.compute_fishers(model, batches(), **how),
        "gram": lambda: npeff.compute_fishers(model, batches(), compress=npeff.GramOnly(), **how),
        "mean": lambda: npeff.mean_fisher(model, batches(), **how),
        "recover": lambda: components.recover(model, batches(), **how),
        "perturb": lambda: npeff.perturb(model, batches(), components, 0, **how),
        "mend": lambda: npeff.mend(model, batches(), components, 0, repair=range(6), **how),
    }[work]
    said = "can't allocate memory" if when == "allocation" else r"CUDA out of memory. Tried to allocate 2.00 GiB\.\)"
    with pytest.raises(OutOfMemoryError, match=rf"^memory: .*{said}.* give smaller batches .*memory='2GB'") as caught:
        call()
    assert isinstance(caught.value, MemoryError)


def test_too_little_memory_at_any_pass_of_a_perturbation():
    model, calls, full = mlp(), [], []
    components = npeff.decompose(fishers(model), n_components=1, n_init=1, progress=False)

    def counted(model, batch):
        calls.append(batch)
        if len(calls) in full:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return model(batch[0])

    options = {"magnitude": 0.1, "n_random": 1, "curve": 0, "n_resamples": 0, "forward": counted, "progress": False}
    npeff.perturb(model, batches(), components, 0, **options)
    for number in range(1, len(calls) + 1):
        calls.clear()
        full[:] = [number]
        with pytest.raises(OutOfMemoryError, match=r"^memory: .*8 bytes"):
            npeff.perturb(model, batches(), components, 0, **options)


class Branching(nn.Module):
    """Its parameter has no rule, and vmap refuses its branch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs):
        rows = [
            torch.sin(self.weight).T @ row if float(row.detach().sum()) > 0 else self.weight.T @ row for row in inputs
        ]
        return torch.stack(rows)


def test_the_fallback_still_loops_where_vmap_refuses():
    coverage = fishers(Branching()).coverage
    assert coverage[0]["rule"] == "loop"
    assert "RuntimeError" in coverage[0]["reason"]


def test_logits_whose_number_depends_on_the_batch():
    with pytest.raises(ModelError, match=r"\(1, 3\).*\(1, 2\)"):
        fishers(forward=lambda model, batch: model(batch[0])[:, : 3 if len(batch[0]) > 1 else 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 5, "encode strings"),
        (np.array(["a"] * 5), "encode strings"),
        ([[1], [1, 2], [1], [1], [1]], "expected integers"),
        (torch.full((5,), float("inf")), "integer classes"),
        (torch.full((5,), 1e30), "integer classes"),
        (np.full(5, 2**63, np.uint64), "integer classes"),
        (torch.full((5,), 3), "example 0 has label 3; expected 0 ≤ label < 3"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(DataError, match=f"labels: .*{message}"):
        fishers(data=[(torch.randn(5, 6), labels)])


def test_bad_targets():
    for likelihood, value in (("bernoulli", 7.0), ("bernoulli", float("nan")), ("gaussian", float("nan"))):
        with pytest.raises(DataError, match="labels: example 0 has the target"):
            fishers(mlp(1), [(torch.randn(4, 6), torch.full((4,), value))], likelihood=likelihood, labels="true")


def test_negative_labels_are_unknown():
    assert (fishers(data=[(torch.randn(5, 6), torch.full((5,), -100))]).labels == -1).all()


def test_the_target_is_checked_before_the_model_runs(tmp_path):
    with pytest.raises(StorageError, match="nowhere"):
        fishers(out=tmp_path / "nowhere" / "f.h5", forward=lambda model, batch: stop())


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("compress", [None, npeff.TopK(10)])
def test_a_perfectly_confident_example_is_a_zero_fisher(kind, compress):
    data = batches()
    data[1][0][2, 3] = 1e30
    norms = fishers(data=data, kind=kind, compress=compress).norms
    assert norms[7] == 0
    assert np.isfinite(norms).all()


@pytest.mark.parametrize("options", [{"out": 3}, {"parameters": 3}, {"forward": 3}])
def test_wrong_types(options):
    with pytest.raises(ArgumentError, match=f"^{next(iter(options))}: .*3"):
        fishers(**options)


def test_vmap_does_not_warn_of_its_performance():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, inputs):
            return inputs @ torch.cummax(self.weight * inputs.mean(), 0).values.sin()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fishers(Slow(), data=[batch[:1] for batch in batches(labels=False)])
