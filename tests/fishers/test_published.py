"""The published layouts: read as described (files made by plain h5py); what is written reads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.components.loading import describe, load
from npeff.components.published import read_published, write_published
from npeff.errors import ArgumentError, ForeignFileError, StorageError, TruncatedFileError
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows
from npeff.models.parameters import Parameters
from npeff.storage.container import LAYOUTS
from stored_samples import (
    COLUMNS,
    VECTORS,
    M,
    W,
    assert_same,
    dense_rows,
    equal_entries,
    fishers_of,
    numbers,
    to_sparse,
    write_by_hand,
)

KEPT = Path(__file__).parents[1] / "formats" / "published"

# layout:variant → the ranks of its sample
FISHER_LAYOUTS = {
    "low_rank_fishers": (2, 2, 2, 2),
    "low_rank_fishers:chunked": (2, 2, 2, 2),
    "low_rank_fishers:first_generation": (3, 3, 3, 3),
    "low_rank_fishers_variable": (2, 1, 3, 1),
    "diagonal_fishers": (1, 1, 1),
    "diagonal_fishers:predicted": (1, 1, 1),
    "diagonal_fishers:chunked": (1, 1, 1),
}


def kind_of(layout):
    return "diagonal" if layout.startswith("diagonal") else "low_rank"


@pytest.mark.parametrize("layout", FISHER_LAYOUTS)
def test_reading_fishers(tmp_path, layout):
    expected = equal_entries(FISHER_LAYOUTS[layout], kind_of(layout))
    path = tmp_path / "p.h5"
    write_by_hand(path, layout, expected)
    before = path.read_bytes(), path.stat().st_mtime_ns
    found = load(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert_same(found, expected, names=False)
    assert found.parameters == Parameters.of([("parameters", (M,))])
    assert found.provenance["layout"] == layout.partition(":")[0]
    assert describe(path)["content"] == layout.partition(":")[0]
    about = describe(path)
    assert about["n_examples"] == len(expected) and about["n_parameters"] == M and about["kind"] == kind_of(layout)


@pytest.mark.parametrize("layout", [name for name in FISHER_LAYOUTS if "chunked" not in name])
def test_kept_fishers(layout):
    found = load(KEPT / f"{layout.replace(':', '.')}.h5")
    assert_same(found, equal_entries(FISHER_LAYOUTS[layout], kind_of(layout)), names=False)


@pytest.mark.parametrize("layout", ["low_rank_fishers", "low_rank_fishers_variable", "diagonal_fishers"])
def test_writing_gives_what_the_description_says(tmp_path, layout):
    """Our file and the one made by hand hold the same datasets and attributes, to the bit."""
    fishers = equal_entries(FISHER_LAYOUTS[layout], kind_of(layout))
    if layout.endswith("variable"):
        fishers = replace(fishers, provenance={"options": {"min_prob": 0.25}})
    write_by_hand(tmp_path / "hand.h5", layout, fishers)
    write_published(fishers, tmp_path / "ours.h5")
    with h5py.File(tmp_path / "hand.h5") as hand, h5py.File(tmp_path / "ours.h5") as ours:

        def compare(name, item):
            if isinstance(item, h5py.Dataset):
                np.testing.assert_array_equal(item[()], ours[name][()], err_msg=name, strict=True)
            assert {k: float(v) for k, v in item.attrs.items()} == {k: float(v) for k, v in ours[name].attrs.items()}

        hand.visititems(compare)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_round_trip(tmp_path, kind, ranks, sparse):
    """Examples with different numbers of entries, dense rows, an empty row: all come back, no padding."""
    fishers = fishers_of(kind, sparse=sparse, ranks=ranks)
    path = write_published(fishers, tmp_path / "p.h5")
    found = load(path)
    expected = replace(fishers, rows=to_sparse(fishers.rows.dense(0, fishers.rows.n_rows)), ids=np.arange(len(ranks)))
    assert_same(found, expected, names=False)
    for i in range(len(ranks)):
        np.testing.assert_array_equal(found.dense(i), fishers.dense(i))
    with h5py.File(path) as f:  # as published: ascending within a row, every example full
        values = f["data/fisher/values" if kind == "diagonal" else "data/values"]
        if kind == "low_rank" and len(set(ranks)) == 1:
            assert (f["data/col_offsets"][:, -1] == values.shape[1]).all()
        if kind == "low_rank" and len(set(ranks)) > 1:
            assert f["data/col_sizes"][()].sum() == values.size
    assert write_published(found, path) == path  # the same layout may be replaced
    assert_same(load(path), expected, names=False)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_fishers_round_trip(tmp_path_factory, data):
    n, m = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 7))
    rank = data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(["low_rank", "diagonal"]))
    rank = 1 if kind == "diagonal" else rank
    entry = st.one_of(st.just(0.0), st.floats(0.125, 4, width=32))
    flat = data.draw(st.lists(entry, min_size=n * rank * m, max_size=n * rank * m))
    dense = np.array(flat, np.float32).reshape(n * rank, m)
    sparse = to_sparse(dense)
    ids = np.arange(n)
    fishers = Fishers(
        kind,
        data.draw(st.sampled_from([sparse, DenseRows(dense)])),
        np.arange(n + 1) * rank,
        np.ones(n, np.float32),
        np.ones((n, 2), np.float32),
        ids % 2,
        ids,
        Parameters.of([("parameters", (m,))]),
    )
    path = write_published(fishers, tmp_path_factory.mktemp("any") / "p.h5")
    if n or kind == "diagonal":
        assert_same(load(path), replace(fishers, rows=sparse), names=False)


def test_unsorted_files_are_sorted(tmp_path):
    path = tmp_path / "p.h5"
    expected = equal_entries((1, 1, 1), "diagonal")
    write_by_hand(path, "diagonal_fishers", expected)
    with h5py.File(path, "r+") as f:
        for name in ("data/fisher/values", "data/fisher/indices"):
            f[name][...] = f[name][()][:, ::-1]
    assert_same(load(path), expected, names=False)


def test_one_layout_can_be_forced_where_it_fits(tmp_path):
    fishers = equal_entries((2, 2, 2))
    path = write_published(fishers, tmp_path / "v.h5", variable=True)
    assert describe(path)["content"] == "low_rank_fishers_variable"
    assert_same(load(path), fishers, names=False)
    with pytest.raises(StorageError, match="fixed-rank layout needs one rank for all, these have 1 to 3"):
        write_published(equal_entries((1, 3, 2)), tmp_path / "f.h5", variable=False)


def test_what_the_layouts_cannot_hold(tmp_path):
    path = tmp_path / "p.h5"
    full = fishers_of(ranks=(1, 3), sparse=False)
    full.rows.values[:] = 1
    with pytest.raises(
        StorageError,
        match=r"here 51, but example 0 has 1 rows of 17 parameters; .*compress=TopK\(k\), k ≤ 17",
    ):
        write_published(full, path)
    wide = replace(equal_entries((1, 1)), parameters=Parameters.of([("w", (2**31,))]))
    with pytest.raises(StorageError, match="int32"):
        write_published(wide, path)
    with pytest.raises(ArgumentError, match="item: expected Fishers or Components, got list"):
        write_published([], path)
    assert not path.exists()
    fishers_of().save(path)
    with pytest.raises(StorageError, match="does not hold a published low_rank_fishers file"):
        write_published(equal_entries((2, 2)), path)


def damage(path, change, match, error=StorageError):
    with h5py.File(path, "r+") as f:
        change(f)
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        load(path)
    assert path.read_bytes() == before


def delete(name):
    def change(f):
        del f[name]

    return change


def put(name, value, where=...):
    def change(f):
        f[name][where] = value

    return change


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("low_rank_fishers", put("data/col_offsets", 5), "col_offsets are neither"),
        ("low_rank_fishers", put("data/row_indices", 99), "outside 0 … 16"),
        ("low_rank_fishers", put("data/row_indices", 1), "two entries for one parameter"),
        ("low_rank_fishers", delete("data/pef_frobenius_norms"), "'data/pef_frobenius_norms' is missing"),
        ("low_rank_fishers", delete("data/logits"), "data/logits or data/predicted_logits is missing"),
        ("low_rank_fishers", lambda f: f["data"].attrs.clear(), "attribute 'data@n_parameters' is missing"),
        ("low_rank_fishers_variable", put("data/ranks", 9), "'data/ranks' is damaged: expected numbers ≤ 7, n_rows"),
        ("low_rank_fishers_variable", put("data/col_sizes", 9, 0), "has more than its 6 entries"),
        ("diagonal_fishers", put("data/fisher/indices", -1), "outside 0 … 16"),
    ],
)  # fmt: skip
def test_contradictions_are_named(tmp_path, layout, change, match):
    path = tmp_path / "p.h5"
    write_by_hand(path, layout, equal_entries(FISHER_LAYOUTS[layout], kind_of(layout)))
    damage(path, change, match)


def test_wrong_lengths_are_named(tmp_path):
    path = tmp_path / "p.h5"
    write_by_hand(path, "diagonal_fishers", equal_entries((1, 1, 1), "diagonal"))

    def shorten(f):
        del f["data/labels"]
        f["data/labels"] = [1]

    damage(
        path, shorten, r"'data/labels' is damaged: expected the shape \(n_examples\) with n_examples = 3, got \(1,\)"
    )


def test_labels_may_be_missing(tmp_path):
    path = tmp_path / "p.h5"
    write_by_hand(path, "diagonal_fishers", equal_entries((1, 1, 1), "diagonal"))
    with h5py.File(path, "r+") as f:
        del f["data/labels"]
    assert load(path).labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("layout", ["low_rank_fishers", "diagonal_fishers:chunked"])
def test_cut_files(tmp_path, layout):
    path = tmp_path / "p.h5"
    write_by_hand(path, layout, equal_entries(FISHER_LAYOUTS[layout], kind_of(layout)))
    raw = path.read_bytes()
    for length in (10, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(TruncatedFileError):
            load(path)


def test_other_files_are_foreign(tmp_path):
    path = fishers_of().save(tmp_path / "ours.h5")
    with pytest.raises(ForeignFileError, match="not in a published layout"):
        read_published(path)


# --- decompositions -------------------------------------------------------------------------------


DECOMPOSITIONS = [
    "low_rank_decomposition",
    "diagonal_decomposition",
    "diagonal_decomposition:array",
    "diagonal_decomposition:sparse",
]


def check_decomposition(found, kind):
    norms = np.array([5.0, 2.0])
    assert found.kind == kind
    np.testing.assert_allclose(found.coefficients, W * (norms**2 if kind == "low_rank" else norms), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.vectors), VECTORS / norms[:, None], rtol=1e-6)
    np.testing.assert_array_equal(found.columns, COLUMNS)
    assert found.parameters.n_parameters == M
    assert found.coefficients.dtype == found.vectors.dtype == np.float32


@pytest.mark.parametrize("layout", DECOMPOSITIONS)
def test_reading_decompositions(tmp_path, layout):
    path = tmp_path / "d.h5"
    write_by_hand(path, layout)
    found = load(path)
    check_decomposition(found, kind_of(layout))
    check_decomposition(load(KEPT / f"{layout.replace(':', '.')}.h5"), kind_of(layout))
    assert (found.labels == -1).all() and np.isnan(found.norms).all() and found.logits.shape == (5, 0)
    if kind_of(layout) == "low_rank":
        assert found.provenance["published_losses"] == {
            "G_only": [9.0],
            "joint": [4.0, 2.0],
            "log_loss_frequency": 10,
        }
        # What the published form means: sum_j W_ij g_j g_jᵀ is unchanged by the normalisation.
        before = np.einsum("ij,ja,jb->iab", W, VECTORS, VECTORS)
        after = np.einsum("ij,ja,jb->iab", found.coefficients, found.vectors, found.vectors)
        np.testing.assert_allclose(after, before, rtol=1e-5)
    else:
        np.testing.assert_allclose(found.coefficients @ found.vectors, W @ VECTORS, rtol=1e-5)
    about = describe(path)
    assert about["n_parameters"] == M and about["n_examples"] == 5


@pytest.mark.parametrize("sparse", [True, False, None])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_decompositions_round_trip(tmp_path, kind, sparse):
    write_by_hand(tmp_path / "d.h5", f"{kind}_decomposition")
    found = load(tmp_path / "d.h5")
    path = write_published(found, tmp_path / "e.h5", sparse=sparse)
    again = load(path)
    for name in ("coefficients", "vectors"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), rtol=1e-6)
    np.testing.assert_array_equal(again.columns, found.columns)
    with h5py.File(path) as f:
        if kind == "diagonal":
            assert isinstance(f["data/H"], h5py.Group) == (sparse is not False)
            assert f["data/reduce_kept_indices"].attrs["full_dense_size"] == M
        else:
            assert f["data"].attrs["n_classes"] == 3 and f["losses/joint"].shape == (0,)
    assert describe(path)["content"] in LAYOUTS


def test_all_columns_are_none(tmp_path):
    path = tmp_path / "d.h5"
    with h5py.File(path, "w") as f:
        f["data/W"], f["data/H"] = W, np.abs(dense_rows(2, keep=1)) + 1
        f["data/reduce_kept_indices"] = np.arange(M)
        f["data/reduce_kept_indices"].attrs["full_dense_size"] = M
    found = load(path)
    assert found.columns is None
    assert load(write_published(found, tmp_path / "e.h5")).columns is None


def test_fishers_supply_what_decompositions_lack(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "low_rank_decomposition")
    fishers = fishers_of(ranks=(1, 1, 1, 1, 1))
    found = read_published(path, fishers=fishers)
    assert found.parameters == fishers.parameters
    np.testing.assert_array_equal(found.labels, fishers.labels)
    np.testing.assert_array_equal(found.norms, fishers.norms)
    with pytest.raises(ArgumentError, match="fishers: expected the 5 examples over 17 parameters"):
        read_published(path, fishers=fishers_of(ranks=(1, 1)))


def test_a_vector_of_zeros_stays(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "low_rank_decomposition")
    with h5py.File(path, "r+") as f:
        f["data/G"][1] = 0
    found = load(path)
    assert (np.asarray(found.vectors)[1] == 0).all() and (found.coefficients[:, 1] == 0).all()


def test_columns_of_two_axes(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "low_rank_decomposition")
    with h5py.File(path, "r+") as f:
        del f["data/new_to_old_col_indices"]
        f["data/new_to_old_col_indices"] = COLUMNS[:, None]
    check_decomposition(load(path), "low_rank")


def test_more_columns_than_g_has(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "low_rank_decomposition")
    with h5py.File(path, "r+") as f:
        del f["data/new_to_old_col_indices"]
        f["data/new_to_old_col_indices"] = np.append(COLUMNS, 3)
    found = load(path)
    check_decomposition(found, "low_rank")
    assert found.provenance["columns_dropped"] == 1


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("low_rank_decomposition", delete("data/G"), "'data/G' is missing"),
        (
            "low_rank_decomposition",
            put("data/new_to_old_col_indices", 99),
            "expected numbers < 17, n_parameters, got 99",
        ),
        (
            "diagonal_decomposition:sparse",
            put("data/H/row_indices", 0),
            "'data/H/row_indices' is damaged: expected offsets up to 3",
        ),
        (
            "diagonal_decomposition:sparse",
            put("data/H/column_indices", 9),
            "'data/H/column_indices' is damaged: expected numbers < 4, n_columns, got 9",
        ),
    ],
)
def test_contradictions_in_decompositions_are_named(tmp_path, layout, change, match):
    path = tmp_path / "d.h5"
    write_by_hand(path, layout)
    damage(path, change, match)


def test_decompositions_that_do_not_fit(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "low_rank_decomposition")

    def widen(f):
        del f["data/W"]
        f["data/W"] = np.abs(numbers(5, 7))

    damage(path, widen, r"'data/G' is damaged: .* with n_components = 7.*, got \(2, 4\)")


def test_block_weights_have_no_place(tmp_path):
    write_by_hand(tmp_path / "d.h5", "low_rank_decomposition")
    found = load(tmp_path / "d.h5")
    weighted = replace(found, block_weights={"parameters": 2.0})
    with pytest.raises(StorageError, match="weights per parameter"):
        write_published(weighted, tmp_path / "e.h5")
    assert not (tmp_path / "e.h5").exists()
