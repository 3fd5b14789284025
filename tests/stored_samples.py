"""Small Fishers made by arithmetic (no random numbers), for the storage tests and the kept files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from npeff.fishers.fishers import FisherBlock, Fishers
from npeff.fishers.logits import Logits
from npeff.fishers.rows import DenseRows, SparseRows
from npeff.models.parameters import Parameters

PARAMETERS = Parameters.of([("layer.weight", (3, 4)), ("layer.bias", (3,)), ("head", (2, 1))])
M = PARAMETERS.n_parameters
COVERAGE = [{"parameter": name, "rule": "linear", "reason": "§ nn.Linear"} for name in PARAMETERS.names]
PROVENANCE = {
    "model": {"digest": "00ff", "class": "Tiny"},
    "options": {"seed": 0, "compress": {"k": 9}},
    "min_prob": None,
}


def numbers(*shape: int, start: int = 1) -> np.ndarray:
    """Fixed float32 numbers in [−1.25, 1.25], exact in binary, none of them 0."""
    count = np.arange(start, start + int(np.prod(shape)))
    found = ((count * 37) % 23 - 11) / 8
    return np.where(found == 0, 1.25, found).astype(np.float32).reshape(shape)


def dense_rows(n_rows: int, keep: int = 3, positive: bool = False) -> np.ndarray:
    """``(n_rows, M)`` with about 1 in ``keep`` entries kept, the others 0; row 0 empty."""
    rows = numbers(n_rows, M)
    rows = np.abs(rows) if positive else rows
    rows[(np.arange(n_rows)[:, None] * 5 + np.arange(M) * 3) % keep != 0] = 0
    rows[:1] = 0
    return rows


def to_sparse(dense: np.ndarray) -> SparseRows:
    """The non-zero entries of ``dense`` as CSR."""
    row, column = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))]).astype(np.int64)
    return SparseRows(indptr, column.astype(np.int32), dense[row, column], dense.shape[1])


def fishers_of(kind: str = "low_rank", *, sparse: bool = True, ranks: tuple[int, ...] = (2, 1, 3, 0, 2, 2)) -> Fishers:
    """Fishers of ``len(ranks)`` examples."""
    ranks = (1,) * len(ranks) if kind == "diagonal" else ranks
    dense = dense_rows(sum(ranks), positive=kind == "diagonal")
    n = len(ranks)
    labels = np.arange(n, dtype=np.int64) % 3
    labels[-1:] = -1
    return Fishers(
        kind=kind,
        rows=to_sparse(dense) if sparse else DenseRows(dense),
        row_offsets=np.concatenate([[0], np.cumsum(ranks)]).astype(np.int64),
        norms=np.abs(numbers(n, start=5)),
        logits=numbers(n, 3, start=9),
        labels=labels,
        ids=np.arange(n, dtype=np.int64) * 2,
        parameters=PARAMETERS,
        provenance=PROVENANCE,
        coverage=COVERAGE,
    )


def placed_fishers(**options) -> Fishers:
    """The same at places, with 50 outputs, of which three are kept."""
    fishers = fishers_of(**options)
    n, values = len(fishers), -np.sort(-np.asarray(fishers.logits))
    classes = np.repeat(np.array([[0, 9, 18]], np.int32), n, 0)
    logits = Logits(values, classes, np.full(n, 4, np.float32), 50)
    return replace(fishers, logits=logits, places=np.stack([np.arange(n) // 2, np.arange(n)], 1))


def header_of(fishers: Fishers) -> dict:
    """The header that FisherWriter takes."""
    return {
        "kind": fishers.kind,
        "parameters": fishers.parameters.to_json(),
        "provenance": fishers.provenance,
    }


def blocks_of(fishers: Fishers, size: int) -> list[FisherBlock]:
    """The Fishers cut into batches of ``size`` examples."""
    parts = [fishers[start : start + size] for start in range(0, len(fishers), size)]
    return [FisherBlock(p.rows, p.ranks, p.norms, p.logits, p.labels, p.ids) for p in parts]


def assert_same(a: Fishers, b: Fishers, *, names: bool = True) -> None:
    """Every field equal, to the bit; ``names=False`` where the format knows no names and no provenance."""
    assert a.kind == b.kind and type(a.rows) is type(b.rows) and a.n_parameters == b.n_parameters
    assert a.logits.same(b.logits)
    for name in ("row_offsets", "norms", "labels", "ids", "places"):
        if (name != "ids" or names) and getattr(a, name) is not None:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name, strict=True)
    for name in ("indptr", "indices", "values") if isinstance(a.rows, SparseRows) else ("values",):
        np.testing.assert_array_equal(getattr(a.rows, name), getattr(b.rows, name), err_msg=name, strict=True)
    if names:
        assert a.parameters == b.parameters and a.provenance == b.provenance and a.coverage == b.coverage


def write_by_hand(path: Path, layout: str, fishers: Fishers | None = None) -> None:
    """Write a published layout with plain h5py, from its description: independent of npeff's own writer.

    ``layout`` is one of npeff's names, with ``:variant`` for older forms.
    """
    name, _, variant = layout.partition(":")
    options = {"chunks": True, "compression": "gzip"} if variant == "chunked" else {}
    with h5py.File(path, "w") as f:
        if name.endswith("decomposition"):
            _decomposition_by_hand(f, name, variant)
            return
        assert fishers is not None
        n = len(fishers)
        entries = [to_sparse(np.atleast_2d(fishers.dense(i))) for i in range(n)]
        k = max(len(e.values) for e in entries)
        values, indices = np.zeros((n, k), np.float32), np.zeros((n, k), np.int32)
        for i, e in enumerate(entries):
            assert len(e.values) == k, "the sample must have the same number of entries for every example"
            values[i], indices[i] = e.values, e.indices
        f["data/labels"] = fishers.labels.astype(np.int32)
        if name == "diagonal_fishers":
            f.create_dataset("data/fisher/values", data=values, **options)
            f["data/fisher/indices"] = indices
            f["data/fisher"].attrs["dense_fisher_size"] = fishers.n_parameters
            f["data/dense_fisher_norms"] = fishers.norms
            f["data/predicted_logits" if variant == "predicted" else "data/logits"] = fishers.logits
            return
        f.create_dataset("data/values", data=values, **options)
        f["data/row_indices"], f["data/logits"] = indices, fishers.logits
        f["data/pef_frobenius_norms"] = fishers.norms
        f["data"].attrs["n_parameters"] = np.int32(fishers.n_parameters)
        if name == "low_rank_fishers":
            offsets = np.stack([e.indptr for e in entries]).astype(np.int32)
            sizes = np.concatenate([np.zeros((n, 1), np.int32), np.diff(offsets, axis=1)], axis=1)
            f["data/col_offsets"] = sizes if variant == "first_generation" else offsets
            f["data"].attrs["n_classes"] = fishers.ranks[0]
        else:
            f["data/ranks"] = fishers.ranks.astype(np.int32)
            f["data/col_sizes"] = np.concatenate([np.diff(e.indptr) for e in entries]).astype(np.int32)
            f["data"].attrs["min_prob_class"] = np.float32(0.25)


W = np.abs(numbers(5, 2))
VECTORS = np.array([[3.0, 0, 4, 0], [0, 0, 0, 2]], np.float32)  # norms 5 and 2
COLUMNS = np.array([1, 4, 7, 16], np.int32)


def _decomposition_by_hand(f: h5py.File, name: str, variant: str) -> None:
    f["data/W"] = W
    if name == "low_rank_decomposition":
        f["data/G"], f["data/new_to_old_col_indices"] = VECTORS, COLUMNS
        f["data"].attrs["n_parameters"], f["data"].attrs["n_classes"] = M, 3
        f["losses/G_only"], f["losses/joint"] = np.array([9.0], np.float32), np.array([4.0, 2.0], np.float32)
        f["losses"].attrs["log_loss_frequency"] = 10
        return
    f["data/reduce_kept_indices"] = COLUMNS
    f["data/reduce_kept_indices"].attrs["full_dense_size"] = [M] if variant == "array" else M
    if variant == "sparse":
        sparse = to_sparse(VECTORS)
        f["data/H/values"], f["data/H/row_indices"] = sparse.values, sparse.indptr
        f["data/H/column_indices"] = sparse.indices
        f["data/H"].attrs["shape"] = VECTORS.shape
    else:
        f["data/H"] = VECTORS


def equal_entries(ranks: tuple[int, ...], kind: str = "low_rank", k: int = 6) -> Fishers:
    """Sparse Fishers whose examples all have k entries."""
    base = fishers_of(kind, ranks=ranks)
    blocks = []
    for i, rank in enumerate(base.ranks):
        flat = np.zeros(int(rank) * M, np.float32)
        where = np.sort((np.arange(k) * 7 + i * 3) % len(flat))
        flat[where] = np.abs(numbers(k, start=i + 1)) if kind == "diagonal" else numbers(k, start=i + 1)
        blocks.append(flat.reshape(int(rank), M))
    rows = to_sparse(np.concatenate(blocks))
    return Fishers(
        base.kind,
        rows,
        base.row_offsets,
        base.norms,
        base.logits,
        base.labels,
        np.arange(len(base)),
        base.parameters,
    )


def components_of(kind: str = "low_rank", *, columns: bool = True):
    """Components of five examples, two vectors."""
    from npeff.components.components import Components

    vectors = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    if not columns:
        vectors = np.eye(2, M, 3, dtype=np.float32)
    return Components(
        kind=kind,
        coefficients=W,
        vectors=vectors,
        columns=COLUMNS.astype(np.int64) if columns else None,
        block_weights={"layer.weight": 0.5} if columns else None,
        parameters=PARAMETERS,
        labels=np.array([0, 1, -1, 2, 0]),
        logits=numbers(5, 3),
        ids=np.arange(5),
        norms=np.abs(numbers(5, start=3)),
        loss_curve=np.array([0.5, 0.25]),
        loss=0.25,
        provenance={**PROVENANCE, "seed": 3},
    )


def placed_components():
    """The same of places, with 50 outputs, of which three are kept."""
    fishers = placed_fishers()[:5]
    return replace(components_of(), logits=fishers.logits, places=fishers.places)


def assert_same_components(a, b) -> None:
    """Every array equal, to the bit, and everything else."""
    arrays, others = a.to_arrays(), b.to_arrays()
    assert arrays.keys() == others.keys() and a.meta() == b.meta()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name, strict=True)
