"""Data whose order changes, or whose examples come several times, and inputs that a model changes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import npeff
from npeff.errors import ArgumentError, DataError
from small_network import fishers_of

N = 20
QUICK: dict[str, Any] = {"n_init": 1, "n_replacements": 0, "max_iterations": 50, "progress": False}
SET = TensorDataset(torch.randn(N, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Wrapped:
    """As accelerate and others wrap a DataLoader."""

    def __init__(self, loader: Any, name: str = "base_dataloader") -> None:
        setattr(self, name, loader)
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Shuffles:
    """Nothing of it shows that it does."""

    def __iter__(self) -> Iterator[Any]:
        for places in torch.randperm(N).split(4):
            yield SET[places]


class Augments:
    def __iter__(self) -> Iterator[Any]:
        for places in torch.arange(N).split(4):
            x, y = SET[places]
            yield x + torch.randn_like(x), y


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(SET, 4, shuffle=True),
        DataLoader(SET, 4, shuffle=True, generator=torch.Generator().manual_seed(0)),
        DataLoader(SET, 4, sampler=WeightedRandomSampler([1.0] * N, N)),
        DataLoader(SET, 4, sampler=SubsetRandomSampler(range(N))),
        DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 4, False)),
        Wrapped(DataLoader(SET, 4, shuffle=True)),
        Wrapped(DataLoader(SET, 4, shuffle=True), "data"),
    ],
    ids=["shuffle", "seeded", "weighted", "subset", "batch sampler", "wrapped", "wrapped as data"],
)
@pytest.mark.parametrize("compress", [None, npeff.GramOnly()])
def test_samplers_that_shuffle_are_refused(data: Any, compress: Any) -> None:
    with pytest.raises(ArgumentError, match=r"data: its .*Sampler gives every pass .* shuffle=False"):
        fishers_of(linear(), data, compress=compress)


@pytest.mark.parametrize("data", [Shuffles(), Augments()])
@pytest.mark.parametrize("compress", [None, npeff.GramOnly()])
def test_other_shuffling_is_seen_at_the_first_batch(data: Any, compress: Any) -> None:
    with pytest.raises(DataError, match="its first batch is another one each time"):
        fishers_of(linear(), data, compress=compress)
    assert len(fishers_of(linear(), iter(data))) == N  # one pass is one order


class Counts:
    """The same tensors in every pass, beside them a value that no pass repeats."""

    def __init__(self, value: Callable[[int], Any]) -> None:
        self.value, self.passes = value, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield {"x": SET[:4][0], "beside": self.value(self.passes)}


@pytest.mark.parametrize(
    "value",
    [
        np.int64,
        complex,
        slice,
        lambda k: {k, "a"},
        lambda k: [k, 23 - k] if k > 1 else [1, 22],
        lambda k: [1, 23] if k % 2 else [12, 3],
        lambda k: np.array([f"202{k}-01-01"], "M8[D]"),
        lambda k: np.array([k, None]),
        lambda k: np.array([torch.full((2000,), 1 + 1e-6 * k), None], object),
        lambda k: Image.fromarray(np.full((2, 2), k, np.uint8)),
        lambda k: torch.tensor([1j * k]).conj(),
    ],
)
def test_a_change_of_any_value_is_seen(value: Callable[[int], Any]) -> None:
    with pytest.raises(DataError, match="its first batch is another one each time"):
        fishers_of(linear(), Counts(value), forward=lambda model, batch: model(batch["x"]))


def test_sets_have_no_order_that_stays() -> None:
    with pytest.raises(ArgumentError, match="data: expected an iterable of batches, got set"):
        fishers_of(linear(), {SET[:4][0], SET[4:8][0]})


def test_a_random_order_that_stays_is_welcome() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    for data in (
        DataLoader(Subset(SET, order), 4),
        DataLoader(SET, 4, sampler=order),
        DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 4, False), num_workers=1),
        list(DataLoader(SET, 4, shuffle=True)),
    ):
        assert len(fishers_of(linear(), data)) == N


def test_inner_products_need_the_same_order_in_every_pass() -> None:
    class SameFirst:
        """The second pass differs, and not at its first batch."""

        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            yield SET[:4]
            yield SET[4:8] if self.passes < 3 else SET[8:12]

    wide = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    with pytest.raises(DataError, match="batch 1 is another one in a second pass"):
        fishers_of(wide, SameFirst(), compress=npeff.GramOnly(memory=7_000))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, shared: bool) -> None:
        self.shared = shared

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if self.shared and info is not None else (0, 1)
        yield from (SET[i] for i in range(first, N, step))


def take_rows(content: Any, positions: list[int]) -> Any:
    return content[0][positions], content[1][positions]


def batch_of(examples: list[Any]) -> npeff.Batch:
    x, y = zip(*examples, strict=True)
    return npeff.Batch((torch.stack(x), torch.stack(y)), len(x), take_rows)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_stay_give_the_same_as_none(persistent: bool) -> None:
    """Of batches of their own, too, which come through a pipe."""
    workers = DataLoader(SET, 4, collate_fn=batch_of, num_workers=2, persistent_workers=persistent)
    found, expected = fishers_of(linear(), workers), fishers_of(linear(), DataLoader(SET, 4))
    assert found.labels.tolist() == (torch.arange(N) % 3).tolist()
    for i in range(N):
        np.testing.assert_array_equal(found.dense(i), expected.dense(i))


@pytest.mark.parametrize("size", [4, 20])
def test_workers_that_repeat_a_stream_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=r"every one of the 2 workers .*get_worker_info"):
        fishers_of(linear(), Wrapped(DataLoader(Stream(False), size, num_workers=2), "data"))
    assert len(fishers_of(linear(), DataLoader(Stream(True), size, num_workers=2))) == N
    assert len(fishers_of(linear(), DataLoader(Stream(False), size, num_workers=1))) == N


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return self.head(x)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_inputs_changed_in_place_stay_as_they_were(kind: str, as_numpy: bool) -> None:
    model = Doubles()
    x = SET[:5][0].clone()
    before, given = x.clone(), x.numpy() if as_numpy else x
    forward = None if not as_numpy else lambda m, batch: m(batch)
    found = fishers_of(model, [given], kind=kind, forward=forward)
    expected = fishers_of(model.head, [2 * before], kind=kind)
    for i in range(5):
        np.testing.assert_allclose(found.dense(i), expected.dense(i), atol=1e-6)
    assert torch.equal(x, before)
    components = npeff.decompose(found, 2, **QUICK)
    effect = npeff.perturb(model, [given], components, 0, top=2, forward=forward, progress=False)
    plain = npeff.decompose(expected, 2, **QUICK)
    np.testing.assert_allclose(components.coefficients, plain.coefficients, atol=1e-4)
    assert np.isfinite(effect.kl).all()
    assert torch.equal(x, before)


def test_whatever_finds_examples_by_position_refuses_shuffling() -> None:
    data, shuffled = list(DataLoader(SET, 4)), DataLoader(SET, 4, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    components = npeff.decompose(fishers_of(model, data), 2, **QUICK)
    sketched = npeff.decompose(fishers_of(model, data, compress=npeff.Sketch(32)), 2, **QUICK)
    for call in (
        lambda: npeff.perturb(model, shuffled, components, 0, progress=False),
        lambda: npeff.perturb_all(model, shuffled, components, progress=False),
        lambda: npeff.trace(model, shuffled, components, 0, progress=False),
        lambda: npeff.mend(model, shuffled, components, 0, progress=False),
        lambda: sketched.recover(model, shuffled, progress=False),
    ):
        with pytest.raises(ArgumentError, match=r"RandomSampler gives every pass .* shuffle=False"):
            call()
    assert npeff.mean_fisher(model, shuffled, progress=False)  # a mean has no order
