"""Positions of sequences as examples: what batches say of them, how they are cut, and which errors they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import npeff
from language_cases import SmallLanguageModel, fishers_of_places, token_batches
from npeff.batches.batches import Batch, batch_digest
from npeff.batches.reading import examples_at, read_batches
from npeff.errors import ArgumentError, DataError
from npeff.models.forward import call_model

CPU = torch.device("cpu")


def read(data, places=True, any_layout=False):
    return list(read_batches(data, CPU, any_layout, places))


def one(labels, **more):
    ids = 100 + torch.arange(labels.numel()).reshape(labels.shape)
    return {"input_ids": ids, "labels": labels, **more}


LABELS = torch.tensor([[-100, 4, 5], [-100, -100, -100], [7, -1, -100]])


def test_places_are_the_labels_that_are_not_ignored():
    (batch,) = read([one(LABELS)])
    assert batch.places.tolist() == [[0, 1], [0, 2], [2, 0], [2, 1]]
    assert batch.labels.tolist() == [4, 5, 7, -1]
    assert (batch.n_examples, batch.n_sequences, batch.n_positions) == (4, 3, 3)
    assert torch.equal(batch.content["labels"], LABELS)


@pytest.mark.parametrize("form", ["tuple", "object", "Batch", "take", "numpy", "lists"])
@pytest.mark.parametrize("chosen", [[0], [1, 2], [3, 0], [2, 2], [1, 0, 3], [0, 1, 2, 3, 0]])
def test_taken_places_keep_their_order_and_their_labels(form, chosen):
    content = one(LABELS)
    if form == "tuple":
        content = (content["input_ids"], LABELS)
    elif form == "numpy":
        content["labels"] = LABELS.numpy()
    elif form == "lists":
        content["labels"] = LABELS.tolist()
    elif form == "object":
        content = type("Sequences", (), {})()
        content.input_ids, content.labels = one(LABELS)["input_ids"], LABELS
    elif form == "Batch":
        content = Batch(content, 3)
    elif form == "take":
        content = Batch(content, 3, lambda c, at: {key: value[at] for key, value in c.items()})
    (batch,) = read([content], any_layout=True)
    assert batch.n_examples == 4
    some = batch.take(torch.tensor(chosen))
    assert some.labels.tolist() == [batch.labels[i] for i in chosen]
    ids = some.inputs if form == "tuple" else some.content.input_ids if form == "object" else some.content["input_ids"]
    whole = one(LABELS)["input_ids"]
    assert ids[tuple(some.places.T)].tolist() == [int(whole[tuple(batch.places[i])]) for i in chosen]
    again = some.take(slice(len(chosen) - 1, None))
    assert again.labels.tolist() == [batch.labels[chosen[-1]]]
    assert again.n_sequences == 1


def test_a_batch_of_neighbouring_places_shares_their_sequence():
    (batch,) = read([one(LABELS)])
    assert batch.take(slice(0, 2)).n_sequences == 1
    assert batch.take(slice(1, 3)).n_sequences == 2
    assert batch.apart().n_sequences == 4
    assert batch.apart().labels.tolist() == batch.labels.tolist()


def test_a_take_that_pads_anew_is_understood():
    def take(content, at):
        longest = max(int(content["attention_mask"][i].sum()) for i in at)
        return {key: value[at, -longest:] for key, value in content.items()}

    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 3, 4], [5, 6, -100, 7]])
    (batch,) = read([Batch(one(labels, attention_mask=mask), 2, take)])
    some = batch.take(slice(0, 2))
    assert some.places.tolist() == [[0, 0], [0, 1]]
    assert some.labels.tolist() == [3, 4]
    assert some.take(slice(1, 2)).labels.tolist() == [4]
    with pytest.raises(DataError, match="expected labels of 1 sequences that are not -100 at the same places"):
        read([Batch(one(labels), 2, lambda content, at: {"labels": labels[[0]], "input_ids": labels[at]})])[0].take(
            slice(3, 4)
        )


def test_batches_of_equal_length_are_joined():
    first, second = read([one(LABELS), one(LABELS + 0)])
    joined = first.joined([second])
    assert first.joins(second)
    assert joined.labels.tolist() == [4, 5, 7, -1] * 2
    assert joined.places[4:].tolist() == [[3, 1], [3, 2], [5, 0], [5, 1]]
    assert (joined.n_sequences, joined.n_examples) == (6, 8)


def test_sequences_are_counted_over_the_data_and_batches_without_places_are_left_out():
    nothing = torch.full((2, 3), -100)
    first, second = read([one(LABELS), one(nothing), one(LABELS)])
    assert first.places_in_data.tolist() == first.places.tolist()
    assert second.take(torch.tensor([3, 1])).places_in_data.tolist() == [[7, 1], [5, 2]]
    with pytest.raises(DataError, match="no batch has a place: all labels are -100"):
        read([one(nothing), one(nothing)])
    assert [b.labels.tolist() for b in examples_at([one(nothing), one(LABELS)], [3, 1])] == [[-1], [5]]


@pytest.mark.parametrize(
    ("labels", "places", "expected"),
    [
        (LABELS, False, False),
        (LABELS, None, True),
        (torch.tensor([[0, 1, 1]]), None, False),  # answers to questions, or a mask
        (torch.tensor([[0, 1, 1]]), True, True),
        (torch.tensor([[3], [4]]), True, False),  # a label per example
        (LABELS.float(), True, False),
        (LABELS > 0, True, False),
    ],
)
def test_which_labels_make_places(labels, places, expected):
    (batch,) = read([one(labels)], places=places)
    assert (batch.places is not None) == expected


def test_a_mask_in_a_tuple_is_no_label_but_the_data_can_say_otherwise():
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert read([(ids, mask)], any_layout=True)[0].places is None
    assert read([(ids + 2, mask)])[0].places is not None
    assert read([Batch((ids, mask), places=True)], any_layout=True)[0].n_examples == 6
    assert read([Batch((ids, LABELS[:2]), places=False)])[0].places is None
    assert read([Batch({"x": ids[:, :1] + 1, "labels": ids[:, :1]}, places=True)])[0].n_examples == 2
    with pytest.raises(DataError, match=r"batch 0 is said to have places, so expected integers \(b, T\), got \(2,\)"):
        read([Batch((ids, ids[:, 0]), places=True)])


def test_labels_that_are_the_inputs_do_not_pass_without_a_word():
    ids = torch.randint(0, 9, (2, 5))
    with pytest.warns(UserWarning, match="they are the input tokens at all of its 10 places"):
        read([{"input_ids": ids, "labels": ids.clone()}])
    with pytest.warns(UserWarning, match="without any shift"):
        read([(ids, torch.where(ids > 2, ids, -100))])


def test_the_model_gives_logits_at_the_places():
    model, data = SmallLanguageModel(), token_batches()
    for batch in read(data):
        whole = model(**batch.inputs)
        assert torch.equal(call_model(model, None, batch), whole[batch.places[:, 0], batch.places[:, 1]])
        kept = Batch(batch.content, outputs=[7, 2])
        (few,) = read([kept])
        assert torch.equal(call_model(model, None, few), call_model(model, None, batch)[:, [7, 2]])
        assert batch_digest(few) != batch_digest(batch)
        assert torch.equal(few.take(slice(1, 2)).outputs, few.outputs)


def test_outputs_are_kept_without_places_too():
    x = torch.randn(4, 3)
    (batch,) = read([Batch((x, torch.tensor([0, 1, 1, 0])), outputs=[2, 0])])
    net = torch.nn.Linear(3, 5)
    assert torch.equal(call_model(net, None, batch), net(x)[:, [2, 0]])
    (batch,) = read([Batch((x,), outputs=[2, 5])])
    with pytest.raises(DataError, match="keeps output 5, but the model gives 5"):
        call_model(net, None, batch)
    for wrong in ([], [1, 1], [-1, 2], [0.5], [[1, 2]], "ab"):
        with pytest.raises(ArgumentError, match="outputs: expected"):
            Batch(x, outputs=wrong)


@pytest.mark.parametrize("others", [[4, 5], [5, 3], [3, 5, 6], None])
def test_batches_that_keep_other_outputs_are_refused(others):
    first, second = token_batches()
    for batch in (first, second):
        batch["labels"] = torch.where(batch["labels"] == -100, -100, -1)
    data = [Batch(first, outputs=[3, 5]), Batch(second, outputs=others)]
    words = "all" if others is None else str(others).replace("[", r"\[")
    with pytest.raises(DataError, match=rf"outputs: batch 1 keeps {words} and batch 0 keeps \[3, 5\]; expected the"):
        npeff.compute_fishers(SmallLanguageModel(), data, progress=False)


@pytest.mark.parametrize("kept", ["all", "last", "first"])
def test_a_model_may_ignore_logits_to_keep_or_keep_others(kept):
    given = []

    class Keeping(SmallLanguageModel):
        def forward(self, input_ids, attention_mask=None, logits_to_keep=0):
            given.append(logits_to_keep)
            n = 0 if kept == "all" else logits_to_keep
            logits = super().forward(input_ids, attention_mask)
            return logits[:, :n] if kept == "first" and n else logits[:, -n:]

    data = token_batches()
    for batch in data:
        batch["labels"][:, :2] = -100
    expected = npeff.compute_fishers(SmallLanguageModel(), data, progress=False)
    found = npeff.compute_fishers(Keeping(), data, progress=False)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
    assert given[:2] == [3, 4], "tried on one sequence"
    assert given[2:] == [0] * len(given[2:]) if kept == "first" else 0 not in given


def test_shapes_that_do_not_fit_are_refused_with_what_to_do():
    model = SmallLanguageModel()
    ids, labels = torch.ones(2, 5, dtype=torch.int64), torch.full((2, 5), 3)
    for data, forward, message in [
        ((ids,), None, r"got \(2, 5, 11\) from the model; for examples at positions, give integer labels of shape"),
        ((ids, labels[:, 0]), None, r"−100 where there is no example \(they have \(2,\)\)"),
        ((ids, labels), lambda m, b: m(b[0])[:, -1], r", 5, C\), as the labels have .*give one label per sequence"),
        ((ids, labels), lambda m, b: m(b[0])[:, 1:], "give a label for every position that has logits"),
    ]:
        with pytest.raises(DataError, match=message):
            npeff.compute_fishers(model, [data], forward=forward, progress=False)
    labels[1, 2] = 11
    with pytest.raises(DataError, match=r"example 7 \(sequence 1, position 2\) has label 11; expected 0 ≤ label < 11"):
        npeff.compute_fishers(model, [(ids, labels)], progress=False)


def test_a_label_in_the_padding_is_refused():
    (data, *_) = token_batches(counts=((5, 3),))
    data["labels"][1, 4] = 2
    with pytest.raises(DataError, match=r"batch 0 has a label at position 4 of sequence 1, which the attention mask"):
        npeff.compute_fishers(SmallLanguageModel(), [data], progress=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [False, True])
def test_fishers_of_places_agree_with_one_backward_pass_each(side, tied):
    model, data = SmallLanguageModel(tied), token_batches(side, every=2)
    expected, logits = fishers_of_places(model, data)
    fishers = npeff.compute_fishers(model, data, progress=False)
    diagonal = npeff.compute_fishers(model, data, kind="diagonal", progress=False)
    assert len(fishers) == len(expected) == 12
    np.testing.assert_allclose(fishers.logits, logits, rtol=1e-5, atol=1e-5)
    assert fishers.labels.tolist() == [int(x) for b in data for x in b["labels"][b["labels"] != -100]]
    for i, dense in enumerate(expected):
        atol = 2e-6 * np.abs(dense).max() + 1e-7
        rows = fishers.dense(i)
        np.testing.assert_allclose(rows.T @ rows, dense, atol=atol)
        np.testing.assert_allclose(diagonal.dense(i).ravel(), dense.diagonal(), atol=atol)


def test_the_pipeline_knows_places_as_examples(tmp_path):
    model, data = SmallLanguageModel(), token_batches(counts=((5, 3, 4), (6, 6), (5, 5)))
    fishers = npeff.compute_fishers(model, data, progress=False, out=tmp_path / "f")
    components = npeff.decompose(fishers, n_components=3, seed=0, progress=False)
    assert components.encode(fishers[:5]).coefficients.shape == (5, 3)
    sketched = npeff.compute_fishers(model, data, compress=npeff.Sketch(32), progress=False)
    of_sketches = npeff.decompose(sketched, n_components=2, seed=0, progress=False)
    assert of_sketches.recover(model, data, progress=False).vector(0).shape == (fishers.n_parameters,)
    effect = npeff.perturb(model, data, components, 0, n_random=1, top=4, n_resamples=9, progress=False)
    assert len(effect.kl) == len(fishers)
    page = npeff.report(components, data, tmp_path / "report", progress=False)
    assert page
    first = npeff.compute_fishers(model, data, max_examples=4, progress=False)
    assert first.labels.tolist() == fishers.labels[:4].tolist()


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 2)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


@pytest.mark.parametrize("form", ["tuple", "mapping", "Batch"])
def test_tags_of_zeros_and_ones_are_places_for_all_that_read_them_again(tmp_path, form):
    """The Fishers know that their examples are places; who reads the data for components must count the same."""
    torch.manual_seed(0)
    ids, labels = torch.randint(7, (6, 4)), torch.randint(2, (6, 4))
    forms = {"tuple": (ids, labels), "mapping": {"input_ids": ids, "labels": labels}, "Batch": Batch((ids, labels))}
    data, model = [forms[form]], Tagger().eval()
    fishers = npeff.compute_fishers(model, data, progress=False)
    assert len(fishers) == 24
    (found,) = examples_at(data, [13], places=True)
    assert found.labels.tolist() == [int(labels[3, 1])] and found.places.tolist() == [[0, 1]]
    components = npeff.decompose(fishers, 2, n_init=1, n_replacements=0, progress=False)
    assert npeff.report(components, data, out=tmp_path / "report").is_file()
