"""Which part of a batch belongs to which example: guessed, said by npeff.Batch, or refused with the way out."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from npeff.cli import run
from npeff.companions.influence import CrossLossInfluence
from npeff.reports.examples import read_examples
from oracles import dense_fishers, dense_jacobians
from small_network import fishers_of

F, C = 4, 3


class Graphs(nn.Module):
    """Examples are rows of x; the square matrix is everybody's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(F, 5), nn.Linear(5, C)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.outer(torch.tanh(adjacency @ self.inner(x)).mean(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.outer = nn.EmbeddingBag(10, F, mode="mean"), nn.Linear(F, C)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.outer(self.bag(tokens, offsets))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.outer = nn.LSTM(F, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.outer(self.recurrent(packed)[1][0][-1])


class Sequences(nn.Module):
    """Of a list of sequences, or a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(F, 5), nn.Linear(5, C)

    def forward(self, sequences: Any) -> Tensor:
        parts = sequences.unbind() if isinstance(sequences, Tensor) else sequences
        return self.outer(torch.stack([torch.tanh(self.inner(part)).mean(0) for part in parts]))


@dataclass
class GraphBatch:
    """As torch_geometric has it: nodes of all graphs together, and the graph of each."""

    x: Tensor
    graph: Tensor
    labels: Tensor


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(F, 5), nn.Linear(5, C)

    def forward(self, batch: GraphBatch) -> Tensor:
        hidden = torch.tanh(self.inner(batch.x))
        return self.outer(hidden.new_zeros(len(batch.labels), 5).index_add(0, batch.graph, hidden))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.outer = nn.LSTM(F, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.recurrent(x)[0][-1])


X = torch.randn(6, 6, F, generator=torch.Generator().manual_seed(1))
ADJACENCY = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(6) % C
TOKENS, OFFSETS = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(3)), torch.tensor([0, 3, 4, 9])
RAGGED = [torch.randn(n, F, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 2, 7)]
NODES = GraphBatch(X.reshape(-1, F)[:9], torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.arange(3))


def take_bags(content: Any, positions: list[int]) -> Any:
    (tokens, offsets), labels = content
    ends = [*offsets.tolist()[1:], len(tokens)]
    parts = [tokens[offsets[i] : ends[i]] for i in positions]
    starts = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)
    return (torch.cat(parts), starts), labels[positions]


def take_graphs(content: GraphBatch, positions: list[int]) -> GraphBatch:
    parts = [content.x[content.graph == i] for i in positions]
    graph = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
    return GraphBatch(torch.cat(parts), graph, content.labels[positions])


def on_first(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def on_all(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def bags() -> list[Any]:
    return [take_bags(((TOKENS, OFFSETS), Y[:4]), [i])[0] for i in range(4)]


def graphs() -> list[GraphBatch]:
    return [take_graphs(NODES, [i]) for i in range(3)]


def squares(n: int = 6) -> list[Any]:
    return [(X[i : i + 1], ADJACENCY) for i in range(n)]


def sized(x: Tensor) -> list[Any]:
    return [(x[i : i + 1], [length]) for i, length in enumerate((5, 2, 3, 4))]


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=layout)


def agrees(fishers: Any, model: nn.Module, examples: list[Any], call: Callable[[nn.Module, Any], Tensor]) -> None:
    names = tuple(parameter.name for parameter in fishers.parameters)
    expected = dense_fishers(*dense_jacobians(model, examples, names, call))
    assert len(fishers) == len(examples)
    for i, F in enumerate(expected):
        rows = fishers.dense(i).astype(np.float64)
        np.testing.assert_allclose(rows.T @ rows, F, atol=1e-5 * np.abs(F).max())


def apart(model: nn.Module, example: Any) -> Tensor:
    return model(*example)


@pytest.mark.parametrize(
    ("model", "batch", "forward", "examples", "call"),
    [
        (Graphs(), npeff.Batch(((X, ADJACENCY), Y), 6, lambda c, i: ((c[0][0][i], c[0][1]), c[1][i])), None, squares(),
         apart),
        (Bag(), npeff.Batch(((TOKENS, OFFSETS), Y[:4]), 4, take_bags), None, bags(), apart),
        (Packed(), ((X[:4, :5], [5, 2, 3, 4]), Y[:4]), None, sized(X[:4, :5]), apart),
        (Sequences(), npeff.Batch((RAGGED, Y[:4]), 4, lambda c, i: ([c[0][k] for k in i], c[1][i])), on_first,
         [[part] for part in RAGGED], on_all),
        (Sequences(), (nested(RAGGED, torch.jagged), Y[:4]), None, [[part] for part in RAGGED], on_all),
        (Sequences(), (nested(RAGGED, torch.strided), Y[:4]), None, [[part] for part in RAGGED], on_all),
        (Pooled(), npeff.Batch(NODES, 3, take_graphs), on_all, graphs(), None),
        (Pooled(), npeff.Batch(NODES, 3, take_graphs), None, graphs(), None),
        (TimeFirst(), npeff.Batch((X[:, :4], Y[:4]), take=lambda c, i: (c[0][:, i], c[1][i])), None,
         [X[:, i : i + 1] for i in range(4)], on_all),
    ],
    ids=["square", "offsets", "list of lengths", "ragged", "jagged", "nested", "dataclass", "dataclass alone", "time"],
)  # fmt: skip
def test_every_structure_has_a_way(model: Any, batch: Any, forward: Any, examples: Any, call: Any) -> None:
    if isinstance(model, Pooled):
        copies = [GraphBatch(e.x.double(), e.graph, e.labels) for e in examples]
        examples, call = list(range(3)), lambda m, i: m(copies[int(i)])
    for options in ({}, {"memory": 4_000}):
        agrees(fishers_of(model, [batch], forward=forward, **options), model, examples, call)


def test_graphs_may_come_one_at_a_time() -> None:
    fishers = fishers_of(Pooled(), [npeff.Batch(graph, 1) for graph in graphs()])
    whole = fishers_of(Pooled(), [npeff.Batch(NODES, 3, take_graphs)])
    for i in range(3):
        np.testing.assert_allclose(fishers.dense(i), whole.dense(i), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "batch", "forward", "named"),
    [
        (Graphs(), ((X, ADJACENCY), Y), None, "batch[0][1] (6, 6)"),
        (Bag(), ((TOKENS, OFFSETS), Y[:4]), None, "batch[0][1] (4,)"),
        (Sequences(), (RAGGED, Y[:4]), on_first, "batch[0][3] (7, 4)"),
        (Sequences(), RAGGED, on_all, "batch[0] (3, 4)"),
        (Pooled(), NODES, on_all, "batch.x (9, 4)"),
        (TimeFirst(), (X[:, :4], Y[:4]), None, "batch[0] (6, 4, 4)"),
        (Sequences(), ([part[:4] for part in X[:4]], Y[:4]), on_first, "batch[0][0] (4, 4)"),
        (Graphs(), {"x": X, "adjacency": ADJACENCY}, None, "batch['adjacency'] (6, 6)"),
    ],
    ids=["square", "offsets", "ragged", "ragged alone", "dataclass", "time", "equal lengths", "mapping"],
)
def test_a_wrong_guess_names_the_tensor_and_the_way_out(model: Any, batch: Any, forward: Any, named: str) -> None:
    with pytest.raises(npeff.NpeffError) as caught:
        fishers_of(model, [batch], forward=forward)
    assert named in str(caught.value)
    assert "npeff.Batch(content, n_examples, take)" in str(caught.value)


def test_a_second_item_that_is_no_labels_is_left_to_forward() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch)

    batch = npeff.Batch((X, ADJACENCY), 6, lambda c, i: (c[0][i], c[1]))
    fishers = fishers_of(Graphs(), [batch], forward=forward)
    agrees(fishers, Graphs(), squares(), apart)
    assert fishers.labels.tolist() == [-1] * 6
    mask = torch.ones(6, 6)
    masked = fishers_of(Graphs(), [(X, mask)], forward=lambda m, b: m(b[0] * b[1][:, :, None], ADJACENCY))
    agrees(masked, Graphs(), squares(), apart)


@pytest.mark.parametrize("memory", [300, 3_000, "1MB"])
def test_a_wrong_guess_is_seen_however_small_the_pieces(memory: int | str) -> None:
    with pytest.raises(npeff.ModelError, match="has other logits when it is alone"):
        fishers_of(Graphs(), [((X, ADJACENCY), Y)], memory=memory)


def test_a_matrix_that_was_shared_once_is_shared_always() -> None:
    data = [((X[:5], ADJACENCY), Y[:5]), ((X, ADJACENCY), Y)]
    agrees(fishers_of(Graphs(), data, memory=2_000), Graphs(), squares(5) + squares(), apart)


def test_mappings_and_objects_keep_their_class() -> None:
    class Encoding(UserDict[str, Any]):
        """Like that of tokenisers: more than its items."""

        def __init__(self, data: Any = None, encodings: Any = None) -> None:
            super().__init__(data or {})
            self.encodings = encodings

    @dataclass(frozen=True)
    class Inputs:
        x: Tensor
        texts: list[str]

    def encoded(model: nn.Module, batch: Any) -> Tensor:
        assert len(batch.encodings) == 2
        return model(batch["x"])

    def frozen(model: nn.Module, batch: Inputs) -> Tensor:
        assert len(batch.texts) == len(batch.x)
        return model(batch.x)

    model, x = nn.Linear(F, C), X[:, 0]
    one = fishers_of(model, [Encoding({"x": x}, encodings=[1, 2])], forward=encoded)
    two = fishers_of(model, [Inputs(x, list("abcdef"))], forward=frozen, memory=2_000)
    for i in range(6):
        np.testing.assert_allclose(one.dense(i), fishers_of(model, [x]).dense(i), atol=1e-6)
        np.testing.assert_allclose(two.dense(i), one.dense(i), atol=1e-6)


def test_work_on_objects_is_resumed_with_the_same_objects_alone(tmp_path: Path) -> None:
    def stops(batches: list[Any]) -> Any:
        yield batches[0]
        raise KeyboardInterrupt

    one, other = (
        npeff.Batch(GraphBatch(NODES.x + shift, NODES.graph, NODES.labels), 3, take_graphs) for shift in (0, 1)
    )
    with pytest.raises(KeyboardInterrupt):
        fishers_of(Pooled(), stops([one]), out=tmp_path / "f.h5")
    with pytest.raises(npeff.ResumeError, match="contents differ"):
        fishers_of(Pooled(), [other, one], out=tmp_path / "f.h5")
    assert len(fishers_of(Pooled(), [one, other], out=tmp_path / "f.h5")) == 6


def test_take_is_asked_for_positions_of_the_whole_batch() -> None:
    def take(_: Any, positions: list[int]) -> Any:
        return X[positions, 0], Y[positions]  # from elsewhere than the content it is given

    fishers = fishers_of(nn.Linear(F, C), [npeff.Batch((X[:, 0], Y), 6, take)], memory=300, max_examples=5)
    assert fishers.labels.tolist() == Y[:5].tolist()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: npeff.Batch(X, 0), "n_examples"),
        (lambda: npeff.Batch(X, 6, "rows"), "take: expected callable"),
        (lambda: npeff.Batch((X[:, 0], Y), 6, lambda c, i: c[7]), "take: failed on a batch of 6 examples"),
        (lambda: npeff.Batch((X[:, 0], Y), 6, lambda c, i: (c[0][i], c[1])), "take: expected 2 labels"),
    ],
)
def test_wrong_batches_are_refused(batch: Any, words: str) -> None:
    with pytest.raises(npeff.NpeffError, match=words):
        fishers_of(nn.Linear(F, C), [batch()])


# ---- every function that cuts batches ----------------------------------------------------------------------------


class Plain(nn.Module):
    """The same function of x alone, for data that needs no way out."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = Graphs()

    def forward(self, x: Tensor) -> Tensor:
        return self.graphs(x, ADJACENCY)


def take_rows(content: Any, positions: list[int]) -> Any:
    (x, adjacency), labels = content
    return (x[positions], adjacency), labels[positions]


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """(model, data, components) with batches of its own, and without."""
    xs = torch.randn(4, 6, 6, F, generator=torch.Generator().manual_seed(5)) * 2
    own = [npeff.Batch(((x, ADJACENCY), Y), 6, take_rows) for x in xs]
    plain = [(x, Y) for x in xs]
    found = []
    for model, data in ((Graphs(), own), (Plain(), plain)):
        fishers = fishers_of(model, data)
        found.append((model, data, npeff.decompose(fishers, 2, n_init=1, n_replacements=0, progress=False)))
    return found[0], found[1]


def test_own_batches_in_every_function(both: tuple[Any, Any]) -> None:
    effects, magnitudes, means, scores, changes, grams, plans = ([] for _ in range(7))
    for model, data, components in both:
        effects.append(npeff.perturb(model, data, components, 0, top=3, progress=False))
        npeff.perturb_all(model, data, components, top=3, progress=False)
        magnitudes.append(npeff.trace(model, data, components, 0, progress=False))
        means.append(npeff.mean_fisher(model, data, progress=False))
        influence = CrossLossInfluence(model, loss, damping=3.0, progress=False)
        scores.append(influence.scores(data[:2], data[2:3]).values)
        changes.append(npeff.mend(model, data, components, 0, repair=[0, 1, 2], progress=False).repaired)
        grams.append(np.asarray(fishers_of(model, data, compress=npeff.GramOnly()).rows.gram(0, 48)))
        plans.append(npeff.plan(model, data, kind="low_rank", n_components=2).n_examples)
    np.testing.assert_allclose(effects[0].kl, effects[1].kl, rtol=1e-2, atol=1e-5)
    for name, mean in means[0].items():
        np.testing.assert_allclose(mean, means[1][f"graphs.{name}"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-6)
    assert changes[0] == pytest.approx(changes[1])
    np.testing.assert_allclose(grams[0], grams[1], atol=1e-5)
    assert plans == [24, 24]


@pytest.mark.parametrize(
    "batches",
    [
        lambda xs: [npeff.Batch(((x, ADJACENCY), Y), 6, take_rows) for x in xs],
        lambda xs: [((x[:5], ADJACENCY), Y[:5]) for x in xs],
        lambda xs: [npeff.Batch((x[:, :5].transpose(0, 1), Y[:6]), 6, lambda c, i: (c[0][:, i], c[1][i])) for x in xs],
    ],
    ids=["square", "several inputs", "time first"],
)
def test_a_page_shows_the_examples_of_such_batches(batches: Any) -> None:
    xs = torch.randn(3, 6, 6, F, generator=torch.Generator().manual_seed(6))
    data = batches(xs)
    n = 5 if isinstance(data[0], tuple) else 6
    shown = dict(read_examples(data, [0, n + 1, 2 * n], {0: 0, n + 1: 1, 2 * n: 0}))
    for batch, at, example in ((0, 0, shown[0]), (1, 1, shown[n + 1]), (2, 0, shown[2 * n])):
        drawn = example.image if example.values is None else example.values
        np.testing.assert_allclose(drawn, xs[batch][at][: len(drawn)])


TARGET = """
import torch, npeff
from torch import nn

X = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))

def model():
    torch.manual_seed(0)
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
        def forward(self, x):
            return self.head(x[-1])
    return Last()

def take(content, positions):
    return content[0][:, positions], content[1][positions]

def data():
    return [npeff.Batch((X, torch.tensor([0, 1, 2, 3])), 4, take)]
"""


def test_the_command_line_takes_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TARGET)
    command = ["fishers", "mine.py:model", "mine.py:data", "--out", "f.h5", "--quiet"]
    assert run(command) == 1
    assert "likelihood='probabilities'" in capsys.readouterr().err
    assert run([*command, "--likelihood", "probabilities"]) == 0
    found = npeff.load("f.h5")
    assert len(found) == 4
    assert found.provenance["options"]["likelihood"] == "probabilities"
