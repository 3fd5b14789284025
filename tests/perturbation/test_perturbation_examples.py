"""Examples by their positions: cut, joined, held, read again."""

import numpy as np
import pytest
import torch
from torch import nn

from npeff.errors import DataError
from npeff.models.forward import call_model
from npeff.perturbation.examples import SelectedExamples

CPU = torch.device("cpu")


def inputs(n=23):
    return torch.arange(n * 3, dtype=torch.float32).reshape(n, 3)


def plain(model=None, forward=None):
    model = model or nn.Flatten()
    return lambda batch: call_model(model, forward, batch).detach()


def outputs(examples, call):
    found = torch.full((len(examples), 3), torch.nan)
    for one in examples:
        found[torch.from_numpy(one.indices)] = call(one.batch)[one.rows]
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 23])
@pytest.mark.parametrize("ids", [[0], [22], [3, 4, 9, 20], list(range(23))])
@pytest.mark.parametrize("held", [1 << 30, 0])
def test_outputs_are_those_of_the_positions(size, ids, held, monkeypatch):
    monkeypatch.setattr("npeff.perturbation.examples.HELD_BYTES", held)
    x, call = inputs(), plain()
    data = [x[i : i + size] for i in range(0, 23, size)]
    examples = SelectedExamples(data, np.array(ids), CPU, call)
    for _ in range(2):
        torch.testing.assert_close(outputs(examples, call), x[ids])
    slices = examples.subset(np.array([len(ids) - 1]))
    assert sum(len(one.indices) for one in slices) == 1
    torch.testing.assert_close(call(slices[0].batch)[slices[0].rows], x[ids[-1:]])


def test_small_cuts_are_joined():
    x, call = inputs(), plain()
    examples = SelectedExamples([x[i : i + 4] for i in range(0, 23, 4)], np.array([0, 5, 10, 15, 20]), CPU, call)
    assert [one.batch.n_examples for one in examples] == [4, 1]
    torch.testing.assert_close(outputs(examples, call), x[[0, 5, 10, 15, 20]])


def test_padded_batches_of_several_lengths_are_joined_by_length():
    def sized(model, batch):
        mask = batch["mask"].float()
        return torch.stack([batch["ids"].float().mul(mask).sum(1), mask.sum(1), mask[:, 0]], 1)

    generator = torch.Generator().manual_seed(0)
    data = [
        {"ids": torch.randint(9, (4, t), generator=generator), "mask": torch.ones(4, t), "labels": torch.arange(4)}
        for t in (3, 5, 5, 3, 3)
    ]
    call = plain(forward=sized)
    expected = torch.cat([sized(None, batch) for batch in data])[[1, 6, 9, 14, 18]]
    examples = SelectedExamples(data, np.array([1, 6, 9, 14, 18]), CPU, call, any_layout=True)
    assert [one.batch.n_examples for one in examples] == [1, 2, 2]
    assert all(one.batch.labels is not None for one in examples)
    torch.testing.assert_close(outputs(examples, call), expected)


def test_batches_that_cannot_be_cut_stay_whole():
    def lengths(model, batch):
        texts = batch["text"]
        assert len(texts) == len(batch["x"]), "a batch must not lose what belongs to its examples"
        return torch.tensor([[len(text), 0.0, 0.0] for text in texts])

    words = ["a", "bbb", "cc", "dddd", "e", "ff"]
    data = [{"text": words[i : i + 3], "x": torch.zeros(3, 1)} for i in (0, 3)]
    call = plain(forward=lengths)
    examples = SelectedExamples(data, np.array([1, 3]), CPU, call, any_layout=True)
    assert outputs(examples, call)[:, 0].tolist() == [3, 4]
    assert all(one.batch.n_examples == 3 for one in examples)


def test_models_that_mix_examples_are_not_given_parts_of_batches():
    call = plain(forward=lambda model, batch: batch - batch.mean(0))
    x = inputs(8)
    examples = SelectedExamples([x[:4], x[4:]], np.array([1, 6]), CPU, call, any_layout=True)
    expected = torch.stack([(x[:4] - x[:4].mean(0))[1], (x[4:] - x[4:].mean(0))[2]])
    torch.testing.assert_close(outputs(examples, call), expected)


def test_data_that_changes_or_ends_is_noticed(monkeypatch):
    x, call = inputs(), plain()
    monkeypatch.setattr("npeff.perturbation.examples.HELD_BYTES", 10)
    with pytest.raises(DataError, match="position 22, but it ends after 8"):
        SelectedExamples([x[:8]], np.array([1, 22]), CPU, call)
    with pytest.raises(DataError, match="can be iterated only once"):
        SelectedExamples(iter([x[:8], x[8:]]), np.arange(23), CPU, call)

    class Shuffled:
        turn = 0

        def __iter__(self):
            self.turn += 1
            return iter([x[torch.randperm(23, generator=torch.Generator().manual_seed(self.turn))]])

    examples = SelectedExamples(Shuffled(), np.array([2, 3]), CPU, call)
    with pytest.raises(DataError, match="turn shuffling"):
        outputs(examples, call)
    monkeypatch.undo()
    assert len(outputs(SelectedExamples(Shuffled(), np.array([2, 3]), CPU, call), call)) == 2
