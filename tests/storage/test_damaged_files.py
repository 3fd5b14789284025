"""Damaged and hostile files of every format: refused with a StorageError that names the file and the field."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import npeff
from npeff.companions.influence.estimator import Scores
from npeff.components.loading import describe, load
from npeff.errors import ArgumentError, DataError, StorageError
from npeff.storage import container
from npeff.storage.checks import parse_json, read_json
from npeff.storage.writing import write_record
from planted import planted
from stored_samples import assert_same, components_of, fishers_of, placed_components, placed_fishers, write_by_hand

ROOT = Path(__file__).parents[2]
FORMATS = Path(__file__).parents[1] / "formats"
QUICK = {"max_iterations": 3, "n_init": 1, "n_replacements": 0, "progress": False}


def put(path: Path, name: str, data: object = None, **options: object) -> None:
    """Replace a dataset and make the file's checksums right again: all other checks have to notice."""
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file.create_dataset(name, data=data, **options)
        sums = json.loads(file["checksums"][()])
        for each in sums:
            if each in file and file[each].dtype.kind != "O" and (file[each].nbytes or 0) < 1 << 20:
                sums[each] = f"{zlib.crc32(np.asarray(file[each][()]).tobytes()):08x}"
        del file["checksums"]
        file["checksums"] = np.bytes_(json.dumps(sums))


def test_a_few_hundred_damaged_files_of_every_format() -> None:
    """The trial of benchmarks/robustness/files.py, in short: no wrong numbers, crash, endless loop or other error."""
    command = [sys.executable, ROOT / "benchmarks/robustness/files.py", "--random", "120", "--every", "150"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "Cases that should not be: 0" in done.stdout, done.stdout


# ---- every field --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("rows/indices", lambda a: a[::-1], "entries that rise within a row"),
        ("rows/indices", lambda a: np.full_like(a, 17), "numbers < 17, n_parameters"),
        ("rows/indices", lambda a: a - 9, "numbers ≥ 0"),
        ("rows/indices", lambda a: a.astype(float), "the type <i4 or <i8"),
        ("rows/indices", lambda a: a[:-1], r"the shape \(n_entries\)"),
        ("rows/indptr", lambda a: a + 1, "offsets from 0 on"),
        ("rows/indptr", lambda a: np.append(a[:-1], a[-1] + 1), "offsets up to"),
        ("rows/indptr", lambda a: np.r_[a[0], a[-1], a[2:]], "offsets that do not fall"),
        ("rows/values", lambda a: np.where(a == a[3], np.nan, a), "finite numbers"),
        ("rows/values", lambda a: a * np.float32(np.inf), "finite numbers"),
        ("rows/values", lambda a: a[None], r"the shape \(n_entries\)"),
        ("row_offsets", lambda a: a[:-1], r"the shape \(n_examples"),
        ("row_offsets", lambda a: a // 2, "offsets up to"),
        ("norms", lambda a: -a, "numbers ≥ 0"),
        ("labels", lambda a: a + 1, "numbers < 3"),
        ("labels", lambda a: a - 1, "numbers ≥ -1"),
        ("logits", lambda a: a.astype("S4"), "the type <f4"),
        ("logits", lambda a: a.astype(">f4"), "the type <f4"),
        ("ids", lambda a: -a, "numbers ≥ 0"),
    ],
)
def test_fields_of_fishers(tmp_path, name, change, words):
    path = fishers_of().save(tmp_path / "f.h5")
    put(path, name, change(array_in(path, name)))
    with pytest.raises(StorageError, match=rf"f\.h5: dataset '[^']*'.*{words}") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "arrays/"])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logit_classes", lambda a: a + 40, "numbers < 50, n_outputs"),
        ("logit_classes", lambda a: a - 1, "numbers ≥ 0"),
        ("logit_classes", lambda a: a[:, 1:], r"the shape \(n_examples, n_logits\)"),
        ("log_normaliser", lambda a: a * np.float32(np.nan), "finite"),
        ("log_normaliser", lambda a: a[1:], r"the shape \(n_examples\)"),
        ("n_outputs", lambda a: a * 0 + 2, "at least 3, the logits that are kept, .* got 2"),
        ("n_outputs", lambda a: a * 0 + (1 << 40), "at least 3.* got 1099511627776"),
        ("n_outputs", lambda a: a[None], r"the shape \(\)"),
        ("places", lambda a: a[:, :1], r"the shape \(n_examples, 2\)"),
        ("places", lambda a: a - 1, "numbers ≥ 0"),
        ("places", lambda a: a.astype(float), "the type"),
    ],
)
def test_fields_of_places_and_the_largest_logits(tmp_path, prefix, name, change, words) -> None:
    path = tmp_path / "f.h5"
    (placed_components() if prefix else placed_fishers()).save(path)
    load(path, verify=True)
    put(path, prefix + name, change(array_in(path, prefix + name)))
    with pytest.raises(StorageError, match=rf"f\.h5: dataset '[^']*{name}' is damaged: expected {words}"):
        load(path)


@pytest.mark.parametrize("name", ["logit_classes", "log_normaliser", "n_outputs"])
def test_the_largest_logits_without_what_they_need(tmp_path, name) -> None:
    path = placed_fishers().save(tmp_path / "f.h5")
    with h5py.File(path, "r+") as file:
        sums = json.loads(file["checksums"][()])
        del file[name], file["checksums"], sums[name]
        file["checksums"] = np.bytes_(json.dumps(sums))
    with pytest.raises(StorageError, match=r"f\.h5.* damaged"):
        load(path)


def array_in(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][()]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("coefficients", lambda a: -a, "numbers ≥ 0"),
        ("coefficients", lambda a: a[:, :1], r"the shape \(n_components, n_columns\)"),
        ("vectors", lambda a: a * np.float32(np.nan), "finite"),
        ("columns", lambda a: a[::-1], "rise"),
        ("columns", lambda a: a + 1, "numbers < 17"),
        ("labels", lambda a: a + 5, "numbers < 3"),
        ("norms", lambda a: a - 9, "numbers ≥ 0"),
        ("loss_curve", lambda a: a / 0, "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_fields_of_components(tmp_path, name, change, words):
    path = components_of().save(tmp_path / "c.h5")
    put(path, f"arrays/{name}", change(array_in(path, f"arrays/{name}")))
    with pytest.raises(StorageError, match=rf"c\.h5: dataset 'arrays/.*{words}"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "middle_rank"), ("kind", 3), ("loss", "none"), ("loss", None), ("block_weights", [1]),
        ("block_weights", {"layer.weight": "x"}), ("block_weights", {"layer.weight": -1.0}), ("provenance", []),
        ("block_weights", {"layer": 1.0}), ("parameters", [{"name": "a"}]),
        ("parameters", [{"name": "a", "shape": [-1]}]), ("parameters", [{"name": "a", "shape": [2**62]}]),
        ("parameters", {}), ("provenance", {"fishers": 3}),
        ("provenance", {"fishers": {"options": {"compress": [1]}}}),
    ],
)  # fmt: skip
def test_meta_of_components(tmp_path, key, value):
    path = components_of().save(tmp_path / "c.h5")
    put(path, "meta", np.bytes_(json.dumps({**json.loads(array_in(path, "meta")), key: value})))
    with pytest.raises(StorageError, match=rf"c\.h5: .*'meta'.*{key}|c\.h5: .*{key}|c\.h5: .*fishers"):
        load(path)


# ---- what leads out of a file, or is not in it ----------------------------------------------------------------------


def elsewhere(file: h5py.File, name: str, kind: str, pipe: str) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    if kind == "external link":
        file[name] = h5py.ExternalLink(pipe, "/x")
    elif kind == "soft link":
        file[name] = h5py.SoftLink("/nowhere")
    elif kind == "external storage":
        file.create_dataset(name, shape, dtype, external=[(pipe, 0, 1 << 20)])
    elif kind == "virtual dataset":
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(pipe, "x", shape)
        file.create_virtual_dataset(name, layout)
    elif kind == "not stored":
        file.create_dataset(name, (1 << 31, *shape[1:]), dtype)
    elif kind == "not stored, in pieces":
        file.create_dataset(name, (1 << 31, *shape[1:]), dtype, chunks=(1 << 16, *shape[1:]))
    elif kind == "references":
        file.create_dataset(name, shape, h5py.ref_dtype)
    else:
        file.create_dataset(name, shape, h5py.vlen_dtype(np.int64))


KINDS = ["external link", "soft link", "external storage", "virtual dataset", "not stored", "not stored, in pieces",
         "references", "varying length"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("subject", "name"),
    [("fishers", "logits"), ("components", "arrays/vectors"), ("published", "data/values"), ("scores", "values")],
)
def test_what_the_file_does_not_hold(tmp_path, subject, name, kind):
    path = tmp_path / "x.h5"
    if subject == "published":
        path.write_bytes((FORMATS / "published/low_rank_fishers.h5").read_bytes())
    elif subject == "scores":
        scores().save(path)
    else:
        (fishers_of() if subject == "fishers" else components_of()).save(path)
    os.mkfifo(tmp_path / "pipe")  # to open it would never end
    with h5py.File(path, "r+") as file:
        elsewhere(file, name, kind, str(tmp_path / "pipe"))
    size = path.stat().st_size
    with pytest.raises(StorageError, match=rf"x\.h5: dataset '{name}'"):
        Scores.load(path) if subject == "scores" else load(path)
    assert path.stat().st_size == size < 20_000


@pytest.mark.parametrize("use", [load, describe, Scores.load, read_json, npeff.load])
def test_pipes_and_devices_are_refused_at_once(tmp_path, use):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(StorageError, match="expected a regular file, but this is a device, pipe or socket"):
            use(path)
    with pytest.raises(StorageError, match="this is a folder"):
        use(tmp_path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "d.h5"
    write_by_hand(path, "diagonal_decomposition:sparse")
    with h5py.File(path, "r+") as file:
        many = np.arange(400_000, dtype=np.int32)
        del file["data/reduce_kept_indices"], file["data/W"], file["data/H/row_indices"]
        file.create_dataset("data/reduce_kept_indices", data=many, compression="gzip", shuffle=True)
        file["data/reduce_kept_indices"].attrs["full_dense_size"] = len(many)
        file["data/W"] = np.ones((1, 4000), np.float32)
        file["data/H/row_indices"] = np.minimum(np.arange(4001), 3)
        file["data/H"].attrs["shape"] = (4000, len(many))
    with pytest.raises(StorageError, match=r"d\.h5: .*sparse H of shape .* would take 12,800,000,000 bytes of memory"):
        load(path)


# ---- wrong bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fishers_of, components_of, lambda: scores()], ids=["fishers", "components", "scores"])
def test_plain_load_notices_wrong_bits(tmp_path, make):
    path = make().save(tmp_path / "x.h5")
    raw, rng = path.read_bytes(), random.Random(0)
    use = Scores.load if isinstance(make(), Scores) else load
    expected = use(path)
    for _ in range(150):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            found = use(path)
        except StorageError as error:
            assert "x.h5" in str(error)
            continue
        if isinstance(found, Scores):
            np.testing.assert_array_equal(found.values, expected.values, strict=True)
            assert found.provenance == expected.provenance and found.n == expected.n
        elif isinstance(found, npeff.Fishers):
            assert_same(found, expected)
        else:
            assert all(np.array_equal(a, expected.to_arrays()[name]) for name, a in found.to_arrays().items())
            assert found.meta() == expected.meta()


def test_large_rows_are_checked_before_they_are_used(tmp_path, monkeypatch):
    fishers, _, _ = planted(12, 3, 20, 0.0, 0)
    path = fishers.save(tmp_path / "f.h5")
    spec = container.open_container(path).specs["rows/values"]
    raw = bytearray(path.read_bytes())
    raw[spec.offset + 4 * 20 * 4 + 1] ^= 1  # the second example's
    path.write_bytes(raw)
    monkeypatch.setattr(container, "VERIFY_BYTES", 1000)
    found = load(path)  # quick, whatever the size
    assert found.dense(0).shape == (4, 20)
    uses = [
        found.verify,
        lambda: npeff.decompose(found, 2, **QUICK),
        lambda: npeff.decompose(fishers, 2, **QUICK).encode(found),
        lambda: found.save(tmp_path / "g.h5"),
    ]
    for use in uses:
        with pytest.raises(StorageError, match=r"'rows/values' is damaged \(its checksum differs\)"):
            use()
    values = array_in(path, "rows/values")
    values[5, 0] = np.nan
    put(path, "rows/values", values)
    found = load(path)
    assert np.isfinite(found.dense(0)).all()
    for use in (lambda: found.dense(1), lambda: found[[1]]):
        with pytest.raises(StorageError, match=r"'rows/values' is damaged: expected finite numbers"):
            use()
    with pytest.raises(StorageError, match="finite"):
        load(path, verify=True)


def test_large_vectors_are_checked_before_they_are_used(tmp_path, monkeypatch):
    fishers, _, _ = planted(12, 3, 20, 0.0, 0)
    path = npeff.decompose(fishers, 2, **QUICK).save(tmp_path / "c.h5")
    raw = bytearray(path.read_bytes())
    raw[container.open_container(path).specs["arrays/vectors"].offset] ^= 1
    path.write_bytes(raw)
    monkeypatch.setattr(container, "VERIFY_BYTES", 100)
    found = load(path)
    uses = (found.verify, found.cosines, lambda: found.encode(fishers), lambda: found.save(tmp_path / "d.h5"))
    for use in (*uses, lambda: pickle.dumps(found)):
        with pytest.raises(StorageError, match=r"'arrays/vectors' is damaged \(its checksum differs\)"):
            use()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_load_would_refuse_is_not_saved(tmp_path):
    fishers = fishers_of()
    fishers.rows.values[2] = np.nan
    with pytest.raises(ArgumentError, match=r"fishers: dataset 'rows/values': expected finite numbers, got nan"):
        fishers.save(tmp_path / "f.h5")
    model = torch.nn.Linear(3, 3).eval()
    with torch.no_grad():
        model.weight.mul_(1e-22)
    data = [(1e22 * torch.ones(2, 3), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(DataError, match="example 0 has the norm inf, beyond what float32 holds"):
        npeff.compute_fishers(model, data, out=tmp_path / "f.h5", progress=False)
    components = components_of()
    components.coefficients[0, 0], kept = -1, components.coefficients[0, 0]
    with pytest.raises(ArgumentError, match=r"components: dataset 'coefficients': expected numbers ≥ 0, got -1"):
        components.save(tmp_path / "c.h5")
    components.coefficients[0, 0] = kept  # the samples share it
    assert not list(tmp_path.iterdir())


# ---- kept files, equal files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((FORMATS / "v1").glob("*_components.h5")), ids=lambda path: path.stem)
def test_kept_components_have_vectors(path):
    found = load(path)
    weights = np.ones(found.n_parameters)
    weights[:12] = 0.5**0.5 if found.kind == "low_rank" else 0.5  # layer.weight; a parameter without a weight has 1
    for j in range(2):
        expected = np.zeros(found.n_parameters)
        expected[found.columns] = found.vectors[j]
        expected /= weights
        np.testing.assert_allclose(found.vector(j), expected / np.linalg.norm(expected), rtol=1e-6)


def test_components_of_the_same_run_are_equal_byte_for_byte(tmp_path):
    fishers, _, _ = planted(20, 3, 30, 0.1, 0)
    for name in "ab":
        npeff.decompose(fishers, 2, **{**QUICK, "n_replacements": 2, "seed": 1}).save(tmp_path / f"{name}.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    made = npeff.decompose(fishers, 2, **QUICK)
    assert made.seconds["solving"] > 0 and not re.search("seconds", json.dumps(made.meta()))


# ---- other files --------------------------------------------------------------------------------------------------


def scores() -> Scores:
    return Scores(np.arange(12.0).reshape(4, 3) - 5, np.ones(3), np.full(3, 1e-6), 4, {"solver": "exact"})


@pytest.mark.parametrize("meta", [{}, {"n": 4}, {"n": 0, "provenance": {}}, {"n": "x", "provenance": {}}, {"n": None}])
def test_scores_with_other_meta_data(tmp_path, meta):
    found = scores()
    arrays = {name: getattr(found, name) for name in ("values", "test_values", "residuals")}
    path = write_record(tmp_path / "s.h5", "influence", arrays, meta)
    with pytest.raises(StorageError, match=r"s\.h5: dataset 'meta'"):
        Scores.load(path)


def test_damaged_checkpoints(tmp_path):
    fishers, _, _ = planted(12, 3, 20, 0.1, 0)
    path, options = tmp_path / "state", {**QUICK, "n_init": 2}

    class Interrupted(Exception):
        pass

    def stop(progress):
        if path.exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        npeff.decompose(fishers, 2, checkpoint=path, callback=stop, **options)
    whole = path.read_bytes()
    expected = npeff.decompose(fishers, 2, **options)
    resumed = npeff.decompose(fishers, 2, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.coefficients, expected.coefficients)
    rng, refused = random.Random(0), 0
    changes = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    specs = container.open_container(path).specs.values()
    stored = [at for spec in specs for at in range(spec.offset, spec.offset + spec.nbytes)]
    for at in [*rng.sample(stored, 30), *rng.sample(range(len(whole)), 30)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        changes.append(bytes(changed))
    for changed in changes:
        path.write_bytes(changed)
        try:
            again = npeff.decompose(fishers, 2, checkpoint=path, **options)
        except StorageError as error:
            assert str(path) in str(error) and "remove it or choose another path" in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(again.coefficients, expected.coefficients)
    assert refused > 40


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("W", lambda a: a[:5]), ("W", lambda a: -a), ("W", lambda a: a[:, :1]), ("coords", lambda a: a[:, :-1]),
        ("coords", lambda a: a * np.nan), ("coords", lambda a: a[0]), ("W", lambda a: a.astype(complex)),
        ("meta", lambda a: {}), ("meta", lambda a: a | {"numbers": {}}), ("meta", lambda a: a | {"frozen": -1}),
        ("meta", lambda a: a | {"loss": "low"}), ("curve", lambda a: a.astype("S8")),
    ],
)  # fmt: skip
def test_checkpoints_whose_arrays_do_not_fit(tmp_path, name, change):
    fishers, _, _ = planted(12, 3, 20, 0.1, 0)
    path, options = tmp_path / "state", {**QUICK, "n_init": 2}

    def stop(progress):
        if path.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npeff.decompose(fishers, 2, checkpoint=path, callback=stop, **options)
    found = container.open_container(path)
    contents = {name: np.array(found.array(name)) for name in ("W", "coords", "curve")} | {"meta": found.json("meta")}
    contents[name] = change(contents[name])
    meta = contents.pop("meta")
    write_record(path, "search", contents, meta)
    with pytest.raises(StorageError, match=r"checkpoint: .*state"):
        npeff.decompose(fishers, 2, checkpoint=path, **options)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 100_000, "expected JSON"), (b'{"a":' * 100 + b"1" + b"}" * 100, "at most 64 levels"),
        (b"[1]", "an object"),
        (b'{"a": NaN}', "finite"), (b'{"a": [1e999]}', "finite"), (b"\xff", "expected JSON"), (b"", "expected JSON"),
    ],
)  # fmt: skip
def test_json_is_bounded(tmp_path, raw, words):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=rf"x\.json is damaged: .*{words}"):
        read_json(path)
    with pytest.raises(StorageError, match=words):
        parse_json(raw, "here")
