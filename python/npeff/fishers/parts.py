"""Unfinished work in ``<out>.parts/``: a header, a lock and numbered shards, each complete before it gets its name.

The header says what the work is made with; it is continued only with the same. A shard holds the arrays of a file of
Fishers (:mod:`npeff.fishers.file_format`), of its own examples.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npeff.errors import ForeignFileError, NewerFileError, ResumeError, StorageError
from npeff.fishers.file_format import (
    EXAMPLES,
    OFFSETS,
    ROWS,
    count_outputs,
    described_parameters,
    fisher_data,
    joined_data,
    told_outputs,
    write_fishers,
)
from npeff.fishers.fishers import FisherBlock
from npeff.models.parameters import Parameters
from npeff.storage.checks import Sizes, check_shapes, expect, item, read_json
from npeff.storage.container import FORMAT, Container, open_container
from npeff.storage.files import Lock, atomic, explain, refuse_link, sync_folder
from npeff.storage.writing import Data, to_json, write_container

BatchRecord = tuple[str, int]

PARTS_VERSION = 2
"""Version of unfinished work; that of version 1 had other shards."""

_OURS = re.compile(r"lock|header\.json|coverage\.json|shard-\d+\.h5|.*\.tmp")


def parts_folder(out: Path) -> Path:
    """Return the folder of unfinished work for ``out``."""
    return out.with_name(out.name + ".parts")


class Parts:
    """The shards of one output, held under a lock: written, listed, merged, removed."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        """Open or create the folder of unfinished work for ``out``.

        Raises:
            StorageError: The folder belongs to something else, or another process works in it.
            ResumeError: The work in it was made with other settings.
        """
        self.out, self.header, self.folder = out, header, parts_folder(out)
        self.shards: list[Container] = []
        self.batches: list[BatchRecord] = []
        try:
            while not self._take():
                pass
        except StorageError:
            raise
        except OSError as error:
            failure = explain(self.folder, error, "Nothing was computed yet.")
            raise failure from error

    def _take(self) -> bool:
        """Create and lock the folder; False when a process that finished meanwhile has removed it.

        Raises:
            StorageError: It holds something else.
        """
        if self.folder.is_symlink() or (not self.folder.is_dir() and self.folder.exists()):
            what = "a symbolic link" if self.folder.is_symlink() else "a file"
            raise StorageError(
                f"{self.folder}: needed as a folder for unfinished work, but is {what}; choose another out, "
                "or move it away"
            )
        self.folder.mkdir(exist_ok=True)
        try:
            other = next((path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name)), None)
            if other is not None:
                raise StorageError(
                    f"{self.folder}: needed for unfinished work, but holds {other}; choose another out, or move it away"
                )
            _refuse_links(self.folder)
            self.lock = Lock(self.folder / "lock", f"writing {self.out}")
        except FileNotFoundError:
            return False
        return True

    def resume(self) -> None:
        """Read the header and list the shards; in a new folder write the header.

        Raises:
            ResumeError: The work was made with other settings.
            NewerFileError: By a newer npeff.
            StorageError: A shard is missing or damaged.
        """
        self._remove_scratch()
        path = self.folder / "header.json"
        if path.exists():
            _check_header(self.out, self.folder, read_header(path), self.header)
        else:
            document = {"format": FORMAT, "format_version": PARTS_VERSION, "header": self.header}
            with atomic(path, kept="Nothing was computed yet.") as scratch:
                scratch.write_text(to_json(document, path.name), encoding="utf-8")
            sync_folder(self.out.parent)  # the folder itself
        self.shards = list_shards(self.folder, Parameters.from_json(self.header["parameters"]).n_parameters)
        self.batches = [batch for shard in self.shards for batch in batches_in(shard)]

    def _remove_scratch(self) -> None:
        """Remove what a killed process was writing; the lock is held, so that none is at it now."""
        for scratch in self.folder.glob("*.tmp"):
            if scratch.is_dir() and not scratch.is_symlink():
                shutil.rmtree(scratch)
            else:
                scratch.unlink()

    @property
    def n_examples(self) -> int:
        """Examples in finished shards."""
        return sum(size for _, size in self.batches)

    def write_shard(self, blocks: Sequence[FisherBlock], batches: Sequence[BatchRecord]) -> None:
        """Write the blocks, at least one, as the next shard: complete and on the disk before it has its name."""
        index = len(self.shards)
        path = self.folder / f"shard-{index:06d}.h5"
        kept = f"{index} finished shards ({self.n_examples} examples) are safe in {self.folder}."
        with atomic(path, kept=kept) as scratch:
            described = Data.json("batches", [list(batch) for batch in batches])
            data = fisher_data([block.arrays() for block in blocks], blocks[0].rows.n_columns)
            write_container(scratch, "shard", [described, *data], {})
        self.shards.append(open_container(path))
        self.batches += batches

    def merge(self, coverage: object) -> None:
        """Stream the shards into the final file, one piece in memory at a time; the folder stays."""
        kept = f"All {self.n_examples} examples are safe in {self.folder}."
        with atomic(self.out, kept=kept) as scratch:
            write_fishers(
                scratch,
                self.header,
                coverage,
                [list(batch) for batch in self.batches],
                joined_data([(shard, 0, shard.spec("norms").shape[0]) for shard in self.shards]),
            )

    def clear(self) -> None:
        """Clean up after a run that was killed between naming the final file and removing the folder."""
        path = self.folder / "header.json"
        if not path.exists() or read_header(path) == _as_json(self.header):
            self.remove()
        else:  # someone else's unfinished work
            self.lock.release()

    def remove(self) -> None:
        """Remove the folder. Shards go last to first: whatever is left by a kill is a valid beginning."""
        for path in sorted(self.folder.glob("shard-*.h5"), reverse=True):
            path.unlink()
        for name in ("coverage.json", "header.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)
        self._remove_scratch()
        self.lock.release(folder=True)
        sync_folder(self.out.parent)


def differences(then: object, now: object, name: str = "") -> list[str]:
    """List what differs between two JSON values, one line per item, with its dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [
            line for key in keys for line in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [
            line for i, pair in enumerate(zip(then, now, strict=True)) for line in differences(*pair, f"{name}[{i}]")
        ]
    return [] if then == now else [f"{name}: {_short(then)} then, {_short(now)} now"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def find_finished(out: Path, header: dict[str, Any]) -> Container | None:
    """Open the Fishers at ``out``, which were made with the same model and options; None where nothing is there.

    Raises:
        StorageError: Something else is there.
        ResumeError: They were made with other settings; says which.
    """
    if not out.exists():
        return None
    try:
        found = open_container(out)
    except StorageError as error:
        raise type(error)(f"{error} It is not overwritten: remove it, or choose another out.") from error
    if found.content != "fishers":
        raise StorageError(
            f"{out}: holds npeff {found.content}, and is not overwritten; remove it, or choose another out"
        )
    theirs = {"kind": found.attributes.get("kind")} | {name: found.json(name) for name in ("parameters", "provenance")}
    _check_header(out, out, theirs, header)
    return found


def _check_header(out: Path, where: Path, then: object, header: dict[str, Any]) -> None:
    """Compare the header of older work, in ``where`` (``out`` or its parts folder), with that of this run.

    Raises:
        ResumeError: They differ; says in what.
    """
    lines = differences(then, _as_json(header))
    if lines:
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        work = "finished" if where == out else "unfinished"
        raise ResumeError(
            f"{where} holds {work} work with other settings: {'; '.join(lines[:5])}{more}. "
            f"Use the same settings to continue it, choose another out than {out}, or remove {where} to "
            "start anew."
        )


def _as_json(header: dict[str, Any]) -> Any:
    """Return the header as JSON gives it back."""
    return json.loads(to_json(header, "header"))


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of unfinished work.

    Raises:
        StorageError: It is damaged, or an older npeff wrote it.
        NewerFileError: A newer npeff wrote it.
    """
    try:
        document = read_json(path, finite=False)
        version, header = item(document, "format_version", str(path), int), item(document, "header", str(path), dict)
        if version < PARTS_VERSION:
            raise StorageError(
                f"{path}: unfinished work of an older npeff (version {version}), which this one cannot read"
            )
    except StorageError as error:
        raise StorageError(f"{error}; remove {path.parent} to start anew") from error
    if version > PARTS_VERSION:
        raise NewerFileError(
            f"{path}: format version {version}, this npeff knows {PARTS_VERSION}: upgrade npeff to continue"
        )
    return header


def _refuse_links(folder: Path) -> None:
    """Refuse to go on from a folder in which something that is found again is no file; ``.tmp`` is removed unread.

    Raises:
        StorageError: There is such a thing.
    """
    for path in folder.iterdir():
        if path.suffix != ".tmp":
            refuse_link(path)


def discard_parts(out: Path) -> None:
    """Remove unfinished work for ``out``, if there is any and no process works on it.

    Raises:
        StorageError: Another process is at it, or the folder holds something else.
    """
    if parts_folder(out).exists():
        Parts(out, {}).remove()


def batches_in(container: Container) -> list[BatchRecord]:
    """Read digest and size of each batch that the examples of a file came in.

    Raises:
        StorageError: They are not those of the examples.
    """
    where = f"{container.path}: dataset 'batches'"
    batches = []
    for entry in container.json("batches", list):
        if len(expect(entry, where, list)) != 2:
            raise StorageError(f"{where} is damaged: expected a digest and a size per batch")
        batches.append((expect(entry[0], where, str), expect(entry[1], where, int)))
    n = container.spec("norms").shape[0]
    if sum(size for _, size in batches) != n or any(size < 0 for _, size in batches):
        raise StorageError(f"{where} is damaged: expected batches of {n} examples in all")
    return batches


def list_shards(folder: Path, n_parameters: int) -> list[Container]:
    """Open and check the shards of a folder, in order; rows that are no sketches have ``n_parameters`` columns.

    Raises:
        StorageError: One is missing or damaged.
        ForeignFileError: One is no shard.
    """
    shards: list[Container] = []
    sizes: Sizes = {"n_parameters": n_parameters}
    form = "dense"
    for index, path in enumerate(sorted(folder.glob("shard-*.h5"))):
        if path.name != f"shard-{index:06d}.h5":
            raise StorageError(
                f"{folder}: shard-{index:06d}.h5 is missing; remove {path.name} and those after it to resume before it"
            )
        try:
            shard = open_container(path)
            if shard.content != "shard":
                raise ForeignFileError(f"{path}: expected a shard, found an npeff file with content {shard.content!r}")
            if not shards and "rows/indptr" in shard.specs:
                form = "sparse"
            own = dict(sizes)
            rows = [field for field in ROWS[form] if field.name != "rows/indptr"]
            offsets = [OFFSETS, *(field for field in ROWS[form] if field.name == "rows/indptr")]
            check_shapes(path, shard.specs, [*offsets, *EXAMPLES, *rows], own)
            count_outputs(path, own, {"likelihood": "any"}, told_outputs(shard))  # labels are checked in the end
            shard.read([*offsets, *EXAMPLES], own, verify=True)  # checksums of rows are compared when they are merged
            sizes |= {name: own[name] for name in ("n_logits", "n_outputs", "n_columns") if name in own}
            batches_in(shard)
            shards.append(shard)
        except StorageError as error:
            raise type(error)(
                f"{error} (Or remove this shard and those after it: computing resumes before it.)"
            ) from error
    return shards


def describe_parts(out: Path) -> dict[str, Any]:
    """Describe unfinished work for ``out``, JSON-able; nothing is locked or changed."""
    folder = parts_folder(out)
    _refuse_links(folder)
    summary = dict(read_header(folder / "header.json")) if (folder / "header.json").exists() else {}
    parameters = described_parameters(summary.get("parameters", []), f"{folder / 'header.json'}: 'parameters'")
    shards = list_shards(folder, parameters.n_parameters)
    done = sum(shard.spec("norms").shape[0] for shard in shards)
    size = sum(shard.path.stat().st_size for shard in shards)
    about = {"path": str(folder), "bytes": size, "format": FORMAT, "content": "unfinished fishers"}
    return {**about, "shards": len(shards), "n_examples": done, "n_parameters": parameters.n_parameters, **summary}
