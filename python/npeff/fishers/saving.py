"""Saving Fishers: one HDF5 container, which says by itself what it holds.

A file of Fishers has the root attributes ``format``, ``format_version``, ``content``, ``kind``, ``rows``
(``sparse``, ``dense`` or ``gram``), ``n_examples`` and ``n_parameters``, the JSON documents ``parameters`` (names and
shapes in order), ``provenance``, ``coverage``, ``batches`` (digest and size of each batch, when known) and
``checksums`` (CRC-32 of every dataset), and the arrays

=================  =============================  ==========================================================
``row_offsets``    int64 ``(n + 1,)``             example i owns rows ``row_offsets[i]:row_offsets[i+1]``
``norms``          float32 ``(n,)``               norms of the dense Fishers
``logits``         float32 ``(n, C)``             outputs of the model
``labels``         int64 ``(n,)``                 true classes, −1 where unknown
``ids``            int64 ``(n,)``                 positions in the data
``rows/indptr``    int64 ``(R + 1,)``             sparse rows: row j holds entries ``indptr[j]:indptr[j+1]``
``rows/indices``   int32 or int64 ``(nnz,)``      sparse rows: parameter index, ascending within a row
``rows/values``    float32 ``(nnz,)``, ``(R,m)``  the entries; the whole rows where dense, ``(R, d)`` of sketches
``rows/gram``      float32 ``(R, R)``             inner products of the rows, in place of them
=================  =============================  ==========================================================

Arrays lie contiguously, so they are mapped, not read, and any HDF5 reader can open them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npeff.fishers.rows import Rows, index_dtype
from npeff.models.parameters import Parameters
from npeff.storage.container import write_container
from npeff.storage.hdf5 import Data


def write_fishers(
    path: Path, header: dict[str, Any], coverage: object, batches: object, arrays: Sequence[Data]
) -> None:
    """Write the container of Fishers from streams.

    Args:
        path: A temporary name.
        header: ``kind``, ``parameters`` (JSON) and ``provenance``.
        coverage: As in :class:`npeff.fishers.fishers.Fishers`.
        batches: ``[digest, size]`` per batch, or None.
        arrays: The arrays in the order of the table above.
    """
    by_name = {item.name: item for item in arrays}
    parameters = Parameters.from_json(header["parameters"])
    texts = [Data.json(name, header[name]) for name in ("parameters", "provenance")] + [Data.json("coverage", coverage)]
    if batches is not None:
        texts.append(Data.json("batches", batches))
    attributes = {
        "kind": header["kind"],
        "rows": "sparse" if "rows/indptr" in by_name else "gram" if "rows/gram" in by_name else "dense",
        "n_examples": np.int64(by_name["norms"].shape[0]),
        "n_parameters": np.int64(parameters.n_parameters),
    }
    write_container(path, "fishers", [*texts, *arrays], attributes)


def row_data(rows: Rows) -> list[Data]:
    """The datasets of rows held in memory (or mapped)."""
    dtypes = {"rows/indptr": np.dtype(np.int64), "rows/indices": index_dtype(rows.n_columns)}
    return [Data.of(name, array, dtypes.get(name, np.dtype(np.float32))) for name, array in rows.arrays().items()]
