"""Damaged files: every format that npeff reads, changed at random and on purpose, loaded and used.

python benchmarks/robustness/files.py --random 100000

Every case runs in a child process with a limit of memory and of time, so that a crash, an endless loop or an allocation
without bound is an outcome like others. Prints one Markdown section.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch

import npeff
from npeff.companions import rollback
from npeff.companions.influence.estimator import Scores
from npeff.components.loading import describe
from npeff.components.published import write_published
from npeff.decomposition.checkpoint import Checkpoint
from npeff.errors import NpeffError, StorageError
from npeff.fishers.logits import Logits
from npeff.fishers.rows import GramRows
from npeff.fishers.shards import FisherWriter

MEMORY = 1 << 30
"""Bytes that a child may allocate beyond what it has."""

SECONDS = 20
"""Seconds that a case may take."""

FAST = {"max_iterations": 1, "n_init": 1, "n_replacements": 0, "progress": False, "device": "cpu"}
LOADED = b"loaded"
"""What is used after this is a function of what came before."""

ABOUT = """Small files of every format that npeff reads, each changed, loaded and used (vectors, rows, a step of a
decomposition, encoding, …) in a child process with 1 GiB of memory to spare and 20 s of time.

- *same*: all that was loaded is equal to what the unchanged file gives (the change hit padding, or nothing that
  counts).
- *StorageError*: refused, by file and field. *Other npeff error*: a message about what the file asks for, such as
  unfinished work of other settings.
- *Other numbers*: random changes of files with checksums must not give any; the published layouts have none, so that
  a number which could be right is taken. Changes on purpose have their checksums
  made right again, so that all other checks are tried: here *other numbers* are valid files with other contents.
- *Memory*: Python's MemoryError: a file of a published layout that tells of 2³¹ parameters, whose vectors are that
  long, or 256 MiB that are really there, compressed. *Hang* and *crash* end the child."""

OUTCOMES = ("same", "StorageError", "other npeff error", "other numbers", "other exception", "memory", "hang", "crash")


# ---- the files ----------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A file of one format, or a folder of files.

    Attributes:
        name: What it is.
        files: Contents by name; the first is the one that is loaded.
        use: Loads and uses what lies at a path; yields what it found, as bytes, and LOADED after what was loaded.
        checksums: Whether the file keeps checksums of its datasets.
    """

    name: str
    files: dict[str, bytes]
    use: Callable[[Path], Iterator[bytes]]
    checksums: bool = True
    loaded: str = field(default="", init=False)
    digest: str = field(default="", init=False)


def model_and_data(n: int = 12) -> tuple[torch.nn.Module, list[Any]]:
    """A network of 27 parameters and three batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).eval()
    inputs, labels = torch.randn(n, 3), torch.arange(n) % 3
    return model, list(zip(inputs.split(4), labels.split(4), strict=True))


def all_of(value: Any) -> Iterator[bytes]:
    """Everything that an object holds, as bytes."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    elif isinstance(value, torch.Tensor):
        yield from all_of(value.numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from all_of(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            if name not in ("path", "seconds", "check"):
                yield name.encode()
                yield from all_of(getattr(value, name))
    else:
        yield repr(value).encode()


def use_fishers(path: Path) -> Iterator[bytes]:
    describe(path)
    found = npeff.load(path)
    assert isinstance(found, npeff.Fishers)
    yield from all_of(found)
    yield LOADED
    if not isinstance(found.rows, GramRows):
        for i in range(len(found)):
            yield from all_of(found.dense(i))
    yield from all_of(found[: len(found) // 2])
    made = npeff.decompose(found, 2, **FAST)
    yield from all_of(made.coefficients)


def use_components(fishers: npeff.Fishers | None) -> Callable[[Path], Iterator[bytes]]:
    def use(path: Path) -> Iterator[bytes]:
        describe(path)
        found = npeff.load(path)
        assert isinstance(found, npeff.Components)
        yield from all_of(found)
        yield LOADED
        known = range(found.n_components) if found.recovered is None else found.recovered.tolist()
        for j in known:
            yield from all_of(found.vector(j))
            yield from all_of(found.top_examples(j))
            yield from all_of(found.class_distribution(j))
        yield from all_of(found.cosines())
        if fishers is not None:
            yield from all_of(found.encode(fishers).coefficients)

    return use


def use_scores(path: Path) -> Iterator[bytes]:
    found = Scores.load(path)
    yield from all_of(found)
    yield LOADED
    yield from all_of(found.top(3))
    yield from all_of(found.removal([0, 1]))


def use_record(path: Path) -> Iterator[bytes]:
    found = rollback.Record.load(path)
    yield from all_of(vars(found))
    yield LOADED
    model = found.model()
    explained = rollback.GradientRollback(model, found).explain(found.examples[0], 3)
    yield from all_of(explained.positions)


def use_checkpoint(fishers: npeff.Fishers, keeper: Checkpoint) -> Callable[[Path], Iterator[bytes]]:
    def use(path: Path) -> Iterator[bytes]:
        keeper._path = path
        yield from all_of(keeper.load())
        yield LOADED
        yield from all_of(npeff.decompose(fishers, 2, checkpoint=path, **{**FAST, "n_init": 2}).to_arrays())

    return use


def use_parts(header: dict[str, Any]) -> Callable[[Path], Iterator[bytes]]:
    def use(path: Path) -> Iterator[bytes]:
        out = path.parent.parent / path.parent.name.removesuffix(".parts")
        with FisherWriter(out, header) as writer:
            for digest, size in (("batch 0", 4), ("batch 1", 4)):
                if not writer.skip(digest, size):
                    return
            found = writer.finish([])
        yield from all_of(found)

    return use


def contents(path: Path) -> dict[str, bytes]:
    """A file by its name."""
    return {path.name: path.read_bytes()}


def subjects(folder: Path) -> list[Subject]:
    """A small file of every format."""
    model, data = model_and_data()
    compute = {"progress": False, "device": "cpu"}
    fishers = {
        "exact": npeff.compute_fishers(model, data, **compute),
        "top-k": npeff.compute_fishers(model, data, compress=npeff.TopK(9), **compute),
        "sketch": npeff.compute_fishers(model, data, compress=npeff.Sketch(16), **compute),
        "inner products": npeff.compute_fishers(model, data, compress=npeff.GramOnly(), **compute),
        "diagonal": npeff.compute_fishers(model, data, kind="diagonal", **compute),
        "diagonal top-k": npeff.compute_fishers(model, data, kind="diagonal", compress=npeff.TopK(5), **compute),
    }
    n, kept = len(fishers["top-k"]), np.sort(np.asarray(fishers["top-k"].logits))[:, ::-1]
    logits = Logits(kept, np.repeat(np.arange(kept.shape[1], dtype=np.int32)[None], n, 0), kept.max(1) + 1, 2000)
    places = np.stack([np.arange(n), np.arange(n)], 1)
    fishers["top-k, places"] = replace(fishers["top-k"], logits=logits, places=places)
    found = [
        Subject(f"Fishers, {name}", contents(item.save(folder / f"{index}.h5")), use_fishers)
        for index, (name, item) in enumerate(fishers.items())
    ]
    made = {
        name: npeff.decompose(fishers[name], 2, **FAST) for name in ("exact", "top-k, places", "sketch", "diagonal")
    }
    made["sketch"] = made["sketch"].recover(model, data, [0], progress=False)
    for name, components in made.items():
        path = components.save(folder / f"components {name}.h5")
        found.append(Subject(f"Components, {name}", contents(path), use_components(fishers[name])))
    scores = Scores(np.arange(12.0).reshape(4, 3) - 5, np.ones(3), np.full(3, 1e-6), 4, {"solver": "exact"})
    path = scores.save(folder / "scores.h5")
    found.append(Subject("influence scores", contents(path), use_scores))
    found.append(Subject("rollback record", record_of(folder), use_record))
    state, keeper = checkpoint_of(folder, fishers["exact"])
    found.append(Subject("checkpoint", state, use_checkpoint(fishers["exact"], keeper), False))
    found += parts_of(folder, fishers)
    for name, item in {
        "low-rank Fishers": fishers["exact"],
        "diagonal Fishers": fishers["diagonal top-k"],
        "low-rank decomposition": made["exact"],
        "diagonal decomposition": made["diagonal"],
    }.items():
        path = write_published(item, folder / f"published {name}.h5")
        use = use_fishers if name.endswith("Fishers") else use_components(None)
        found.append(Subject(f"published {name}", contents(path), use, False))
    path = write_published(made["diagonal"], folder / "sparse.h5", sparse=True)
    found.append(Subject("published diagonal decomposition, sparse", contents(path), use_components(None), False))
    path = write_published(fishers["exact"], folder / "variable.h5", variable=True)
    found.append(Subject("published low-rank Fishers, variable rank", contents(path), use_fishers, False))
    path = folder / "published low-rank Fishers.h5"
    with h5py.File(path, "r+") as file:
        offsets = file["data/col_offsets"][()]
        file["data/col_offsets"][...] = np.concatenate([offsets[:, :1], np.diff(offsets, axis=1)], axis=1)
    found.append(Subject("published low-rank Fishers, first generation", contents(path), use_fishers, False))
    return found


def record_of(folder: Path) -> dict[str, bytes]:
    """A rollback record."""
    model = rollback.DistMult(4, 2, 3)
    examples = np.array([[0, 1, 2], [1, 0, 3], [2, 1, 0], [3, 0, 1]])
    rollback.fit(model, examples, rollback.Recipe(epochs=2, negatives=2), out=folder / "record.h5", progress=False)
    return contents(folder / "record.h5")


def checkpoint_of(folder: Path, fishers: npeff.Fishers) -> tuple[dict[str, bytes], Checkpoint]:
    """The state of a search between two starts, and what wrote it."""
    path = folder / "state.npz"

    class Ended(Exception):
        pass

    saved, save = [], Checkpoint.save

    def kept(self: Checkpoint, memory: Any) -> None:
        save(self, memory)
        saved.append((path.read_bytes(), self))

    Checkpoint.save = kept  # type: ignore[method-assign]
    try:
        npeff.decompose(fishers, 2, checkpoint=path, **{**FAST, "n_init": 2})
    finally:
        Checkpoint.save = save  # type: ignore[method-assign]
    return {path.name: saved[0][0]}, saved[0][1]


def parts_of(folder: Path, fishers: dict[str, npeff.Fishers]) -> list[Subject]:
    """The folder of a computation that was stopped: its shard and its header."""
    from npeff.fishers.fishers import FisherBlock

    found = []
    for name in ("exact", "top-k"):
        item = fishers[name]
        header = {"kind": item.kind, "parameters": item.parameters.to_json(), "provenance": item.provenance}
        out = folder / f"parts {name}.h5"
        with FisherWriter(out, header) as writer:
            for k in range(2):
                p = item[4 * k : 4 * k + 4]
                writer.append(FisherBlock(p.rows, p.ranks, p.norms, p.logits, p.labels, p.ids), f"batch {k}")
        parts = out.with_name(out.name + ".parts")
        files = {f"{parts.name}/{path.name}": path.read_bytes() for path in sorted(parts.glob("*.*"))}
        for chosen in sorted(files, key=lambda each: not each.endswith(".h5")):
            if chosen.endswith("coverage.json") or (name == "exact" and chosen.endswith("header.json")):
                continue
            what = "shard" if chosen.endswith(".h5") else "header"
            ordered = {chosen: files[chosen], **files}
            checksums = what == "shard"
            found.append(Subject(f"unfinished Fishers, {name}, {what}", ordered, use_parts(header), checksums))
    return found


# ---- random changes -----------------------------------------------------------------------------------------------


def at_random(raw: bytes, rng: random.Random) -> bytes:
    """The file with bits flipped, bytes overwritten, inserted, removed or exchanged, or its end cut off."""
    changed, kind = bytearray(raw), rng.randrange(10)
    at = rng.randrange(len(raw))
    length = min(len(raw) - at, rng.choice([1, 2, 4, 8, 16, 64, 512]))
    if kind < 4:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del changed[at:]
    elif kind == 5:
        changed[at : at + length] = rng.randbytes(length)
    elif kind == 6:
        changed[at : at + length] = bytes([rng.choice([0, 255, 1, 127])]) * length
    elif kind == 7:
        changed[at:at] = rng.randbytes(length)
    elif kind == 8:
        del changed[at : at + length]
    else:
        other = rng.randrange(len(raw))
        changed[at : at + length] = raw[other : other + length].ljust(length, b"\0")
    return bytes(changed)


# ---- changes on purpose -------------------------------------------------------------------------------------------

Change = Callable[[h5py.File, Path], None]


def replaced(name: str, **options: Any) -> Change:
    def change(file: h5py.File, folder: Path) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, **options)
        for key, value in attributes.items():
            file[name].attrs[key] = value

    return change


def array_changes(name: str, array: np.ndarray) -> Iterator[tuple[str, Change]]:
    """Changes of a dataset of numbers."""
    with np.errstate(all="ignore"):
        for dtype in ("f2", "f4", "f8", "i1", "i4", "i8", "u8", ">f4", ">f8", ">i8", "c8", "S8", "?"):
            yield f"type {dtype}", replaced(name, data=array.astype(dtype))
    text = h5py.string_dtype()
    compound = np.zeros(array.shape, [("a", "<f4"), ("b", "<i8")])
    yield "texts", replaced(name, data=np.full(array.shape, "text", object), dtype=text)
    yield "compound", replaced(name, data=compound)
    yield "reference", replaced(name, shape=array.shape, dtype=h5py.ref_dtype)
    yield "region reference", replaced(name, shape=array.shape, dtype=h5py.regionref_dtype)
    yield "varying length", replaced(name, shape=array.shape, dtype=h5py.vlen_dtype(np.int32))
    yield "enumeration", replaced(name, shape=array.shape, dtype=h5py.enum_dtype({"A": 1, "B": 2}))
    yield "opaque", replaced(name, data=np.zeros(array.shape, "V8"))
    yield "array type", replaced(name, shape=array.shape, dtype=np.dtype(("<f4", (3,))))
    yield "scalar", replaced(name, data=array.reshape(-1)[0] if array.size else array.dtype.type(0))
    yield "one axis more", replaced(name, data=array[None])
    yield "last axis of 1", replaced(name, data=array[..., None])
    yield "flat", replaced(name, data=array.reshape(-1))
    yield "turned", replaced(name, data=array.T)
    along = np.atleast_1d(array)
    yield "one less", replaced(name, data=along[:-1])
    yield "one more", replaced(name, data=np.concatenate([along, along[-1:]]))
    yield "twice", replaced(name, data=np.concatenate([along, along]))
    yield "empty", replaced(name, data=along[:0])
    yield "null space", replaced(name, data=h5py.Empty(array.dtype))
    if array.ndim > 1:
        yield "one column less", replaced(name, data=array[:, :-1])
        yield "no columns", replaced(name, data=array[:, :0])
    values: list[Any] = [0, 1, -1, -2, 7, 2**31 - 1, 2**31, 2**62, -(2**62)]
    values += [np.nan, np.inf, -np.inf, 1e30, -1e-30] if array.dtype.kind == "f" else []
    for value in values:
        for where in ("first", "last", "all"):
            with np.errstate(all="ignore"):
                other = array.copy()
                flat = other.reshape(-1)
                flat[{"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[where]] = np.array(
                    value
                ).astype(array.dtype)
            yield f"{where} = {value}", replaced(name, data=other)
    yield "reversed", replaced(name, data=along[::-1])
    yield "exchanged", replaced(name, data=np.roll(array.reshape(-1), 1).reshape(array.shape))
    yield "in chunks", replaced(name, data=array, chunks=True if array.size and array.ndim else None)
    if array.size and array.ndim:
        yield "compressed", replaced(name, data=array, chunks=True, compression="gzip", shuffle=True)
        huge = (1 << 31, *array.shape[1:])
        yield "huge, not stored", replaced(name, shape=huge, dtype=array.dtype, fillvalue=0)
        yield "huge, in chunks", replaced(name, shape=huge, dtype=array.dtype, chunks=(1 << 20, *array.shape[1:]))
        yield "not stored", replaced(name, shape=array.shape, dtype=array.dtype, fillvalue=1)
        yield (
            "huge chunk",
            replaced(
                name,
                data=array,
                maxshape=(None, *array.shape[1:]),
                chunks=(1 << 26, *array.shape[1:]),
                compression="gzip",
            )
            if array.nbytes // len(array) <= 16
            else replaced(name, data=array),
        )

        def bomb(file: h5py.File, folder: Path) -> None:
            del file[name]
            rows = (1 << 28) // max(1, array.nbytes // len(array))
            item = file.create_dataset(
                name, (rows, *array.shape[1:]), array.dtype, chunks=(rows // 4, *array.shape[1:]), compression="gzip"
            )
            packed = zlib.compress(bytes(rows // 4 * array.nbytes // len(array)), 9)
            for part in range(4):
                item.id.write_direct_chunk((part * (rows // 4), *(0 for _ in array.shape[1:])), packed)

        yield "256 MiB of zeros, compressed", bomb


def any_changes(name: str) -> Iterator[tuple[str, Change]]:
    """Changes of the place of any dataset or group."""

    def external(kind: str) -> Change:
        def change(file: h5py.File, folder: Path) -> None:
            shape, dtype = getattr(file[name], "shape", (3,)), getattr(file[name], "dtype", np.dtype("f4"))
            pipe = folder / "pipe"
            if not pipe.exists():
                os.mkfifo(pipe)
            del file[name]
            if kind == "link":
                file[name] = h5py.ExternalLink(str(pipe), "/x")
            elif kind == "storage":
                size = int(np.prod(shape)) * dtype.itemsize
                file.create_dataset(name, shape, dtype, external=[(str(pipe), 0, max(1, size))])
            else:
                layout = h5py.VirtualLayout(shape or (1,), dtype)
                layout[...] = h5py.VirtualSource(str(pipe), "x", shape or (1,))
                file.create_virtual_dataset(name, layout)

        return change

    def link(target: str) -> Change:
        def change(file: h5py.File, folder: Path) -> None:
            file.move(name, "elsewhere") if target == "/elsewhere" else file.pop(name)
            file[name] = h5py.SoftLink(target)

        return change

    def deleted(file: h5py.File, folder: Path) -> None:
        del file[name]

    def renamed(file: h5py.File, folder: Path) -> None:
        file.move(name, name + "x")

    def group(file: h5py.File, folder: Path) -> None:
        del file[name]
        file.create_group(name)

    def circle(file: h5py.File, folder: Path) -> None:
        del file[name]
        file[name] = file["/"]

    def named_type(file: h5py.File, folder: Path) -> None:
        del file[name]
        file[name] = np.dtype("f4")

    yield from (("external link", external("link")), ("external storage", external("storage")))
    yield from (("virtual dataset", external("virtual")), ("soft link", link("/elsewhere")))
    yield from (("soft link to itself", link(f"/{name}")), ("deleted", deleted), ("renamed", renamed))
    yield from (("a group", group), ("a circle", circle), ("a named type", named_type))


def documents(raw: str, most: int = 40) -> Iterator[tuple[str, str]]:
    """A JSON document as it should not be."""
    yield from {"no JSON": "{", "nothing": " ", "null": "null", "a list": "[]", "an object": "{}"}.items()
    yield from {"a number": "3", "a text": '"x"', "true": "true", "NaN": "NaN", "list of null": "[null]"}.items()
    yield "deep lists", "[" * 100_000 + "]" * 100_000
    yield "deep objects", '{"a":' * 3000 + "1" + "}" * 3000
    yield (
        "deep in the right type",
        ('{"a": ' if raw.startswith("{") else "[") + "[" * 200 + "]" * 200 + ("}" if raw.startswith("{") else "]"),
    )
    yield "long number", '{"a": ' + "9" * 10_000 + "}"
    try:
        value = json.loads(raw)
    except ValueError:
        return
    for path in list(places(value))[:most]:
        for other in (
            None,
            0,
            -1,
            2**70,
            1.5,
            float("nan"),
            float("inf"),
            "x",
            [],
            {},
            [None],
            {"a": None},
            True,
            "gone",
        ):
            changed = json.loads(raw)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if other == "gone":
                del parent[path[-1]]
            else:
                parent[path[-1]] = other
            yield f"{'.'.join(map(str, path))} = {other}", json.dumps(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def text_changes(name: str, raw: bytes) -> Iterator[tuple[str, Change]]:
    """Changes of a dataset that holds a text."""
    text = raw.decode()
    for what, other in documents(text):
        data = other.encode()
        yield what, replaced(name, data=np.array(data, f"S{len(data)}"))
    yield "varying length", replaced(name, data=text, dtype=h5py.string_dtype())
    yield "no UTF-8", replaced(name, data=np.array(b"\xff\xfe", "S2"))
    yield "numbers", replaced(name, data=np.frombuffer(raw, np.uint8))
    yield "several", replaced(name, data=np.array([raw, raw]))
    yield "huge, not stored", replaced(name, shape=(1 << 31,), dtype="S8")


def attribute_changes(where: str, name: str, value: Any) -> Iterator[tuple[str, Change]]:
    """Changes of an attribute."""

    def changed(other: Any, dtype: Any = None) -> Change:
        def change(file: h5py.File, folder: Path) -> None:
            del file[where].attrs[name]
            if other is not None:
                file[where].attrs.create(name, other, dtype=dtype)

        return change

    others: list[Any] = [None, 0, 1, -1, 5, 2**31, 2**62, 0.5, np.nan, np.inf, "x", "", b"\xff\xfe", "npeff"]
    others += [[1, 2], [3], [], [[1]], [0.5], np.zeros(2000), h5py.Empty("f4"), np.zeros((), [("a", "f4")]), True]
    for other in others:
        yield f"= {other!r}"[:40], changed(other)
    yield "reference", changed(np.zeros((), h5py.ref_dtype), h5py.ref_dtype)
    yield "texts", changed(["a", "b"], h5py.string_dtype())
    yield "varying length", changed(np.array([np.arange(2)], object), h5py.vlen_dtype(np.int32))
    raw = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(raw, str) and raw[:1] in "{[":
        for what, other in documents(raw):
            if len(other) < 60_000:
                yield what, changed(other)


def on_purpose(subject: Subject) -> Iterator[tuple[str, Change]]:
    """All changes of an HDF5 file, with a word for each."""
    raw = next(iter(subject.files.values()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        path.write_bytes(raw)
        with h5py.File(path) as file:
            found: dict[str, Any] = {"": None}

            def visit(name: str, item: Any) -> None:
                found[name] = item[()] if isinstance(item, h5py.Dataset) else None

            file.visititems(visit)
            attributes = [(name or "/", key, value) for name in found for key, value in file[name or "/"].attrs.items()]
    for name, value in found.items():
        if not name:
            continue
        for what, change in any_changes(name):
            yield f"{name}: {what}", change
        if isinstance(value, bytes):
            if name != "checksums":
                for what, change in text_changes(name, value):
                    yield f"{name}: {what}", change
        elif value is not None:
            for what, change in array_changes(name, np.asarray(value)):
                yield f"{name}: {what}", change
    for where, key, value in attributes:
        for what, change in attribute_changes(where, key, value):
            yield f"{where}@{key} {what}", change


def repaired(path: Path, checksums: bool) -> None:
    """Make the checksums of a changed file right again, so that all other checks are tried."""
    if not checksums:
        return
    with h5py.File(path, "r+") as file:
        try:
            sums = json.loads(file["checksums"][()])
            for name in list(sums):
                kind = file.get(name, getlink=True)
                item = file.get(name) if isinstance(kind, h5py.HardLink) else None
                if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
                    continue
                if item.dtype.hasobject or item.dtype.kind == "V" or item.size is None or item.nbytes > 1 << 24:
                    continue
                sums[name] = f"{zlib.crc32(np.ascontiguousarray(item[()]).tobytes()):08x}"
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError):
            return
        text = json.dumps(sums).encode()
        del file["checksums"]
        file["checksums"] = np.array(text, f"S{len(text)}")


# ---- running ------------------------------------------------------------------------------------------------------


def put(folder: Path, subject: Subject) -> Path:
    """The subject's files in an empty folder; the path of the first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in reversed(subject.files.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder / next(iter(subject.files))


def outcome(subject: Subject, path: Path) -> str:
    """What comes of loading and using a file; what was loaded as ever is not used again."""
    hashed = hashlib.blake2b(digest_size=16)
    try:
        for found in subject.use(path):
            hashed.update(found)
            if found == LOADED and hashed.hexdigest() == subject.loaded:
                return "same"
    except StorageError:
        return "StorageError"
    except NpeffError:
        return "other npeff error"
    except MemoryError:
        return "memory"
    except Exception as error:
        return f"other exception: {type(error).__name__}: {str(error)[:150]}"
    return "same" if hashed.hexdigest() == subject.digest else "other numbers"


def limited() -> None:
    """Bound the memory of this process, where the system tells how much it has."""
    if not Path("/proc/self/statm").exists():
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(cases: Sequence[Any], case: Callable[[Any], str], chunk: int) -> Iterator[tuple[Any, str]]:
    """The outcome of every case; cases of a chunk share a child, and one that ends it is known by that."""
    done = 0
    while done < len(cases):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the child ends
            try:
                limited()
                for each in cases[done : done + chunk]:
                    signal.alarm(SECONDS)
                    os.write(writing, case(each).replace("\n", " ").encode() + b"\n")
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        yield from zip(cases[done:], lines, strict=False)
        done += len(lines)
        if status or len(lines) < min(chunk, len(cases) - done + len(lines)):
            if done < len(cases):
                yield cases[done], "hang" if os.WTERMSIG(status) == signal.SIGALRM else f"crash: signal {status & 127}"
            done += 1


def try_random(subject: Subject, count: int, seed: int, folder: Path, chunk: int = 500) -> Iterator[tuple[str, str]]:
    """Outcomes of random changes of the subject's first file."""
    raw = next(iter(subject.files.values()))

    def case(index: int) -> str:
        path = put(folder, subject)
        path.write_bytes(at_random(raw, random.Random(f"{subject.name} {seed} {index}")))
        return outcome(subject, path)

    yield from ((f"random {index}", found) for index, found in run(range(count), case, chunk))


def try_on_purpose(
    subject: Subject, folder: Path, share: Callable[[int], bool], chunk: int = 200
) -> Iterator[tuple[str, str]]:
    """Outcomes of changes on purpose, those of a share of the numbers."""
    changes = [change for index, change in enumerate(on_purpose(subject)) if share(index)]

    def case(named: tuple[str, Change]) -> str:
        path = put(folder, subject)
        try:
            with h5py.File(path, "r+") as file:
                named[1](file, folder)
        except Exception as error:
            return f"not made: {type(error).__name__} {error}"
        repaired(path, subject.checksums)
        return outcome(subject, path)

    yield from ((named[0], found) for named, found in run(changes, case, chunk))


def report(rows: dict[str, Counter[str]]) -> str:
    """A Markdown table: outcomes by subject."""
    lines = ["| file | cases | " + " | ".join(OUTCOMES) + " |", "|---|---:|" + "---:|" * len(OUTCOMES)]
    total: Counter[str] = Counter()
    for name, counts in rows.items():
        total += counts
        lines.append(f"| {name} | {counts.total():,} | " + " | ".join(f"{counts[o]:,}" for o in OUTCOMES) + " |")
    lines.append(f"| **all** | {total.total():,} | " + " | ".join(f"{total[o]:,}" for o in OUTCOMES) + " |")
    return "\n".join(lines)


def prepared(folder: Path) -> list[Subject]:
    """All subjects, each with the digest of what the unchanged file gives."""
    torch.set_num_threads(1)
    npeff.kernels.set_num_threads(1)
    warnings.simplefilter("ignore")
    (folder / "made").mkdir()
    found = subjects(folder / "made")
    for subject in found:
        hashed = hashlib.blake2b(digest_size=16)
        for piece in subject.use(put(folder / "case", subject)):
            hashed.update(piece)
            if piece == LOADED:
                subject.loaded = hashed.hexdigest()
        subject.digest = hashed.hexdigest()
        assert outcome(subject, put(folder / "case", subject)) == "same", subject.name
    return found


def main() -> None:
    """Run the trial and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=2000, help="random changes, shared out evenly")
    parser.add_argument("--every", type=int, default=1, help="of the changes on purpose, try every n-th; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--show", type=int, default=20, help="bad cases to list")
    options = parser.parse_args()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder, began = Path(name), time.monotonic()
        chosen = [subject for subject in prepared(folder) if options.only in subject.name]
        tables: dict[str, dict[str, Counter[str]]] = {"random": {}, "on purpose": {}}
        bad: list[str] = []
        for subject in chosen:
            for what, tried in (
                ("random", try_random(subject, options.random // len(chosen), options.seed, folder / "case")),
                (
                    "on purpose",
                    try_on_purpose(
                        subject, folder / "case", lambda index: bool(options.every) and index % options.every == 0
                    ),
                ),
            ):
                if what == "on purpose" and not next(iter(subject.files)).endswith(".h5"):
                    continue
                print(f"{time.monotonic() - began:.0f} s: {subject.name}, {what}", file=sys.stderr)
                counts = tables[what].setdefault(subject.name, Counter())
                for case, found in tried:
                    if found.startswith("not made"):
                        continue
                    kind = found.partition(":")[0]
                    counts[kind] += 1
                    bare = "published" in subject.name  # without checksums
                    silent = kind == "other numbers" and what == "random" and not bare
                    if kind in OUTCOMES[4:] or silent:
                        bad.append(f"{subject.name}, {case}: {found}")
        print("## Damaged files\n")
        print(ABOUT)
        for what, rows in tables.items():
            if any(rows.values()):
                print(f"\nChanged {what}:\n\n{report(rows)}")
        print(f"\nCases that should not be: {len(bad)}")
        for line in bad[: options.show]:
            print(f"- {line}")


if __name__ == "__main__":
    main()
