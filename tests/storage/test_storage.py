"""npeff's own files: what is saved comes back, contents alone fix the bytes, bad files are left alone."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from npeff.components import loading
from npeff.components.loading import describe, load
from npeff.errors import ArgumentError, ForeignFileError, NewerFileError, StorageError, TruncatedFileError
from npeff.fishers.file_format import write_fishers
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows, SparseRows, concatenate
from npeff.models.parameters import Parameters
from npeff.storage import container, files, hdf5, writing
from stored_samples import (
    M,
    assert_same,
    assert_same_components,
    components_of,
    fishers_of,
    header_of,
    placed_components,
    placed_fishers,
    to_sparse,
)

FORMATS = Path(__file__).parents[1] / "formats"


@pytest.fixture
def saved(tmp_path):
    return fishers_of().save(tmp_path / "fishers.h5")


def unchanged(path):
    """A fingerprint of a file that any write would change."""
    stat = path.stat()
    return path.read_bytes(), stat.st_mtime_ns, stat.st_ino, sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_round_trip(tmp_path, kind, sparse):
    fishers = fishers_of(kind, sparse=sparse)
    path = fishers.save(tmp_path / "a.h5")
    again = load(path, verify=True)
    assert_same(fishers, again)
    assert again.path == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_fishers_round_trip(tmp_path_factory, data):
    n, m, classes = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["low_rank", "diagonal"]))
    ranks = [1] * n if kind == "diagonal" else data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    numbers = st.floats(0 if kind == "diagonal" else None, width=32, allow_nan=False, allow_infinity=False)
    flat = data.draw(st.lists(st.one_of(st.just(0.0), numbers), min_size=sum(ranks) * m, max_size=sum(ranks) * m))
    dense = np.array(flat, np.float32).reshape(sum(ranks), m)
    words = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    name = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    fishers = Fishers(
        kind,
        to_sparse(dense) if data.draw(st.booleans()) else DenseRows(dense),
        np.concatenate([[0], np.cumsum(ranks)]).astype(np.int64),
        np.arange(n, dtype=np.float32),
        np.ones((n, classes), np.float32),
        np.full(n, -1),
        np.arange(n),
        Parameters.of([(data.draw(name), (m,))]),
        data.draw(st.dictionaries(st.text(max_size=5), words, max_size=3)),
    )
    path = fishers.save(tmp_path_factory.mktemp("any") / "f.h5")
    assert_same(fishers, load(path, verify=True))


def test_arrays_are_mapped_read_only_and_aligned(saved):
    open_before = len(os.listdir("/proc/self/fd"))
    fishers = load(saved)
    for array in (
        fishers.rows.values,
        fishers.rows.indices,
        fishers.rows.indptr,
        fishers.logits.values,
        fishers.norms,
    ):
        assert isinstance(array, np.memmap)
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    # One mapping, whatever the number of arrays; no HDF5 handle.
    assert len(os.listdir("/proc/self/fd")) - open_before <= 1
    assert not h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)


def test_a_subset_of_mapped_fishers_can_replace_its_own_file(saved):
    fishers = load(saved)
    part = fishers[[4, 2]]
    part.save(saved)
    assert_same(load(saved), part)
    assert_same(fishers, fishers_of())  # the old mapping still sees the old file


def test_wide_models_get_int64_indices(tmp_path):
    rows = SparseRows(np.array([0, 2]), np.array([5, 2**32]), np.ones(2, np.float32), 2**33)
    one = np.ones(1, np.float32)
    ids = np.zeros(1, np.int64)
    parameters = Parameters.of([("w", (2**33,))])
    fishers = Fishers("low_rank", rows, np.array([0, 1]), one, np.ones((1, 2), np.float32), ids, ids, parameters)
    again = load(fishers.save(tmp_path / "wide.h5"))
    assert again.rows.indices.dtype == np.int64
    assert again.rows.indices[1] == 2**32


def test_bytes_depend_on_contents_alone(tmp_path):
    code = "import sys; from stored_samples import fishers_of; fishers_of().save(sys.argv[1])"
    # glibc fills fresh and freed memory: bytes of it in the file would differ
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "there.h5"], check=True, env=environment)
    here = fishers_of().save(tmp_path / "here.h5")
    assert here.read_bytes() == (tmp_path / "there.h5").read_bytes()


def test_any_hdf5_reader_can_read_it(saved):
    fishers = fishers_of()
    with h5py.File(saved) as f:
        assert f.attrs["format"] == b"npeff" and f.attrs["format_version"] == 2
        np.testing.assert_array_equal(f["rows/values"], fishers.rows.values)
        assert f["parameters"][()].decode().startswith('[{"name": "layer.weight"')


def test_a_file_rewritten_by_another_program_still_opens(saved, tmp_path):
    other = tmp_path / "chunked.h5"
    with h5py.File(saved) as a, h5py.File(other, "w") as b:
        for key, value in a.attrs.items():
            b.attrs[key] = value
        for name in container.open_container(saved).specs:
            item = a[name]
            b.create_dataset(name, data=item[()], dtype=item.dtype, chunks=True if item.size and item.shape else None)
    assert_same(load(other, verify=True), fishers_of())


# --- files that cannot be opened ------------------------------------------------------------------


def refuse(path, error, match):
    before = unchanged(path)
    for opening in (load, describe):
        with pytest.raises(error, match=match) as caught:
            opening(path)
        assert type(caught.value) is error and str(path) in str(caught.value)
    assert unchanged(path) == before


def test_cut_anywhere_is_truncated(saved):
    whole = saved.read_bytes()
    lengths = [0, 1, 7, 8, 50, 95, 96, 1000, *range(1500, len(whole), 401), len(whole) - 1]
    for length in lengths:
        saved.write_bytes(whole[:length])
        refuse(saved, TruncatedFileError, "cut short|ends at byte")


def test_data_past_the_end_of_the_file_is_truncated(tmp_path):
    # A superblock that lies: patch its end-of-file address to the shorter length, as repair tools do.
    fishers = fishers_of(sparse=False)
    path = fishers.save(tmp_path / "f.h5")
    raw = bytearray(path.read_bytes())
    spec = container.open_container(path).specs["rows/values"]
    head = raw[: spec.offset + 8]
    head[40:48] = len(head).to_bytes(8, "little")
    path.write_bytes(head)
    with pytest.raises(TruncatedFileError, match=r"ends at byte|cut short|damaged"):
        load(path)


def test_zeroed_file_is_truncated(saved):
    saved.write_bytes(bytes(5000))
    refuse(saved, TruncatedFileError, "cut short or damaged")


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"PK\x03\x04...", "zip"),
        (pickle.dumps([1]), "pickle"),
        (b"hello", "something else"),
        (b'{"a": 1}', "JSON"),
    ],
)
def test_foreign(tmp_path, contents, what):
    path = tmp_path / "x.h5"
    path.write_bytes(contents)
    refuse(path, ForeignFileError, what)


def test_foreign_hdf5(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as f:
        f["data/something"] = np.arange(3)
    refuse(path, ForeignFileError, "neither npeff's")
    with h5py.File(path, "w") as f:
        f.attrs["format"] = "npeff"
        f.attrs["format_version"] = "one"
    refuse(path, ForeignFileError, "format version is 'one'")


def test_newer(tmp_path):
    path = tmp_path / "x.h5"
    writing.write_container(path, "fishers", [], {}, format_version=3)
    refuse(path, NewerFileError, "format version 3 .* upgrade npeff")


def test_an_unfinished_shard_is_not_fishers(tmp_path):
    path = tmp_path / "x.h5"
    writing.write_container(path, "shard", [], {})
    with pytest.raises(ForeignFileError, match="content 'shard'"):
        load(path)


def test_nothing_there(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        load(tmp_path / "no.h5")
    with pytest.raises(StorageError, match="folder"):
        load(tmp_path)
    (tmp_path / "no.h5.parts").mkdir()
    with pytest.raises(StorageError, match=r"unfinished work for it is in .*no.h5.parts"):
        load(tmp_path / "no.h5")


def test_damage_is_named(saved):
    spec = container.open_container(saved).specs["rows/values"]
    raw = bytearray(saved.read_bytes())
    raw[spec.offset + 1] ^= 1
    saved.write_bytes(raw)
    before = unchanged(saved)
    for options in ({}, {"verify": True}):
        with pytest.raises(StorageError, match=r"'rows/values' is damaged \(its checksum differs\)"):
            load(saved, **options)
    assert unchanged(saved) == before


@settings(max_examples=40, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 8000), st.integers(1, 255)), min_size=1, max_size=4))
def test_random_damage_gives_our_errors_or_changes_nothing(tmp_path_factory, flips):
    path = fishers_of().save(tmp_path_factory.mktemp("flips") / "f.h5")
    raw = bytearray(path.read_bytes())
    for at, bits in flips:
        raw[at] ^= bits
    path.write_bytes(raw)
    with contextlib.suppress(StorageError, ArgumentError):
        assert_same(load(path, verify=True), fishers_of())


def test_missing_dataset(tmp_path):
    path = tmp_path / "x.h5"
    writing.write_container(
        path, "fishers", [writing.Data.json("parameters", [])], {"kind": "low_rank", "rows": "dense"}
    )
    with pytest.raises(StorageError, match="'provenance' is missing"):
        load(path)


# --- writing --------------------------------------------------------------------------------------


def test_only_files_of_the_same_content_are_replaced(tmp_path, saved):
    fishers_of("diagonal").save(saved)
    assert load(saved).kind == "diagonal"
    for name, contents in (("notes.txt", b"mine"), ("empty", b"")):
        other = tmp_path / name
        other.write_bytes(contents)
        with pytest.raises(StorageError, match="not overwritten"):
            fishers_of().save(other)
        assert other.read_bytes() == contents
    with pytest.raises(StorageError, match="folder"):
        fishers_of().save(tmp_path)
    with pytest.raises(StorageError, match="does not exist; create it"):
        fishers_of().save(tmp_path / "no" / "f.h5")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.ENOSPC, r"the disk is full \(.*bytes free"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EMFILE, "too many files are open .*ulimit -n"),
    ],
)
def test_disk_full_leaves_what_was_there(saved, monkeypatch, code, what):
    def full(path):
        raise OSError(code, os.strerror(code))

    before = unchanged(saved)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=what):
        fishers_of("diagonal").save(saved)
    monkeypatch.undo()
    assert unchanged(saved) == before


def test_interruption_leaves_what_was_there(saved, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = unchanged(saved)
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fishers_of("diagonal").save(saved)
    assert unchanged(saved) == before


def test_unwritable_provenance_is_refused(tmp_path):
    fishers = fishers_of()
    fishers.provenance.update(model=object())
    try:
        with pytest.raises(ArgumentError, match="provenance: expected strings, numbers"):
            fishers.save(tmp_path / "f.h5")
    finally:
        fishers.provenance["model"] = {"digest": "00ff", "class": "Tiny"}
    assert not list(tmp_path.iterdir())


def test_a_source_that_gives_too_little_is_refused(tmp_path):
    fishers = fishers_of(sparse=False)
    bad = writing.Data("rows/values", (3, M), np.dtype("<f4"), lambda: [np.zeros(M, np.float32)])
    norms = writing.Data.of("norms", fishers.norms)
    with pytest.raises(StorageError, match=f"rows/values should have {3 * M * 4} bytes"):
        write_fishers(tmp_path / "f.h5", header_of(fishers), [], None, [norms, bad])


def test_arrays_of_text_are_refused():
    with pytest.raises(ArgumentError, match="names: expected an array of numbers"):
        writing.Data.of("names", np.array(["a"]))


def test_large_arrays_stream_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "CHUNK_BYTES", 64)
    monkeypatch.setattr(container, "CHUNK_BYTES", 64)
    for sparse in (True, False):
        fishers = fishers_of(sparse=sparse)
        assert_same(fishers, load(fishers.save(tmp_path / "f.h5"), verify=True))


# --- components and descriptions ------------------------------------------------------------------


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_components_round_trip(tmp_path, saved, kind, columns, monkeypatch):
    components = components_of(kind, columns=columns)
    path = components.save(tmp_path / "c.h5")
    again = load(path, verify=True)
    assert_same_components(again, components)
    again.coefficients[0] = 9  # small ones are read: a private copy
    monkeypatch.setattr(loading, "READ_BYTES", 0)
    mapped = load(path)
    assert isinstance(mapped.vectors, np.memmap)
    assert_same_components(mapped, components)
    found = describe(path)
    assert found["content"] == "components" and found["kind"] == kind and found["meta"]["loss"] == 0.25
    assert (found["n_examples"], found["n_components"], found["n_parameters"]) == (5, 2, M)
    with pytest.raises(StorageError, match="does not hold Fishers"):
        fishers_of().save(path)
    with pytest.raises(StorageError, match="does not hold Components"):
        components.save(saved)


def test_describe(saved):
    found = describe(saved)
    assert found["content"] == "fishers" and found["n_examples"] == 6 and found["n_parameters"] == M
    assert found["rows"] == "sparse" and found["bytes"] == saved.stat().st_size
    assert found["provenance"] == fishers_of().provenance and len(found["coverage"]) == 3
    assert found["arrays"]["logits"] == [[6, 3], "float32"]


@pytest.mark.parametrize("path", sorted((FORMATS / "v1").glob("*_fishers_*.h5")), ids=lambda path: path.stem)
def test_kept_files_of_format_1(path):
    kind, rows = path.stem.split("_fishers_")
    assert_same(load(path, verify=True), fishers_of(kind, sparse=rows == "sparse"))


@pytest.mark.parametrize("path", sorted((FORMATS / "v1").glob("*_components.h5")), ids=lambda path: path.stem)
def test_kept_components_of_format_1(path):
    assert_same_components(load(path, verify=True), components_of(path.stem.removesuffix("_components")))


def test_kept_files_of_format_2():
    assert_same(load(FORMATS / "v2" / "placed_fishers.h5", verify=True), placed_fishers())
    assert_same_components(load(FORMATS / "v2" / "placed_components.h5", verify=True), placed_components())


def test_all_kept_files_of_format_1_are_there():
    assert len(list((FORMATS / "v1").glob("*_fishers_*.h5"))) == 4
    assert len(list((FORMATS / "v1").glob("*_components.h5"))) == 2


def test_saving_takes_a_string(tmp_path):
    assert fishers_of().save(str(tmp_path / "s.h5")).exists()


@pytest.mark.parametrize("kind", [DenseRows, SparseRows])
def test_stacking_lets_go_of_the_parts(kind: type) -> None:
    """Exact Fishers are gigabytes: while they are joined, what is copied must not stay."""
    dense = [np.full((2, 5), i + 1, np.float32) for i in range(4)]
    parts = [DenseRows(a) if kind is DenseRows else planted.sparse(a) for a in dense]
    gone = [weakref.ref(part.values) for part in parts]
    expected = np.concatenate(dense)
    dense.clear()
    rows = concatenate(parts)
    assert parts == []
    assert all(array() is None for array in gone)
    np.testing.assert_array_equal(rows.dense(0, 8), expected)
