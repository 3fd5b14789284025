"""npeff.plan: bytes against the files that are really written, passes and coverage against what the model has."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff import planning
from npeff.fishers.options import GramOnly, Sketch, TopK
from npeff.models.devices import Peak, held_bytes
from npeff.planning import trials
from npeff.storage.container import open_container


class Scaled(nn.Module):
    """A layer and a parameter that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.exponent = nn.Linear(6, 8), nn.Parameter(torch.full((8,), 1.5))
        self.outer, self.idle = nn.Linear(8, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)).clamp_min(0.1) ** self.exponent)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 4)).eval()


@pytest.fixture(scope="module")
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(7, 6), torch.randint(4, (7,))) for _ in range(3)]


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    """Sizes that fit the tests' models."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (planning, trials):
            patch.setattr(module, "TOP_KS", (16, 64, 4096))
            patch.setattr(module, "SKETCH_DS", (32,))
        patch.setattr("npeff.planning.trials.PROBE_BYTES", 1 << 16)
        yield


@pytest.fixture
def few_ways(monkeypatch):
    """One top-k beside exact rows: for tests of what all ways share."""
    for module in (planning, trials):
        monkeypatch.setattr(module, "TOP_KS", (4096,))
        monkeypatch.setattr(module, "SKETCH_DS", ())


@pytest.fixture(scope="module")
def planned(model, data, small_sizes):
    """A plan of both kinds whose trials are all of the data, so that nothing is extrapolated."""
    return npeff.plan(model, data, batches=3, n_components=5)


def array_bytes(path) -> int:
    """Bytes of the numbers in a file, without its JSON documents."""
    return sum(spec.nbytes for spec in open_container(path).specs.values() if spec.dtype.kind != "S")


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("energy", [None, 0.8])
def test_bytes_on_disk_are_those_of_the_file(model, data, tmp_path, planned, kind, energy):
    if energy is not None:
        planned = npeff.plan(model, data, kind=kind, energy=energy, batches=3, folder=tmp_path)
    assert planned.n_examples == 21
    assert planned.examples_from == "counted"
    checked = 0
    for choice in planned.choices:
        if isinstance(choice.compress, GramOnly) or choice.kind != kind:
            continue
        out = tmp_path / f"{choice.name}.h5"
        npeff.compute_fishers(model, data, kind=kind, energy=energy, compress=choice.compress, out=out, progress=False)
        assert choice.disk_bytes == array_bytes(out), choice.name
        checked += 1
    assert checked >= 3


def test_places_are_counted_not_sequences(few_ways):
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    tokens, labels = torch.randint(7, (12, 6)), torch.randint(2, (12, 6))
    labels[:, 4:] = -100
    batches = list(zip(tokens.split(3), labels.split(3), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), 3)
    for data, known in ((batches, "counted"), (loader, "estimated")):
        assert len(npeff.compute_fishers(Tagger().eval(), data, progress=False)) == 48
        planned = npeff.plan(Tagger().eval(), data, kind="low_rank")
        assert (planned.n_examples, planned.examples_from) == (48, known)
    assert "about 48 examples" in str(planned)


def test_nothing_is_left_behind(model, data, tmp_path, few_ways):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    npeff.plan(model, data, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_passes_are_those_of_the_factor(model, data, few_ways):
    exact = npeff.plan(model, data, kind="low_rank")
    assert exact.passes == 3
    assert not exact.passes_vary
    assert npeff.plan(model, data, kind="low_rank", basis="class").passes == 4
    assert npeff.plan(model, data, kind="low_rank", rank=2).passes == 2
    assert npeff.plan(model, data, kind="low_rank", labels="sampled", n_samples=5).passes == 5
    truncated = npeff.plan(model, data, kind="low_rank", energy=0.7, batches=3)
    ranks = npeff.compute_fishers(model, data, energy=0.7, progress=False).ranks
    assert truncated.passes == pytest.approx(ranks.mean())
    assert truncated.passes_vary == bool((ranks != ranks[0]).any())


def test_passes_of_the_diagonal_kind_count_columns_not_rows(model, data, few_ways):
    assert npeff.plan(model, data, kind="diagonal").passes == 3
    ranks = npeff.compute_fishers(model, data, energy=0.7, progress=False).ranks
    assert npeff.plan(model, data, kind="diagonal", energy=0.7, batches=3).passes == pytest.approx(ranks.mean())


def test_coverage_says_what_falls_back_and_why(data, few_ways):
    torch.manual_seed(0)
    planned = npeff.plan(Scaled().eval(), [(x, y % 3) for x, y in data], kind="low_rank")
    rules = {line["parameter"]: line["rule"] for line in planned.coverage}
    assert rules["inner.weight"] == "linear"
    assert rules["exponent"] in ("torch.func", "loop")
    assert rules["idle"] == "zero"
    text = str(planned)
    assert "exponent: " in text
    assert "idle: zero — the logits do not depend on it" in text


def test_more_examples_scale_what_was_counted(model, data, planned):
    once = [choice for choice in planned.choices if choice.kind == "low_rank"]
    many = npeff.plan(model, data, kind="low_rank", batches=3, n_examples=2100)
    beside_rows = [8 * (n + 1) + n * (4 + 4 * 4 + 8 + 8) for n in (21, 2100)]
    for a, b in zip(once, many.choices, strict=True):
        rows_once, rows_many = a.disk_bytes - beside_rows[0], b.disk_bytes - beside_rows[1]
        factor = 100**2 if isinstance(a.compress, GramOnly) else 100
        assert rows_many == pytest.approx(factor * rows_once, abs=8 * 100)
        assert b.seconds > 0
        assert b.decompose_bytes > a.decompose_bytes > 0
        assert b.decompose_seconds > 0
    assert many.examples_from == "given"


def test_kept_share_is_measured(model, data, planned):
    for choice in planned.choices:
        if isinstance(choice.compress, TopK):
            stored = npeff.compute_fishers(model, data, kind=choice.kind, compress=choice.compress, progress=False)
            dense = [stored.dense(i) for i in range(len(stored))]
            norms = [np.linalg.norm(a @ a.T if choice.kind == "low_rank" else a) for a in dense]
            assert choice.kept == pytest.approx(float(np.median(norms / stored.norms)), rel=1e-4)


def test_error_of_inner_products_is_measured(model, data, planned):
    def scaled_gram(fishers):
        """K with every example scaled to a Fisher of norm 1."""
        rows = [fishers.dense(i).astype(np.float64) for i in range(len(fishers))]
        A = np.concatenate([a / np.linalg.norm(a @ a.T) ** 0.5 for a in rows])
        return A @ A.T

    exact = scaled_gram(npeff.compute_fishers(model, data, progress=False))
    checked = set()
    for choice in (choice for choice in planned.choices if choice.kind == "low_rank"):
        if isinstance(choice.compress, TopK):
            stored = npeff.compute_fishers(model, data, compress=choice.compress, progress=False)
            expected = np.linalg.norm(scaled_gram(stored) - exact) / np.linalg.norm(exact)
        elif isinstance(choice.compress, Sketch):
            stored = npeff.compute_fishers(model, data, compress=choice.compress, progress=False)
            A = np.asarray(stored.rows.values, np.float64).reshape(len(stored), -1, choice.compress.d)
            A = np.concatenate([a / np.linalg.norm(a @ a.T) ** 0.5 for a in A])
            expected = np.linalg.norm(A @ A.T - exact) / np.linalg.norm(exact)
        else:
            expected = 0.0
        assert choice.gram_error == pytest.approx(expected, rel=1e-3)
        checked.add(type(choice.compress))
    assert checked == {type(None), GramOnly, TopK, Sketch}
    assert "error of K" in str(planned)


def test_advice_takes_what_is_faithful_enough():
    def advice(*ways):
        choices = [
            planning.Choice("low_rank", compress, str(compress), disk, 1, 1.0, "", kept, error, None, None)
            for compress, disk, error, kept in ways
        ]
        return planning._advice(choices, 100, 100)[0]  # private: errors of real trials cannot be chosen

    top_k, sketch = (TopK(8), 20, 0.04, None), (Sketch(1024), 10, 0.08, None)
    assert advice(top_k, sketch).flags == "--sketch 1024"
    assert advice(top_k, (Sketch(1024), 10, 0.12, None)).flags == "--top-k 8"
    assert advice((TopK(8), 5, 0.3, None), (Sketch(1024), 10, 0.2, None)).flags == "--sketch 1024"
    untried = (TopK(8), 20, None, 0.95), (Sketch(64), 5, None, None)
    assert advice(*untried).flags == "--top-k 8"
    assert "keeps 0.95" in advice(*untried).reason


def test_advice_follows_the_budget(model, data):
    roomy = npeff.plan(model, data, memory="2GB", disk="1GB")
    assert [(a.kind, a.name) for a in roomy.advice] == [("low_rank", "exact"), ("diagonal", "exact")]
    assert roomy.advice[0].flags == "--exact"
    tight = npeff.plan(model, data, kind="low_rank", memory="2GB", disk="8kB", n_examples=21)
    assert tight.advice[0].name == "top-k 16"
    assert tight.advice[0].flags == "--top-k 16"
    assert "Fisher's norm" in tight.advice[0].reason or "inner products" in tight.advice[0].reason
    nothing = npeff.plan(model, data, memory="1kB", disk="1kB")
    assert all(a.name == "" and "nothing fits" in a.reason and not a.flags for a in nothing.advice)


def test_json_and_text_hold_the_same_choices(planned):
    document = json.loads(planned.to_json())
    assert [c["name"] for c in document["choices"]] == [c.name for c in planned.choices]
    assert document["n_parameters"] == planned.n_parameters == 6 * 40 + 40 + 40 * 4 + 4
    text = str(planned)
    assert all(choice.name in text for choice in planned.choices)
    assert "decompose r=5" in text
    assert max(len(line) for line in text.splitlines() if "—" not in line) <= 130


def test_bad_arguments_are_named(model, data, few_ways):
    for given in ({"n_examples": 0}, {"batches": 1}, {"n_components": True}, {"kind": "dense"}, {"folder": "/no/such"}):
        with pytest.raises(npeff.ArgumentError, match=next(iter(given))):
            npeff.plan(model, data, **given)
    with pytest.raises(npeff.DataError, match="no batches"):
        npeff.plan(model, [])
    with pytest.raises(npeff.ArgumentError, match="n_examples"):
        npeff.plan(model, iter(data))
    with pytest.raises(TypeError, match="compress"):
        npeff.plan(model, data, compress=TopK(8))
    assert npeff.plan(model, iter(data), n_examples=21, kind="diagonal").n_examples == 21


def test_command_prints_the_table_and_writes_json(tmp_path, capsys):
    from npeff.cli import run

    source = tmp_path / "work.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n    return nn.Linear(5, 3).eval()\n"
        "def data():\n    return [(torch.randn(4, 5), torch.zeros(4).long()) for _ in range(2)]\n"
    )
    arguments = ["plan", f"{source}:model", f"{source}:data", "--n-examples", "40", "--n-components", "3"]
    assert run([*arguments, "--memory", "1GB", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert "backward passes per example: 2" in printed
    assert "within 1.0 GB of memory" in printed
    assert json.loads((tmp_path / "plan.json").read_text())["memory"] == 10**9


def test_peak_sees_what_is_held_for_a_while():
    with Peak() as peak:
        held = np.ones(64 << 20, np.uint8)
        for _ in range(100):  # until the watcher has looked
            if peak.peak - peak.before >= 48 << 20:
                break
            time.sleep(0.01)
        del held
    assert peak.peak - peak.before >= 48 << 20
    assert held_bytes() < peak.peak - (32 << 20)


def test_durations_have_fitting_units(planned):
    times = {0.123: "0.12 s", 45: "45 s", 130: "2.17 min", 8000: "2.22 h", 3e5: "3.47 days"}
    choices = [replace(planned.choices[0], seconds=seconds) for seconds in times]
    assert all(f"  {text}  " in str(replace(planned, choices=choices)) for text in times.values())
