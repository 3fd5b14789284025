"""Outputs as they are kept: whole, or of many classes the largest; and the whole way with more than 1,024 outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

import npeff
from npeff.components.published import write_published
from npeff.distributed import merge_shares, share_path
from npeff.errors import ArgumentError, DataError, ResumeError, StorageError
from npeff.fishers.fishers import FisherBlock
from npeff.fishers.logits import MOST_OUTPUTS, N_LARGEST, Logits, joined, largest

C = MOST_OUTPUTS + 76
DATA = 48


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, C)).eval()


def batches(size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(DATA, 6, generator=torch.Generator().manual_seed(1)) * 3
    return list(zip(x.split(size), (torch.arange(DATA) * 7 % C).split(size), strict=True))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches()])


@pytest.fixture(scope="module")
def kept() -> tuple[Logits, Logits]:
    """The same outputs, whole and reduced."""
    z = outputs(network())
    return Logits(z.numpy()), Logits.kept([a.numpy() for a in largest(z, True)], C)


@pytest.fixture(scope="module")
def fishers() -> npeff.Fishers:
    return npeff.compute_fishers(network(), batches(), compress=npeff.TopK(64), rank=2, progress=False)


# ---- what is kept ------------------------------------------------------------------------------------------


def test_predictions_from_the_largest_are_those_from_all(kept) -> None:
    whole, some = kept
    assert whole.shape == some.shape == (DATA, C) and some.values.shape == (DATA, N_LARGEST)
    assert some.nbytes < whole.nbytes / 10
    np.testing.assert_array_equal(some.predicted, whole.predicted)
    np.testing.assert_allclose(some.confidence, whole.confidence, rtol=1e-5)
    (ours, p), (theirs, q) = some.top(5), whole.top(5)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(p, q, rtol=1e-5)
    assert some.top(C)[0].shape == (DATA, N_LARGEST)


def test_log_probabilities_where_they_are_known(kept) -> None:
    whole, some = kept
    expected = log_softmax(np.asarray(whole, np.float64), axis=1)
    for j in (0, N_LARGEST - 1):
        classes = np.argsort(-np.asarray(whole), axis=1)[:, j]
        for logits in kept:
            np.testing.assert_allclose(logits.log_probability(classes), expected[np.arange(DATA), classes], rtol=1e-5)
    least = np.asarray(whole).argmin(1)
    assert np.isnan(some.log_probability(least)).all() and np.isfinite(whole.log_probability(least)).all()
    assert np.isnan(whole.log_probability(np.full(DATA, -1))).all()


def test_up_to_1024_outputs_and_other_outputs_than_classes_are_kept_whole() -> None:
    z = torch.randn(3, C)
    assert len(largest(z[:, :MOST_OUTPUTS], True)) == len(largest(z, False)) == 1 and len(largest(z, True)) == 3


def test_whole_logits_serve_as_an_array_and_others_say_what_to_do(kept) -> None:
    whole, some = kept
    np.testing.assert_array_equal(whole[3, 4:6], np.asarray(whole)[3, 4:6])
    assert np.asarray(whole, np.float64).dtype == np.float64
    for use in (np.asarray, lambda logits: logits[0]):
        with pytest.raises(ArgumentError, match=r"of 1,100 outputs the 32 largest .* logits\.top\(k\)"):
            use(some)


def test_subsets_and_joins(kept) -> None:
    for logits in kept:
        parts = [logits.take(slice(0, 10)), logits.take(np.arange(10, DATA))]
        assert Logits.from_arrays(joined([part.arrays() for part in parts])).same(logits)
        assert not parts[0].same(parts[1])
        assert Logits.from_arrays(logits.arrays()).same(logits)
    assert not kept[0].same(kept[1])


def test_other_outputs_beside_what_is_kept(kept) -> None:
    z = outputs(network())
    rounded = z * (1 + 1e-6)
    for logits in kept:
        torch.testing.assert_close(logits.numbers_of(z), logits.numbers)
        again = logits.restored(rounded)
        torch.testing.assert_close(again.float(), z, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(again.amax(1).float(), z.amax(1), rtol=0, atol=0)
        torch.testing.assert_close(logits.restored(z.double()), z.double(), rtol=0, atol=0)


def test_no_outputs_predict_nothing() -> None:
    none = Logits(np.zeros((4, 0), np.float32))
    assert (none.predicted == -1).all() and none.shape == (4, 0)


@pytest.mark.parametrize(
    "fields",
    [
        (np.zeros(3),),
        (np.zeros((3, 2)), np.zeros((3, 2), np.int32)),
        (np.zeros((3, 2)), np.zeros((3, 1), np.int32), np.zeros(3), 9),
        (np.zeros((3, 2)), np.zeros((3, 2), np.int32), np.zeros(2), 9),
        (np.zeros((3, 2)), None, None, 9),
    ],
)
def test_contradictions_are_refused(fields) -> None:
    with pytest.raises(ArgumentError, match="logits: expected"):
        Logits(*fields)


# ---- the whole way -----------------------------------------------------------------------------------------


def test_the_fishers_do_not_depend_on_what_is_kept_of_logits(fishers, monkeypatch) -> None:
    monkeypatch.setattr("npeff.fishers.logits.MOST_OUTPUTS", C)
    whole = npeff.compute_fishers(network(), batches(), compress=npeff.TopK(64), rank=2, progress=False)
    assert whole.logits.classes is None and fishers.logits.values.shape == (DATA, N_LARGEST)
    np.testing.assert_array_equal(whole.rows.values, fishers.rows.values)
    np.testing.assert_array_equal(whole.predictions, fishers.predictions)


def test_compute_save_load_decompose_report(fishers, tmp_path) -> None:
    path = tmp_path / "fishers.h5"
    on_disk = npeff.compute_fishers(network(), batches(), compress=npeff.TopK(64), rank=2, out=path, progress=False)
    for found in (on_disk, npeff.load(path, verify=True), npeff.load(fishers.save(tmp_path / "again.h5"))):
        assert found.logits.same(fishers.logits) and len(found[[3, 1]].logits) == 2
        assert found.filter(wrong=True).logits.n_outputs == C
    assert path.stat().st_size < 4 * DATA * C
    components = npeff.decompose(found, 3, progress=False, seed=0)
    again = npeff.load(components.save(tmp_path / "components.h5"), verify=True)
    assert again.logits.same(fishers.logits)
    np.testing.assert_array_equal(again.predictions, fishers.predictions)
    assert again.class_distribution(0).shape == (C,)
    page = npeff.report(again, batches(), out=tmp_path / "page.html")
    assert "class" in page.read_text()
    options = {"n_random": 0, "curve": 0, "n_resamples": 0, "top": 5, "progress": False}
    npeff.perturb(network(), batches(), again, 0, **options)
    with pytest.raises(DataError, match="other outputs than when the Fishers were computed"):
        npeff.perturb(network(), [(x * 1.5, y) for x, y in batches()], again, 0, **options)
    more = npeff.expand(again, fishers, 1, keep_coefficients=True, progress=False)
    assert more.n_components == 4


@pytest.mark.parametrize("compress", [npeff.Sketch(32), npeff.GramOnly()], ids=["sketch", "gram"])
def test_recovery_compares_the_logits_that_are_kept(compress) -> None:
    model = network()
    fishers = npeff.compute_fishers(model, batches(), compress=compress, rank=2, progress=False)
    exact = npeff.compute_fishers(model, batches(), compress=None, rank=2, progress=False)
    components = npeff.decompose(fishers, 2, progress=False, seed=0)
    found = components.recover(model, batches(12), progress=False)
    assert found.vector(0).shape == (exact.n_parameters,)
    if isinstance(compress, npeff.GramOnly):
        fitted = npeff.decompose(exact, 2, progress=False, seed=0)
        assert abs(float(found.vector(0) @ fitted.vector(0))) > 0.99
    other = [(x + 0.1, y) for x, y in batches()]
    with pytest.raises(DataError, match="have other logits"):
        components.recover(model, other, progress=False)


def test_work_is_resumed_with_the_same_model_alone(tmp_path, monkeypatch) -> None:
    from npeff.fishers.shards import FisherWriter

    monkeypatch.setitem(FisherWriter.__init__.__kwdefaults__, "shard_bytes", 1)
    out, options = tmp_path / "f.h5", {"compress": npeff.TopK(64), "rank": 2, "progress": False}

    def broken():
        yield from batches()[:3]
        raise KeyboardInterrupt

    class Data:
        def __iter__(self):
            self.calls = getattr(self, "calls", 0) + 1
            return broken() if self.calls > 1 else iter(batches())

    with pytest.raises(KeyboardInterrupt):
        npeff.compute_fishers(network(), Data(), out=out, **options)
    changed = lambda model, batch: model(batch[0]) * 1.01  # noqa: E731
    with pytest.raises(ResumeError, match="other logits"):
        npeff.compute_fishers(network(), batches(), out=out, forward=changed, **options)
    resumed = npeff.compute_fishers(network(), batches(), out=out, **options)
    whole = npeff.compute_fishers(network(), batches(), **options)
    assert resumed.logits.same(whole.logits)
    np.testing.assert_array_equal(resumed.rows.values, whole.rows.values)


def test_shares_of_the_data_join(fishers, tmp_path) -> None:
    out = tmp_path / "f.h5"
    for k in (0, 1):
        options = {"out": share_path(out, (k, 2)), "share": (k, 2), "compress": npeff.TopK(64), "rank": 2}
        npeff.compute_fishers(network(), batches(), progress=False, **options)
    merge_shares(out, 2)
    joined = npeff.load(out, verify=True)
    assert joined.logits.same(fishers.logits)
    np.testing.assert_array_equal(joined.rows.values, fishers.rows.values)


def test_published_layouts_need_all_logits(fishers, tmp_path) -> None:
    with pytest.raises(StorageError, match="hold all logits"):
        write_published(fishers, tmp_path / "p.h5")


# ---- places ------------------------------------------------------------------------------------------------


def test_places_go_with_the_examples(fishers, tmp_path) -> None:
    places = np.stack([np.arange(DATA) // 4, np.arange(DATA) % 4], 1)
    placed = replace(fishers, places=places)
    np.testing.assert_array_equal(placed[[5, 2]].places, places[[5, 2]])
    again = npeff.load(placed.save(tmp_path / "f.h5"), verify=True)
    np.testing.assert_array_equal(again.places, places)
    components = npeff.decompose(again, 2, progress=False, seed=0)
    np.testing.assert_array_equal(npeff.load(components.save(tmp_path / "c.h5")).places, places)
    assert fishers.places is None
    with pytest.raises(ArgumentError, match=r"places: expected \(48, 2\)"):
        replace(fishers, places=places[:, :1])
    with pytest.raises(ArgumentError, match="places"):
        replace(fishers, places=-places).save(tmp_path / "bad.h5")


def test_blocks_are_joined_in_the_order_of_the_data(fishers) -> None:
    placed = replace(fishers, places=np.stack([np.arange(DATA) // 4, np.arange(DATA) % 4], 1))
    parts = [placed[[4, 0, 6]], placed[[5, 1, 3, 2]]]
    blocks = [FisherBlock(p.rows, p.ranks, p.norms, p.logits, p.labels, p.ids, p.places) for p in parts]
    found, expected = FisherBlock.joined(blocks), placed[:7]
    np.testing.assert_array_equal(found.row_counts, expected.ranks)
    for name in ("norms", "labels", "ids", "places"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.logits.same(expected.logits)
    np.testing.assert_array_equal(found.rows.values, expected.rows.values)
