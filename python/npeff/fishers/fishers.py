"""Per-example Fishers as stored: rows, norms, predictions, and their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from npeff.errors import ArgumentError, DataError
from npeff.fishers.file_format import (
    EXAMPLES,
    KINDS,
    OFFSETS,
    ROWS,
    check_provenance,
    check_saved,
    check_sizes,
    coherent,
    count_outputs,
    described_parameters,
    example_arrays,
    example_fields,
    fisher_data,
    offsets_of,
    one_of,
    row_fields,
    told_outputs,
    write_fishers,
)
from npeff.fishers.logits import Logits, joined
from npeff.fishers.options import Sketch, sketch_of
from npeff.fishers.rows import Array, Kind, Rows, concatenate, entries_of, rows_from
from npeff.models.parameters import Parameters
from npeff.short_repr import short_repr
from npeff.storage.checks import Sizes, check_arrays, check_shapes, expect, refuse
from npeff.storage.container import Container, check_replaceable
from npeff.storage.files import atomic


@dataclass(frozen=True)
class FisherBlock:
    """The Fishers of one batch, on their way to memory or disk.

    Attributes:
        rows: The examples' rows, in order.
        row_counts: ``(b,)`` int64 rows per example.
        norms: ``(b,)`` float32 norms of the dense Fishers.
        logits: :class:`~npeff.fishers.logits.Logits` of the b examples, or an array ``(b, C)`` float32 of all.
        labels: ``(b,)`` int64, −1 where unknown.
        ids: ``(b,)`` int64 positions in the data.
        places: ``(b, 2)`` int64: sequence in the data and position in it, where examples are places; None elsewhere.
    """

    rows: Rows
    row_counts: Array
    norms: Array
    logits: Logits
    labels: Array
    ids: Array
    places: Array | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", Logits.of(self.logits))

    @classmethod
    def joined(cls, blocks: list[FisherBlock]) -> FisherBlock:
        """Join blocks, at least one, and put the examples in the order of their positions in the data."""
        if len(blocks) == 1:
            return blocks[0]
        offsets, arrays = offsets_of([b.row_counts for b in blocks]), joined([example_arrays(b) for b in blocks])
        rows, order = concatenate([block.rows for block in blocks]), np.argsort(arrays["ids"], kind="stable")
        if (np.diff(order) < 0).any():
            rows = rows.take(entries_of(order, offsets)[0])
        return cls(rows, np.diff(offsets)[order], **example_fields(arrays, order))

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by the names of their datasets in a file."""
        return {"row_offsets": offsets_of([self.row_counts]), **example_arrays(self), **self.rows.arrays()}


@dataclass(frozen=True, eq=False)
class Fishers:
    """Fishers of n examples: ``F_i = A_iᵀ A_i`` (low-rank) or the non-negative ``f_i = diag F_i`` (diagonal).

    Made by :func:`npeff.compute_fishers`; opened from a file by :func:`npeff.load`.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        rows: Rows of all A_i (or all f_i) end to end, unnormalised, as they were compressed.
        row_offsets: ``(n + 1,)`` int64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``.
        norms: ``(n,)`` float32 norms of the Fishers *before* compression: Frobenius ‖F_i‖_F, or ‖f_i‖₂.
        logits: Outputs of the model, :class:`~npeff.fishers.logits.Logits`: an array ``(n, C)`` float32, or, of more
            than 1,024 classes, the 32 largest of each example and what their probabilities need.
        labels: ``(n,)`` int64 true classes, −1 where unknown.
        ids: ``(n,)`` int64 positions of the examples in the data they were computed from.
        parameters: The parameters the columns stand for.
        places: ``(n, 2)`` int64, where examples are places in sequences: the sequence's number in the data and the
            position in it; None elsewhere.
        provenance: Model digest, options, versions: enough to compute the same again.
        coverage: Per parameter, the gradient rule that served it, and why.
        path: The file this was opened from, if any.
        check: Checks rows that were too large to be checked when the file was opened: some of them, or with None all,
            once; None where nothing is left to check.
    """

    kind: Kind
    rows: Rows
    row_offsets: Array
    norms: Array
    logits: Logits
    labels: Array
    ids: Array
    parameters: Parameters
    provenance: dict[str, Any] = field(default_factory=dict)
    coverage: list[dict[str, str]] = field(default_factory=list)
    path: Path | None = None
    check: Callable[[Rows | None], None] | None = field(default=None, repr=False)
    places: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", Logits.of(self.logits))
        n = len(self.row_offsets) - 1
        for name in ("norms", "logits", "labels", "ids", *(() if self.places is None else ("places",))):
            if len(getattr(self, name)) != n:
                raise ArgumentError(f"{name}: expected {n} examples as in row_offsets, got {len(getattr(self, name))}")
        if self.places is not None and np.shape(self.places) != (n, 2):
            raise ArgumentError(f"places: expected ({n}, 2), sequence and position, got {np.shape(self.places)}")
        if self.rows.n_rows != int(self.row_offsets[-1]):
            raise ArgumentError(
                f"rows: expected {int(self.row_offsets[-1])} rows as in row_offsets, got {self.rows.n_rows}"
            )

    def __getstate__(self) -> dict[str, Any]:
        self.verify()
        return {**self.__dict__, "check": None}

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def __repr__(self) -> str:
        size = f"{self.rows.n_rows} rows × {self.n_parameters:,} parameters"
        if self.sketch is not None:
            size += f", {self.sketch}"
        return f"Fishers({len(self)} examples, {self.kind}, {size}, {type(self.rows).__name__})"

    def verify(self) -> None:
        """Make sure that rows mapped from a large file are what was written, before all of them are used.

        Every number is read once and checked, and compared with the checksum in the file. ``decompose``, ``encode``,
        ``save`` and whatever else uses all rows call this; files up to 256 MiB were checked when they were opened.

        Raises:
            StorageError: The file is damaged.
        """
        if self.check is not None:
            self.check(None)

    def _checked(self, rows: Rows) -> Rows:
        if self.check is not None:
            self.check(rows)
        return rows

    @property
    def n_parameters(self) -> int:
        """Length of the flat parameter vector, m."""
        return self.parameters.n_parameters

    @property
    def sketch(self) -> Sketch | None:
        """The sketch that the rows were compressed by, or None."""
        return sketch_of(self.provenance)

    @property
    def block_weights(self) -> dict[str, float] | None:
        """The weight per parameter name that the Fishers were computed with; None when all are 1."""
        described = (self.provenance.get("options") or {}).get("block_weights")
        return None if described is None else dict(described["weights"])

    @property
    def in_parameter_space(self) -> bool:
        """Whether columns of the rows are parameters: those of sketches are not, and inner products have no rows."""
        return self.sketch is None and not self.rows.products_only

    @property
    def ranks(self) -> Array:
        """``(n,)`` int64 rows per example."""
        return np.diff(self.row_offsets)

    @property
    def predictions(self) -> Array:
        """``(n,)`` int64 arg-max of the logits."""
        return self.logits.predicted

    @property
    def zero(self) -> Array:
        """``(n,)`` bool: examples whose Fisher vanished (a perfectly confident prediction). Kept; coefficient 0."""
        return np.asarray(self.norms == 0)

    def dense(self, i: int) -> Array:
        """Return example i's rows as stored, unnormalised.

        Returns:
            float32 ``(rank_i, n_parameters)``, compressed entries scattered back to their place; ``(rank_i, d)``
            where rows are sketches; for the diagonal kind ``(n_parameters,)``.

        Raises:
            ArgumentError: ``i`` is not an example, or no rows are kept (``GramOnly``).
        """
        if self.rows.products_only:
            raise ArgumentError(
                "dense: these Fishers keep inner products alone (GramOnly); compute them with compress=None, TopK(k) "
                "or Sketch(d) to see rows"
            )
        if not isinstance(i, int | np.integer) or not -len(self) <= i < len(self):
            raise ArgumentError(f"i: expected an example below {len(self)}, got {i!r}")
        i %= len(self)
        start, stop = int(self.row_offsets[i]), int(self.row_offsets[i + 1])
        block = self._checked(self.rows.part(start, stop)).dense(0, stop - start)
        return block[0] if self.kind == "diagonal" else block

    def __getitem__(self, which: Any) -> Fishers:
        """A subset, in the given order: integers, a slice or a boolean mask over examples.

        Raises:
            ArgumentError: An example is not there, or ``which`` is no index.
        """
        which = np.asarray(which, np.int64) if isinstance(which, list) and not which else which
        try:
            examples = np.atleast_1d(np.arange(len(self))[which])
        except IndexError as error:
            expected = f"integers below {len(self)}, a slice or a mask"
            raise ArgumentError(f"fishers[…]: {error}; expected {expected}") from error
        rows, offsets = entries_of(examples, self.row_offsets)
        return replace(
            self,
            rows=self._checked(self.rows.take(rows)),
            row_offsets=offsets,
            path=None,
            check=None,
            **example_fields(example_arrays(self), examples),
        )

    def filter(self, *, wrong: bool | None = None) -> Fishers:
        """Keep the wrongly (``wrong=True``) or rightly (``False``) predicted examples.

        Raises:
            DataError: Labels are missing.
        """
        if wrong is None:
            return self
        if len(self) and (self.labels < 0).any():
            raise DataError(
                f"labels: {int((self.labels < 0).sum())} of {len(self)} examples have none; compute the "
                "Fishers from data with labels"
            )
        return self[(self.predictions != self.labels) == wrong]

    def save(self, path: str | Path) -> Path:
        """Write to an HDF5 file (:mod:`npeff.fishers.file_format` says what it holds).

        The file appears whole or not at all. An existing file is replaced only if it, too, holds npeff Fishers.

        Args:
            path: Where; the rows may themselves be mapped from there.

        Returns:
            ``path``.

        Raises:
            ArgumentError: An array holds what no Fishers have, such as NaN; says which.
            StorageError: The file cannot be written there; what was there is untouched.
        """
        path = check_replaceable(path, "fishers")
        header = {"kind": self.kind, "parameters": self.parameters.to_json(), "provenance": self.provenance}
        self.verify()
        arrays = {"row_offsets": self.row_offsets, **example_arrays(self), **self.rows.arrays()}
        data = fisher_data([arrays], self.rows.n_columns)
        known: Sizes = {
            "n_parameters": self.n_parameters,
            "n_logits": self.logits.values.shape[1],
            "n_rows": self.rows.n_rows,
        }
        count_outputs("fishers", known, self.provenance.get("options") or {}, self.logits.n_outputs)
        check_saved("fishers", arrays, [OFFSETS, *EXAMPLES, *row_fields(self.rows.form, self.kind)], known)
        with atomic(path) as scratch:
            write_fishers(scratch, header, self.coverage, None, data)
        return path


def fishers_in(container: Container, *, verify: bool = False) -> Fishers:
    """Read the Fishers in an npeff container, mapped; check all arrays but large ones.

    With ``verify`` large arrays are checked too; otherwise :meth:`npeff.Fishers.verify` does, before they are used.

    Raises:
        StorageError: An array is not as the format says, or its checksum differs.
    """
    kind = one_of(container, "attribute 'kind'", container.attribute("kind", str), KINDS)
    form = one_of(container, "attribute 'rows'", container.attribute("rows", str), ROWS)
    parameters = described_parameters(container.json("parameters", list), f"{container.path}: dataset 'parameters'")
    provenance = container.json("provenance", dict)
    options = check_provenance(container, provenance, "dataset 'provenance'")
    coverage = container.json("coverage", list)
    for line in coverage:
        expect(line, f"{container.path}: dataset 'coverage'", dict)
    sketch = sketch_of(provenance)
    sizes: Sizes = {"n_parameters": parameters.n_parameters}
    if form == "dense":
        sizes["n_columns"] = parameters.n_parameters if sketch is None else sketch.d
    fields = [OFFSETS, *EXAMPLES, *row_fields(form, kind)]
    check_shapes(container.path, container.specs, [*EXAMPLES, *row_fields(form, kind)], sizes)
    count_outputs(container.path, sizes, options, told_outputs(container))
    if kind == "diagonal":
        sizes["n_rows"] = sizes["n_examples"]
    check_sizes(container, sizes)
    arrays, check = container.read(fields, sizes, verify=verify)
    if kind == "diagonal" and not np.array_equal(arrays["row_offsets"], np.arange(sizes["n_examples"] + 1)):
        refuse(container.path, "row_offsets", "one row per example, as diagonal Fishers have")
    rows = rows_from(arrays, parameters.n_parameters)

    def check_part(part: Rows | None) -> None:
        if part is None:
            assert check is not None, "this is called only where something is left to check"
            check()
        else:
            known: Sizes = {name: size for name, size in sizes.items() if name in ("n_parameters", "n_columns")}
            check_arrays(container.path, part.arrays(), row_fields(form, kind), known)

    with coherent(container.path):
        return Fishers(
            kind=kind,  # type: ignore[arg-type]
            rows=rows,
            row_offsets=arrays["row_offsets"],
            **example_fields(arrays),
            parameters=parameters,
            provenance=provenance,
            coverage=coverage,
            path=container.path,
            check=None if check is None else check_part,
        )
