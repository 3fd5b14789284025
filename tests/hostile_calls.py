"""Hostile calls of the kernels: every function, native and public, with every kind of argument that it does not expect.

A case is a function with good arguments. ``spoilt`` replaces one of them (or several) by something hostile; ``outcome``
makes the call and says how it ended: refused with an error, or the result of the same call on clean copies, computed
by the plain implementation where there is one. ``python tests/hostile_calls.py first end seed`` makes calls number
first … end − 1 and prints one line each, for whoever watches from outside.
"""

from __future__ import annotations

import array
import copy
import ctypes
import math
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from npeff import kernels
from npeff.errors import NpeffError
from npeff.kernels import dispatch

try:
    from npeff import _native
except ImportError:
    _native = None  # type: ignore[assignment]

Arguments = dict[str, Any]
GUARD = 64
SIZES = ("n_rows", "n_columns", "d", "n", "k")
"""Numbers that memory is taken for."""
_guarded: list[np.ndarray] = []


@dataclass(frozen=True)
class Case:
    """A function with good arguments.

    Attributes:
        make: The arguments.
        call: Calls the function; returns what is to be compared.
        public: Whether it is of ``npeff.kernels``: refusals are then npeff's own errors, and the plain implementation
            gives the right result.
    """

    make: Callable[[np.random.Generator], Arguments]
    call: Callable[..., Any]
    public: bool


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def csr(rng: np.random.Generator, n_rows: int = 6, n_columns: int = 9) -> Arguments:
    filled = rng.random((n_rows, n_columns)) < 0.5
    filled[0, 0] = filled[-1, -1] = True
    indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
    indices = np.nonzero(filled)[1].astype(rng.choice([np.int32, np.int64]))
    return {"indptr": indptr, "indices": indices, "values": floats(rng, len(indices))}


def narrow(rng: np.random.Generator) -> Arguments:
    made = csr(rng)
    return {**made, "indices": made["indices"].astype(np.int32)}


def problem(rng: np.random.Generator, dtype: type = np.float32) -> Arguments:
    a = rng.standard_normal((8, 4))
    gram, cross = a.T @ a, rng.standard_normal((5, 4))
    return {"gram": gram.astype(dtype), "cross": cross.astype(dtype)}


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An output between guards."""
    size = math.prod(shape)
    whole = np.zeros(size + 2 * GUARD, dtype)
    whole[:GUARD] = whole[GUARD + size :] = 77
    _guarded.append(whole)
    return whole[GUARD : GUARD + size].reshape(shape)


def intact() -> bool:
    """Whether the guards around all outputs of :func:`zeros` are as they were."""
    return all((whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all() for whole in _guarded)


# ---- public functions


def _stream_topk(n_rows: Any, k: Any, block: Any, base: Any, rows: Any, order: Any) -> Any:
    stream = kernels.StreamingTopK(n_rows, k)
    stream.push(block, base, rows)
    stream.thresholds()
    return stream.finish(order)


def _stream_outer(n_rows: Any, k: Any, delta: Any, inputs: Any, first: Any, base: Any, column_stride: Any) -> Any:
    stream = kernels.StreamingTopK(n_rows, k)
    stream.push_outer(delta, inputs, first, base, column_stride)
    return stream.finish()


def _stream_sketch(n_rows: Any, d: Any, seed: Any, block: Any, base: Any, rows: Any) -> Any:
    stream = kernels.StreamingSketch(n_rows, d, seed)
    stream.push(block, base, rows)
    return stream.finish()


def _sketch_matrix(d: Any, block: Any, offset: Any, rows: Any, columns: Any, first: Any) -> Any:
    stream = kernels.StreamingSketch(4, d)
    stream.push_matrix(block, offset, (rows, columns), first)
    return stream.finish()


def _sketch_outer(d: Any, delta: Any, inputs: Any, offset: Any, rows: Any, columns: Any) -> Any:
    stream = kernels.StreamingSketch(4, d)
    stream.push_outer(delta, inputs, offset, (rows, columns), slice(0, 4))
    return stream.finish()


def _nnls(**arguments: Any) -> Any:
    result = kernels.nnls(**arguments)
    near = arguments.get("tol") is None or arguments["tol"] < 1e-3
    definite = np.linalg.eigvalsh(_numbers(arguments["gram"]).astype(np.float64))[0] > 1e-2
    return (result.w, result.kkt) if near and definite and bool(_same_as_transposed(arguments["gram"])) else None


def _numbers(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_neg()
        return np.asarray(x.float() if x.dtype == torch.bfloat16 else x)  # which numpy does not have
    return np.asarray(x)


def _same_as_transposed(gram: Any) -> bool:
    g = _numbers(gram)
    return bool(np.abs(g).max() < 1e4 and np.allclose(g, g.T))


def _convolution(delta0: Any, delta1: Any, **arguments: Any) -> Any:
    return kernels.convolution_gradients(delta=[delta0, delta1], **arguments)


def _threads(n: Any) -> Any:
    try:
        kernels.set_num_threads(n)
    finally:
        kernels.set_num_threads(1)
    return np.zeros(1)


def _use(implementation: Any) -> Any:
    before = kernels.implementation()
    try:
        kernels.use(implementation)
    finally:
        kernels.use(before)
    return np.zeros(1)


def _stream_arguments(rng: np.random.Generator) -> Arguments:
    return {
        "n_rows": 3,
        "k": 5,
        "block": floats(rng, 3, 40),
        "base": np.array([0, 100, 7]),
        "rows": np.array([2, 0, 1]),
        "order": "index",
    }


PUBLIC: dict[str, Case] = {
    "topk": Case(lambda g: {"x": floats(g, 4, 30), "k": 5, "order": "magnitude"}, kernels.topk, True),
    "StreamingTopK.push": Case(_stream_arguments, _stream_topk, True),
    "StreamingTopK.push_outer": Case(
        lambda g: {
            "n_rows": 4, "k": 6, "delta": floats(g, 3, 2, 5), "inputs": floats(g, 3, 7), "first": 1, "base": 10,
            "column_stride": 100,
        },
        _stream_outer, True,
    ),
    "StreamingSketch.push": Case(
        lambda g: {"n_rows": 3, "d": 32, "seed": 5, "block": floats(g, 3, 40), "base": np.array([0, 100, 7]),
                   "rows": np.array([2, 0, 1])},
        _stream_sketch, True,
    ),
    "StreamingSketch.push_matrix": Case(
        lambda g: {"d": 32, "block": floats(g, 4, 10), "offset": 3, "rows": 6, "columns": 5,
                   "first": np.array([0, 1, 2, 4])},
        _sketch_matrix, True,
    ),
    "StreamingSketch.push_outer": Case(
        lambda g: {"d": 32, "delta": floats(g, 2, 3, 2, 5), "inputs": floats(g, 2, 3, 7), "offset": 3, "rows": 5,
                   "columns": 7},
        _sketch_outer, True,
    ),
    "sketch": Case(
        lambda g: {"x": floats(g, 3, 30), "d": 32, "seed": 1, "base": 7, "nonzeros": 1}, kernels.sketch, True
    ),
    "sketch_csr": Case(lambda g: {**csr(g), "d": 32, "seed": 1, "nonzeros": 2}, kernels.sketch_csr, True),
    "spmm": Case(lambda g: {**csr(g), "dense": floats(g, 9, 5)}, kernels.spmm, True),
    "csr_transpose": Case(lambda g: {**csr(g), "n_columns": 9}, kernels.csr_transpose, True),
    "sparse_gram": Case(lambda g: {**csr(g), "n_columns": 9}, kernels.sparse_gram, True),
    "fisher_norms": Case(
        lambda g: {**csr(g), "n_columns": 9, "row_offsets": np.array([0, 2, 2, 6])}, kernels.fisher_norms, True
    ),
    "cross": Case(lambda g: {"p": floats(g, 6, 5), "row_offsets": np.array([0, 2, 2, 6])}, kernels.cross, True),
    "spread_multiply": Case(
        lambda g: {"w": floats(g, 3, 5), "p": floats(g, 6, 5), "row_offsets": np.array([0, 2, 2, 6])},
        kernels.spread_multiply, True,
    ),
    "nnls": Case(
        lambda g: {**problem(g), "w0": np.abs(floats(g, 5, 4)), "max_sweeps": 300, "tol": 1e-6, "exact": False,
                   "kkt": False},
        _nnls, True,
    ),
    "nnls exact": Case(
        lambda g: {**problem(g, np.float64), "max_sweeps": 50, "tol": 1e-8, "exact": True},
        _nnls, True,
    ),
    "outer_gram": Case(
        lambda g: {"delta": floats(g, 2, 3, 4, 5), "inputs": floats(g, 2, 3, 7), "n_slots": 2}, kernels.outer_gram, True
    ),
    "convolution_gradients": Case(
        lambda g: {
            "inputs": floats(g, 4, 2, 6, 6), "delta0": floats(g, 4, 4, 3, 3), "delta1": floats(g, 4, 4, 3, 3),
            "kernel": (2, 2), "stride": (1, 1), "dilation": (2, 2), "groups": 2, "turns": 2, "channels": (0, 2),
            "squared": False, "out": zeros(2, 2, 4, 1, 2, 2),
        },
        _convolution, True,
    ),
    "set_num_threads": Case(lambda g: {"n": 2}, _threads, True),
    "use": Case(lambda g: {"implementation": "base"}, _use, True),
}  # fmt: skip


# ---- native functions, whose outputs are arguments


def _native_cases() -> dict[str, Case]:
    assert _native is not None

    def filling(function: Callable[..., Any], *outputs: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            said = function(**arguments)
            return (*(arguments[name] for name in outputs), np.array(str(said)))

        return call

    def of_csr(function: Callable[..., Any], *outputs: str) -> Callable[..., Any]:
        def call(indptr: Any, indices: Any, values: Any, n_columns: Any, threads: Any, **arguments: Any) -> Any:
            parts = {"indptr": indptr, "indices": indices, "values": values, "n_columns": n_columns}
            a = _native.Csr(**parts, threads=threads)
            return filling(function, *outputs)(a=a, threads=threads, **arguments)

        def filled(**arguments: Any) -> Any:
            call(**arguments)
            return tuple(arguments[name] for name in outputs)

        return filled

    def selectors(n_rows: Any, k: Any, keep_zeros: Any, threads: Any, counts: Any, thresholds: Any,
                  **block: Any) -> Any:  # fmt: skip
        made = _native.Selectors(n_rows=n_rows, k=k, keep_zeros=keep_zeros)
        bad = made.push(**block, threads=threads)
        made.thresholds(thresholds=thresholds)
        made.finish(counts=counts, threads=threads)
        total = int(np.asarray(counts).sum())
        indices, values = np.zeros(total, np.int64), np.zeros(total, np.float32)
        made.take(indices=indices, values=values, by_magnitude=True, threads=threads)
        return indices, values, counts, thresholds, np.array(str(bad))

    def take(**arguments: Any) -> Any:
        made = _native.Selectors(n_rows=2, k=3, keep_zeros=False)
        block = {"block": np.arange(12, dtype=np.float32).reshape(2, 6), "bases": np.zeros(2, np.int64)}
        made.push(**block, order=np.arange(2), starts=np.arange(3), threads=1)
        made.finish(counts=np.zeros(2, np.int64), threads=1)
        made.take(**arguments)
        return arguments["indices"], arguments["values"]

    def outer(n_rows: Any, k: Any, keep_zeros: Any, counts: Any, threads: Any, **arguments: Any) -> Any:
        made = _native.Selectors(n_rows=n_rows, k=k, keep_zeros=keep_zeros)
        made.push_outer(**arguments, threads=threads)
        made.finish(counts=counts, threads=threads)
        return (counts,)

    def sorted_csr(rng: np.random.Generator) -> Arguments:
        return {**narrow(rng), "n_columns": 9, "threads": 2}

    def places(rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(0, 64, n).astype(np.int32)

    n = _native
    return {
        "_native.topk": Case(
            lambda g: {"x": floats(g, 4, 30), "indices": zeros(4, 5, dtype=np.int64), "values": zeros(4, 5),
                       "by_magnitude": True, "threads": 2},
            filling(n.topk, "indices", "values"), False,
        ),
        "_native.Selectors": Case(
            lambda g: {"n_rows": 3, "k": 5, "keep_zeros": False, "block": floats(g, 3, 40),
                       "bases": np.array([0, 100, 7]), "order": np.array([1, 2, 0]), "starts": np.arange(4),
                       "threads": 2, "counts": zeros(3, dtype=np.int64), "thresholds": zeros(3)},
            selectors, False,
        ),
        "_native.Selectors.take": Case(
            lambda g: {"indices": zeros(6, dtype=np.int64), "values": zeros(6), "by_magnitude": False, "threads": 2},
            take, False,
        ),
        "_native.Selectors.push_outer": Case(
            lambda g: {"n_rows": 4, "k": 6, "keep_zeros": True, "delta": floats(g, 3, 2, 5), "inputs": floats(g, 3, 7),
                       "first": 1, "base": 10, "column_stride": 100, "turned": True, "threads": 2,
                       "counts": zeros(4, dtype=np.int64)},
            outer, False,
        ),
        **{
            f"_native.nnls {dtype.__name__}": Case(
                lambda g, dtype=dtype: {  # type: ignore[misc]
                    **problem(g, dtype), "w": zeros(5, 4, dtype=dtype), "residual": np.full(5, np.inf, dtype),
                    "max_sweeps": 30,
                    "tol": 1e-5, "kkt": True, "status": zeros(2, dtype=np.int64), "threads": 2,
                },
                filling(n.nnls, "w", "residual", "status"), False,
            )
            for dtype in (np.float32, np.float64)
        },
        "_native.nnls_exact": Case(
            lambda g: {**problem(g, np.float64), "w": zeros(5, 4, dtype=np.float64),
                       "residual": zeros(5, dtype=np.float64),
                       "tol": 1e-9, "status": zeros(2, dtype=np.int64), "threads": 2},
            filling(n.nnls_exact, "w", "residual", "status"), False,
        ),
        "_native.spmm": Case(
            lambda g: {**csr(g), "n_columns": 9, "threads": 2, "dense": floats(g, 9, 5), "out": zeros(6, 5)},
            of_csr(n.spmm, "out"), False,
        ),
        "_native.csr_transpose": Case(
            lambda g: (lambda c: {**c, "indptr_out": zeros(10, dtype=np.int64),
                                  "indices_out": zeros(len(c["indices"]), dtype=np.int32),
                                  "values_out": zeros(len(c["indices"]))})(sorted_csr(g)),
            of_csr(n.csr_transpose, "indptr_out", "indices_out", "values_out"), False,
        ),
        "_native.sparse_gram": Case(
            lambda g: {**sorted_csr(g), "names": zeros(9, dtype=np.int32), "k": zeros(6, 6)},
            of_csr(n.sparse_gram, "names", "k"), False,
        ),
        "_native.to_dense": Case(
            lambda g: {**sorted_csr(g), "names": np.arange(9, dtype=np.int32) - 2, "first": 1, "out": zeros(6, 4)},
            of_csr(n.to_dense, "out"), False,
        ),
        "_native.fisher_norms": Case(
            lambda g: {**csr(g), "n_columns": 9, "threads": 2, "row_offsets": np.array([0, 2, 2, 6]),
                       "out": zeros(3, dtype=np.float64)},
            of_csr(n.fisher_norms, "out"), False,
        ),
        "_native.cross": Case(
            lambda g: {"p": floats(g, 6, 5), "row_offsets": np.array([0, 2, 2, 6]), "out": zeros(3, 5), "threads": 2},
            filling(n.cross, "out"), False,
        ),
        "_native.convolution_gradients": Case(
            lambda g: {"inputs": floats(g, 4, 2, 6, 6), "delta0": floats(g, 4, 4, 3, 3),
                       "delta1": floats(g, 4, 4, 3, 3),
                       "turns": 2, "groups": 2, "kernel": (2, 2), "stride": (1, 1), "dilation": (2, 2),
                       "channels": (0, 2), "squared": False, "out": zeros(2, 2, 4, 4), "threads": 2},
            lambda delta0, delta1, **rest: (
                n.convolution_gradients(delta=[delta0, delta1], **rest), rest["out"]
            )[1:],
            False,
        ),
        "_native.outer_gram": Case(
            lambda g: {"delta": floats(g, 2, 3, 4, 5), "input": floats(g, 2, 3, 7),
                       "gram": zeros(2, 4, 2, dtype=np.float64), "size": zeros(2, 2, dtype=np.float64), "threads": 2},
            filling(n.outer_gram, "gram", "size"), False,
        ),
        "_native.sketch_rows": Case(
            lambda g: {"block": floats(g, 3, 40), "bases": np.array([0, 100, 7]), "order": np.array([1, 2, 0]),
                       "starts": np.arange(4), "seed": 3, "copies": 2, "sums": zeros(3, 64, dtype=np.float64),
                       "threads": 2},
            filling(n.sketch_rows, "sums"), False,
        ),
        "_native.sketch_matrix": Case(
            lambda g: {"block": floats(g, 3, 10), "row_places": places(g, 6),
                       "column_places": places(g, 5), "order": np.arange(3), "starts": np.array([0, 1, 3]),
                       "first": np.array([0, 2, 4]), "weight": 1.5,
                       "sums": zeros(2, 32, dtype=np.float64), "threads": 2},
            filling(n.sketch_matrix, "sums"), False,
        ),
        "_native.sketch_outer": Case(
            lambda g: {"delta": floats(g, 2, 3, 2, 5), "input": floats(g, 2, 3, 7), "delta_places": places(g, 5),
                       "input_places": places(g, 7), "weight": 1.5, "sums": zeros(2, 2, 32, dtype=np.float64),
                       "threads": 2},
            filling(n.sketch_outer, "sums"), False,
        ),
        "_native.use_isa": Case(lambda g: {"name": "base"}, lambda name: np.array(str(n.has_isa(name))), False),
    }  # fmt: skip


CASES: dict[str, Case] = {**PUBLIC, **(_native_cases() if _native is not None else {})}


# ---- what arguments are replaced by

Spoiler = Callable[[Any, Arguments, np.random.Generator], Any]


class _Tagged(torch.Tensor):
    """A subclass whose memory is its own."""


class _Hollow(torch.Tensor):
    """A subclass without memory."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> _Hollow:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("there is nothing to compute with")


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def _misaligned(x: np.ndarray) -> np.ndarray:
    space = np.zeros(x.nbytes + x.itemsize, np.uint8)
    at = 1 if x.itemsize > 1 else 0
    shifted = space[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    return shifted


def _huge(x: np.ndarray, length: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(x, (length,) * max(1, x.ndim), (0,) * max(1, x.ndim))


def _set(x: np.ndarray, rng: np.random.Generator, value: Any) -> np.ndarray:
    y = np.array(x)
    if y.size:
        with np.errstate(all="ignore"):
            y.reshape(-1)[rng.integers(y.size)] = np.array(value).astype(y.dtype)
    return y


def _negated(x: np.ndarray) -> torch.Tensor:
    """The values of x in a tensor that notes their sign only."""
    return torch.complex(torch.zeros(x.shape), _tensor(x).float()).conj().imag.neg().to(torch.float32)


def _neg_view(x: np.ndarray) -> torch.Tensor:
    return torch._neg_view(_tensor(-x))


def _fake(x: np.ndarray) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(x.shape, dtype=_tensor(x).dtype)


def _alias(x: np.ndarray, arguments: Arguments, rng: np.random.Generator, shift: int) -> Any:
    """The memory of another argument, as an array of the same form, perhaps shifted."""
    others = [
        y for y in arguments.values() if isinstance(y, np.ndarray) and y is not x and y.nbytes >= x.nbytes + shift
    ]
    if not others:
        return x
    y = others[rng.integers(len(others))]
    flat = np.frombuffer(memoryview(np.ascontiguousarray(y) if not y.flags.c_contiguous else y).cast("B"), np.uint8)
    return flat[shift : shift + x.nbytes].view(x.dtype).reshape(x.shape)


ARRAYS: dict[str, Spoiler] = {
    "dtype float64": lambda x, a, g: x.astype(np.float64),
    "dtype float16": lambda x, a, g: x.astype(np.float16),
    "dtype int8": lambda x, a, g: x.astype(np.int8),
    "dtype uint64": lambda x, a, g: np.abs(x).astype(np.uint64),
    "dtype int32": lambda x, a, g: x.astype(np.int32),
    "dtype bool": lambda x, a, g: x.astype(bool),
    "dtype complex": lambda x, a, g: x.astype(np.complex64),
    "dtype long double": lambda x, a, g: x.astype(np.longdouble),
    "dtype object": lambda x, a, g: x.astype(object),
    "dtype text": lambda x, a, g: x.astype(str),
    "dtype time": lambda x, a, g: np.zeros(x.shape, "M8[s]"),
    "dtype without bytes": lambda x, a, g: np.zeros(x.shape, "V0"),
    "dtype compound": lambda x, a, g: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]),
    "other byte order": lambda x, a, g: x.astype(x.dtype.newbyteorder()),
    "one dimension more": lambda x, a, g: x[None],
    "five dimensions": lambda x, a, g: x.reshape((1,) * (5 - x.ndim) + x.shape) if x.ndim < 5 else x,
    "one dimension less": lambda x, a, g: x[0] if x.ndim and len(x) else x,
    "no dimension": lambda x, a, g: np.array(x.reshape(-1)[0] if x.size else 0, x.dtype),
    "transposed": lambda x, a, g: np.array(x.T).T,
    "every second": lambda x, a, g: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "rows apart": lambda x, a, g: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]] if x.ndim else x,
    "reversed": lambda x, a, g: np.array(x[::-1])[::-1] if x.ndim else x,
    "one row for all": lambda x, a, g: np.broadcast_to(x[:1], x.shape) if x.ndim and len(x) else x,
    "one value for all": lambda x, a, g: np.broadcast_to(x.reshape(-1)[:1], x.shape) if x.size else x,
    "rows that overlap": lambda x, a, g: (
        np.lib.stride_tricks.as_strided(np.resize(x, x.size), x.shape, (x.itemsize,) * x.ndim) if x.ndim == 2 else x
    ),
    "read-only": lambda x, a, g: np.frombuffer(np.ascontiguousarray(x).tobytes(), x.dtype).reshape(x.shape),
    "misaligned": lambda x, a, g: _misaligned(x),
    "misaligned tensor": lambda x, a, g: torch.from_numpy(_misaligned(x)),
    "empty": lambda x, a, g: x[:0],
    "empty in the last": lambda x, a, g: x[..., :0] if x.ndim else x,
    "longer": lambda x, a, g: np.concatenate([x, x]) if x.ndim else x,
    "shorter": lambda x, a, g: np.array(x[:-1]) if x.ndim else x,
    "wider": lambda x, a, g: np.concatenate([x, x], axis=-1) if x.ndim else x,
    "product 2^62": lambda x, a, g: _huge(x, 1 << (56 // max(1, x.ndim))),
    "empty and huge": lambda x, a, g: np.empty((0,) + (1 << 28,) * (x.ndim - 1), x.dtype) if x.ndim in (2, 3) else x,
    "value NaN": lambda x, a, g: _set(x, g, np.nan if x.dtype.kind == "f" else -1),
    "value inf": lambda x, a, g: _set(x, g, -np.inf if x.dtype.kind == "f" else 2**31 - 1),
    "value largest": lambda x, a, g: _set(x, g, 3e38 if x.dtype.kind == "f" else 2**63 - 1),
    "value smallest": lambda x, a, g: _set(x, g, 1e-45 if x.dtype.kind == "f" else -(2**63)),
    "value of 2^62": lambda x, a, g: _set(x, g, 1e30 if x.dtype.kind == "f" else 2**62),
    "values shuffled": lambda x, a, g: g.permutation(x.reshape(-1)).reshape(x.shape),
    "values alike": lambda x, a, g: np.full(x.shape, x.reshape(-1)[x.size // 2] if x.size else 0, x.dtype),
    "values random bits": lambda x, a, g: np.frombuffer(g.bytes(x.nbytes), x.dtype).reshape(x.shape).copy(),
    "two values swapped": lambda x, a, g: np.concatenate([x[1:2], x[:1], x[2:]]) if x.ndim and len(x) > 1 else x,
    "tensor": lambda x, a, g: _tensor(x),
    "tensor that requires gradients": lambda x, a, g: _tensor(x).float().requires_grad_(),
    "parameter": lambda x, a, g: torch.nn.Parameter(_tensor(x).float()),
    "inference tensor": lambda x, a, g: _inference(x),
    "negative bit": lambda x, a, g: _neg_view(x),
    "negative bit from conj": lambda x, a, g: torch.complex(_tensor(x).float(), _tensor(-x).float()).conj().imag,
    "conjugate bit": lambda x, a, g: torch.complex(_tensor(x).float(), _tensor(x).float()).conj(),
    "meta tensor": lambda x, a, g: torch.empty(x.shape, dtype=_tensor(x).dtype, device="meta"),
    "fake tensor": lambda x, a, g: _fake(x),
    "sparse tensor": lambda x, a, g: _tensor(x).to_sparse(),
    "sparse CSR tensor": lambda x, a, g: _tensor(x).to_sparse_csr() if x.ndim == 2 else _tensor(x).to_sparse(),
    "mkldnn tensor": lambda x, a, g: _tensor(x).float().to_mkldnn(),
    "quantised tensor": lambda x, a, g: torch.quantize_per_tensor(_tensor(x).float(), 0.1, 0, torch.qint8),
    "nested tensor": lambda x, a, g: torch.nested.nested_tensor(list(_tensor(x))) if x.ndim and len(x) else x,
    "jagged tensor": lambda x, a, g: (
        torch.nested.nested_tensor(list(_tensor(x)), layout=torch.jagged) if x.ndim > 1 and len(x) else x
    ),
    "bfloat16 tensor": lambda x, a, g: _tensor(x).to(torch.bfloat16),
    "subclass": lambda x, a, g: _tensor(x).as_subclass(_Tagged),
    "subclass without memory": lambda x, a, g: _Hollow(_tensor(x)),
    "expanded tensor": lambda x, a, g: _tensor(x)[:1].expand(x.shape) if x.ndim and len(x) else x,
    "expanded to 2^62": lambda x, a, g: (
        _tensor(x.reshape(-1)[:1]).reshape((1,) * x.ndim).expand((1 << (60 // x.ndim),) * x.ndim)
        if x.size and x.ndim
        else x
    ),
    "resized to nothing": lambda x, a, g: _emptied(x),
    "masked array": lambda x, a, g: np.ma.masked_array(x, mask=np.arange(x.size).reshape(x.shape) == 0),
    "matrix": lambda x, a, g: np.matrix(x) if x.ndim == 2 else x,
    "None": lambda x, a, g: None,
    "list": lambda x, a, g: x.tolist(),
    "number": lambda x, a, g: 3,
    "text": lambda x, a, g: "x",
    "bytes": lambda x, a, g: x.tobytes(),
    "bytearray": lambda x, a, g: bytearray(x.tobytes()),
    "memoryview": lambda x, a, g: memoryview(np.ascontiguousarray(x)),
    "ctypes array": lambda x, a, g: (ctypes.c_float * x.size)(*x.reshape(-1).astype(float)),
    "array.array": lambda x, a, g: array.array("f", x.reshape(-1).astype(float)),
    "class": lambda x, a, g: torch.Tensor,
    "function": lambda x, a, g: len,
    "another argument's memory": lambda x, a, g: _alias(x, a, g, 0),
    "another argument's memory, shifted": lambda x, a, g: _alias(x, a, g, x.itemsize),
}

NUMBERS: dict[str, Any] = {
    "-1": -1, "0": 0, "1": 1, "17": 17, "2^31 - 1": 2**31 - 1, "2^31": 2**31, "2^32": 2**32, "2^40": 2**40,
    "2^62": 2**62, "2^63 - 1": 2**63 - 1, "2^63": 2**63, "2^64 - 1": 2**64 - 1, "2^64": 2**64, "-2^63": -(2**63),
    "10^30": 10**30, "true": True, "1.5": 1.5, "NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "1e308": 1e308,
    "None ": None, "text ": "3", "list ": [1], "pair of 2^31": (2**31, 2**31), "pair of -1": (-1, 1),
    "triple": (1, 2, 3), "numpy number": np.int64(3), "numpy float": np.float32(2.5), "tensor number": torch.tensor(3),
    "array ": np.arange(3), "10^400": 10**400,
}  # fmt: skip


def _inference(x: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return _tensor(x) * 1


def _emptied(x: np.ndarray) -> torch.Tensor:
    t = _tensor(x)
    t.untyped_storage().resize_(0)
    return t


def kinds(name: str, value: Any) -> list[str]:
    """What a value can be replaced by."""
    frugal = "NPEFF_FUZZ_FRUGAL" in os.environ  # sanitised allocators end the process where others refuse
    if isinstance(value, np.ndarray):
        return [kind for kind in ARRAYS if not (frugal and kind in ("product 2^62", "expanded to 2^62"))]
    # Maps of 8 GB are made in a minute, and rightly.
    huge = {"2^31 - 1", "2^31", "2^32", "2^40"} if name in ("rows", "columns") or (frugal and name in SIZES) else set()
    return [kind for kind in NUMBERS if kind not in huge]


def spoilt(kind: str, name: str, arguments: Arguments, rng: np.random.Generator) -> Any:
    if kind in NUMBERS:
        return NUMBERS[kind]
    value = arguments[name]
    if not isinstance(value, np.ndarray):
        return value
    try:
        with np.errstate(all="ignore"):
            return ARRAYS[kind](value, arguments, rng)
    except Exception:  # numpy or torch do not make such an array
        return value


def plan() -> list[tuple[str, str, str]]:
    """Each function, each argument, each kind: (function, argument, kind)."""
    rng = np.random.default_rng(0)
    return [
        (function, name, kind)
        for function, case in CASES.items()
        for name, value in case.make(rng).items()
        for kind in kinds(name, value)
    ]


def hostile(number: int, seed: int) -> tuple[str, Arguments, str]:
    """Call number so-and-so: the function, its arguments, and what was done to them."""
    planned = plan_once()
    rng = np.random.default_rng([seed, number])
    if number < len(planned):
        function, name, kind = planned[number]
        arguments = CASES[function].make(rng)
        arguments[name] = spoilt(kind, name, arguments, rng)
        return function, arguments, kind
    function = str(rng.choice(list(CASES)))
    arguments = CASES[function].make(rng)
    good = dict(arguments)
    done = []
    for name in rng.choice(list(good), size=min(len(good), int(rng.integers(2, 4))), replace=False):
        kind = str(rng.choice(kinds(str(name), good[name])))
        arguments[str(name)] = spoilt(kind, str(name), good, rng)
        done.append(f"{name}: {kind}")
    return function, arguments, "several: " + "; ".join(done)


_planned: list[tuple[str, str, str]] = []


def plan_once() -> list[tuple[str, str, str]]:
    if not _planned:
        _planned.extend(plan())
    return _planned


# ---- what came of it


def clean(value: Any) -> Any:
    """The same values in fresh, plain memory: the ordinary argument that the hostile one stands for."""
    if isinstance(value, np.ndarray):
        return np.array(np.asarray(value), dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    if isinstance(value, torch.Tensor):
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            plain = value.detach().as_subclass(torch.Tensor)
            return plain.resolve_neg().clone().contiguous()
    return np.array(value) if isinstance(value, memoryview) else copy.deepcopy(value)


def same(got: Any, want: Any) -> bool:
    """Whether results agree, up to rounding in float32; where the right one is not finite, nor is this one."""
    if isinstance(got, tuple):
        return isinstance(want, tuple) and len(got) == len(want) and all(map(same, got, want))
    if got is None or want is None:
        return got is want
    a, b = (_numbers(x) for x in (got, want))
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fiu":
        return bool((a == b).all())
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    scale = np.abs(b[finite]).max(initial=0)
    if scale > 1e15:  # a value near the end of float32's range: sums of it overflow in one order and not in another
        return True
    return bool(np.allclose(a[finite], b[finite], rtol=2e-3, atol=2e-4 * max(1.0, scale)))


def outcome(number: int, seed: int = 0) -> tuple[str, str, str, str]:
    """The function, the kind of hostility, what came of it, and the error."""
    _guarded.clear()
    function, arguments, kind = hostile(number, seed)
    case = CASES[function]
    try:
        good = {name: clean(value) for name, value in arguments.items()}
        if isinstance(good.get("n_columns"), int) and good["n_columns"] > 1 << 20 and "csr_transpose" not in function:
            good["n_columns"] = 1 << 20  # the plain implementation takes memory for all of them
    except Exception:  # it stands for no values: only a refusal is right
        good = None
    try:
        got = case.call(**arguments)
    except NpeffError as error:
        return function, kind, "refused" if intact() else "wrong", f"{type(error).__name__}: {error}"
    except MemoryError as error:
        return function, kind, "no memory", f"{type(error).__name__}: {error}"
    except (TypeError, OverflowError) as error:
        known = not case.public or "unexpected keyword" in str(error)
        return function, kind, "refused by its type" if known else "other error", f"{type(error).__name__}: {error}"
    except Exception as error:
        return function, kind, "other error", f"{type(error).__name__}: {error}"
    if not intact():
        return function, kind, "wrong", "wrote beyond an output"
    if good is None:
        return function, kind, "wrong", "accepted what has no values"
    before = kernels.implementation()
    try:
        if case.public:
            kernels.use("reference")
        want = case.call(**good)
    except Exception as error:
        if _extreme(good):  # what overflows in one order of sums does not in another
            return function, kind, "right", ""
        return function, kind, "wrong", f"accepted, but its clean copy is refused: {type(error).__name__}: {error}"
    finally:
        kernels.use(before)
    return function, kind, "right" if same(got, want) or _extreme(good) else "wrong", ""


def _extreme(arguments: Arguments) -> bool:
    """Whether a value is so large that sums of products leave float32's range."""
    arrays = [_numbers(x) for x in arguments.values() if isinstance(x, np.ndarray | torch.Tensor)]
    return any(x.dtype.kind == "f" and x.size and np.nanmax(np.abs(x)) > 1e15 for x in arrays)


def main() -> None:
    first, end, seed = (int(x) for x in sys.argv[1:4])
    if len(sys.argv) > 4:  # bytes of address space: what asks for more is to get a MemoryError
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[4]),) * 2)
    kernels.set_num_threads(1 if dispatch.native() is None else 2)
    for number in range(first, end):
        print(f"start\t{number}", flush=True)
        print(
            "\t".join(("done", str(number), *(x.replace("\t", " ").replace("\n", " ") for x in outcome(number, seed)))),
            flush=True,
        )


if __name__ == "__main__":
    main()
