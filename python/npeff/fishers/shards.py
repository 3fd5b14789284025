"""Write Fishers while they are computed: a kill loses at most the batches since the last shard."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from npeff.errors import DataError, NpeffError, ResumeError, StorageError
from npeff.fishers.file_format import example_arrays, example_fields, offsets_of
from npeff.fishers.fishers import FisherBlock, Fishers, fishers_in
from npeff.fishers.logits import ARRAYS, Logits, joined
from npeff.fishers.parts import BatchRecord, Parts, batches_in, find_finished, parts_folder, read_header
from npeff.fishers.rows import Array, GrowingRows
from npeff.models.parameters import Parameters
from npeff.storage.container import open_container
from npeff.storage.files import check_target
from npeff.storage.writing import to_json


class FisherWriter:
    """Takes the Fishers of batch after batch; keeps them in memory, or in shards that become one file.

    Use as a context manager, and for every batch, in order, call :meth:`skip` and, unless it says True,
    :meth:`append`::

        with FisherWriter(out, header) as writer:
            for batch in data:
                if not writer.skip(digest(batch), len(batch)):
                    writer.append(compute(batch), digest(batch))
            fishers = writer.finish(coverage)

    The shards live in ``<out>.parts/`` until :meth:`finish` has merged them. The bytes of the final file
    depend on what was appended alone: not on where shards ended, nor on how often the work was interrupted.
    Leaving the context by an exception (Ctrl-C and SIGTERM too) first writes the open shard.

    Attributes:
        finished: The Fishers, when ``out`` was complete, with the same header, before this run: nothing is
            left to do. :meth:`skip` still compares batches with those it was computed from, and
            :meth:`finish` returns it.
        examples_done: Examples found or appended so far.
    """

    def __init__(
        self,
        out: Path | str | None,
        header: dict[str, Any],
        *,
        shard_bytes: int = 64 << 20,
        shard_seconds: float = 15.0,
        validate: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the output, its unfinished work if there is any, and lock it.

        Args:
            out: The file to make; None keeps everything in memory.
            header: ``kind``, ``parameters`` and ``provenance``: all that decides the results; work on disk is continued
                only if its header is equal.
            shard_bytes: A shard is closed once it holds this much,
            shard_seconds: or once this long has passed since its first batch.
            validate: Called before a shard is written; raises ``ModelError`` when what was appended since the
                last one cannot be trusted: it is dropped.

        Raises:
            StorageError: ``out`` cannot be written, holds something else, or another process is writing it.
            ResumeError: What is there was made with another header; says what differs.
        """
        to_json(header, "header")
        self.header = header
        self.finished: Fishers | None = None
        self.examples_done = 0
        self._out = None if out is None else Path(out)
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._validate = validate
        self._done: list[BatchRecord] = []
        self._cursor = 0
        self._blocks: list[FisherBlock] = []  # of the open shard
        self._batches: list[BatchRecord] = []
        self._bytes, self._since = 0, 0.0
        self._rows, self._others = GrowingRows(), list[dict[str, Array]]()  # without a file
        self._failed = False
        self._appending = threading.Lock()  # a signal may close the writer while a thread appends to it
        self._parts = None if self._out is None else self._open(self._out)

    def _open(self, out: Path) -> Parts | None:
        check_target(out)
        if self._find_finished(out) and not parts_folder(out).exists():
            return None
        try:
            parts = Parts(out, self.header)
        except StorageError:
            if self.finished is not None:
                return None
            raise
        try:
            if self._find_finished(out):  # now that no other process can be writing it
                parts.clear()
                return None
            parts.resume()
            self._done = list(parts.batches)
        except BaseException:
            parts.lock.release(folder=True)
            raise
        self.examples_done = sum(size for _, size in self._done)
        return parts

    def _find_finished(self, out: Path) -> bool:
        container = find_finished(out, self.header)
        if container is None:
            return False
        self.finished = fishers_in(container)
        self.examples_done = len(self.finished)
        self._done = batches_in(container) if "batches" in container.specs else []
        return True

    @property
    def _where(self) -> Path | None:
        """The file or folder of the work done so far."""
        return self._parts.folder if self._parts else self._out

    def __enter__(self) -> FisherWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def skip(self, batch_digest: str, n_examples: int) -> bool:
        """Say whether the next batch, of this digest and size, is done; otherwise compute it and :meth:`append`.

        Raises:
            ResumeError: The batch done at this place was another one.
        """
        if self.finished is not None and not self._done:
            return True  # saved by hand: nothing to compare with
        if self._cursor >= len(self._done):
            if self.finished is None:
                return False
            raise ResumeError(
                f"the data goes on after the {len(self._done)} batches that {self._out} was computed from: "
                "it is not the same data. "
                f"Give the same data, choose another out, or remove {self._out} to start anew."
            )
        digest, size = self._done[self._cursor]
        if (digest, size) != (batch_digest, n_examples):
            what = f"{size} examples then, {n_examples} now" if size != n_examples else "its contents differ"
            raise ResumeError(
                f"batch {self._cursor} is not the one that was computed before ({what}): the data, its order "
                "or the batch size changed. "
                f"Give the same data in the same order (no shuffling), choose another out than {self._out}, "
                f"or remove {self._where} to start anew."
            )
        self._cursor += 1
        return True

    def stored_logits(self, n_examples: int) -> Logits | None:
        """Return the logits of the first examples, if earlier work on the same batches is on the disk."""
        if not self._done:
            return None
        if self.finished is not None:
            return self.finished.logits.take(slice(n_examples))
        assert self._parts is not None, "what is done and not finished is in shards"
        first = self._parts.shards[0]
        return Logits.from_arrays({name: first.array(name) for name in ARRAYS if name in first.specs}).take(
            slice(n_examples)
        )

    def append(self, block: FisherBlock, batch_digest: str) -> None:
        """Add the Fishers of the next batch. Their arrays are kept until a shard is written: do not reuse them.

        Raises:
            ResumeError: Batches that are done already were not skipped.
            DataError: A Fisher's norm is not finite.
            StorageError: The disk is full; finished shards are safe.
        """
        if self.finished is not None or self._cursor < len(self._done):
            raise ResumeError(f"batch {self._cursor} is done already: call skip() for each batch first, in order")
        if not np.isfinite(block.norms).all():
            i = int(np.isfinite(block.norms).argmin())
            raise DataError(
                f"gradients: the Fisher of example {block.ids[i]} has the norm {block.norms[i]}, beyond what float32 "
                "holds; scale the inputs, or leave the example out of the data"
            )
        with self._appending:
            self._append(block, batch_digest)

    def _append(self, block: FisherBlock, batch_digest: str) -> None:
        self.examples_done += len(block.norms)
        if self._parts is None:
            self._rows.add(block.rows)
            self._others.append({"row_counts": block.row_counts, **example_arrays(block)})
            return
        self._since = self._since if self._blocks else time.monotonic()
        self._blocks.append(block)
        self._batches.append((batch_digest, len(block.norms)))
        self._bytes += block.rows.nbytes + block.logits.nbytes
        if self._bytes >= self._shard_bytes or time.monotonic() - self._since >= self._shard_seconds:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._parts is None or not self._blocks:
            return
        try:
            self._validate()
            self._parts.write_shard(self._blocks, self._batches)
        except Exception:
            self._failed = True
            raise
        self._blocks, self._batches, self._bytes = [], [], 0

    def finish(self, coverage: Any = ()) -> Fishers:
        """Make the final file out of the shards, put it in place, and remove the shards; return the Fishers.

        Raises:
            DataError: Nothing was appended.
            ResumeError: The data ended before the batches that are done already.
            StorageError: The disk is full, or another file has appeared at ``out``; the shards are safe.
        """
        if self._cursor < len(self._done) and (self.finished is None or self._cursor > 0):
            raise ResumeError(
                f"the data ended after {self._cursor} batches, but {len(self._done)} were computed before: "
                "it is not the same data. "
                f"Give the same data, choose another out than {self._out}, or remove {self._where} to start "
                "anew."
            )
        if self.finished is not None:
            return self.finished
        if self.examples_done == 0:
            raise DataError("data: expected at least one example, got none")
        if self._parts is None:
            self.finished = self._in_memory([*coverage])
            return self.finished
        assert self._out is not None, "parts exist only for an output file"
        self._close_shard()
        if self._out.exists():
            raise StorageError(
                f"{self._out}: a file appeared there during the work, and is not overwritten; move it away "
                f"and run the same command again: all {self.examples_done} examples are in {self._where}"
            )
        self._parts.merge([*coverage])
        self._parts.remove()
        self._parts = None
        self.finished = fishers_in(open_container(self._out))
        return self.finished

    def _in_memory(self, coverage: Any) -> Fishers:
        arrays = joined(self._others)
        return Fishers(
            kind=self.header["kind"],
            rows=self._rows.finish(),
            row_offsets=offsets_of([arrays["row_counts"]]),
            **example_fields(arrays),
            parameters=Parameters.from_json(self.header["parameters"]),
            provenance=self.header["provenance"],
            coverage=coverage,
        )

    def close(self) -> None:
        """Write the open shard if that is possible, and unlock; called on leaving the context. Idempotent."""
        with self._appending:
            self._close()

    def _close(self) -> None:
        if self._parts is None:
            return
        if not self._failed:
            with contextlib.suppress(NpeffError):  # another error is on its way, or nothing can be kept
                self._close_shard()
        parts, self._parts = self._parts, None
        if parts.shards:
            parts.lock.release()
        else:
            parts.remove()


def begun_block_weights(out: Path) -> dict[str, float] | None:
    """Read the block weights of work at ``out``, finished or not; None where it has none, or nothing can be read."""
    with contextlib.suppress(StorageError, LookupError, TypeError, ValueError):
        if out.exists():
            provenance = open_container(out).json("provenance", dict)
        else:
            provenance = read_header(parts_folder(out) / "header.json")["provenance"]
        return {name: float(weight) for name, weight in provenance["options"]["block_weights"]["weights"].items()}
    return None
