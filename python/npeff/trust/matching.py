"""Which component of one decomposition is which of another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.components.parameter_vectors import check_recovered
from npeff.errors import ArgumentError
from npeff.fishers.options import sketch_of

Array = npt.NDArray[Any]

COLUMNS = 1 << 16
"""Columns that are multiplied at a time, in float64."""


def similarity(a: Components, b: Components) -> Array:
    """|cos| between the vectors of two decompositions of the same parameters.

    The vectors are compared as they were factorised, on the columns that either kept; those of different sketches, or
    of inner products alone, as they were recovered in parameter space.

    Args:
        a: Components, ``r_a`` of them.
        b: Components of the same kind, parameters and block weights, ``r_b`` of them.

    Returns:
        ``(r_a, r_b)`` float64 in [0, 1].

    Raises:
        ArgumentError: Kind, parameters or block weights differ, or vectors have to be recovered first.
    """
    if a.kind != b.kind or a.parameters != b.parameters:
        raise ArgumentError(
            f"b: expected {a.kind} components of {a.n_parameters:,} parameters like a, got {b.kind} ones of "
            f"{b.n_parameters:,}; compare decompositions of the same Fishers or of parts of them"
        )
    va, vb = _comparable(a, b)
    if a.columns is not None or b.columns is not None:
        everything = np.arange(a.n_parameters)
        ca, cb = (everything if x.columns is None else np.asarray(x.columns) for x in (a, b))
        _, ia, ib = np.intersect1d(ca, cb, assume_unique=True, return_indices=True)
    else:
        ia = ib = np.arange(va.shape[1])
    products = np.zeros((len(va), len(vb)))
    for start in range(0, len(ia), COLUMNS):
        part = slice(start, start + COLUMNS)
        products += va[:, ia[part]].astype(np.float64) @ vb[:, ib[part]].astype(np.float64).T
    norms = np.outer(*(np.sqrt(np.einsum("ij,ij->i", v, v, dtype=np.float64)) for v in (va, vb)))
    return np.asarray(np.minimum(np.abs(products) / np.maximum(norms, 1e-30), 1.0))


def _comparable(a: Components, b: Components) -> tuple[Array, Array]:
    """The vectors of both in one space: as factorised, or recovered in parameter space.

    Raises:
        ArgumentError: They were factorised in different spaces, and were not all recovered.
    """
    elsewhere = [x.compression in ("sketch", "gram") for x in (a, b)]
    sketches = [sketch_of(x.provenance.get("fishers", {})) for x in (a, b)]
    if not any(elsewhere) or (sketches[0] is not None and sketches[0] == sketches[1]):
        return a.vectors, b.vectors
    for x in (a, b):
        check_recovered(x, range(x.n_components))
    found = [x.vectors if x.columns is not None else np.stack([x.vector(j) for j in range(len(x))]) for x in (a, b)]
    return found[0], found[1]


def match(a: Components, b: Components) -> tuple[Array, Array]:
    """The one-to-one matching of largest total |cos| (Hungarian algorithm).

    Args:
        a: Components, ``r_a`` of them.
        b: Components of the same parameters, ``r_b`` of them.

    Returns:
        ``(r_a,)`` int64 partner in b of each component of a, −1 where b has fewer, and ``(r_a,)`` float64 |cos| with
        it, 0 without a partner.

    Raises:
        ArgumentError: As :func:`similarity`.
    """
    return assigned(similarity(a, b))


def assigned(cosines: Array) -> tuple[Array, Array]:
    """As :func:`match`, from the ``(r_a, r_b)`` |cos|."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-cosines)
    partner = np.full(len(cosines), -1, np.int64)
    cosine = np.zeros(len(cosines))
    partner[rows], cosine[rows] = columns, cosines[rows, columns]
    return partner, cosine
