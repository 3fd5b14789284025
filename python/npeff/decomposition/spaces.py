"""Spaces of the components' vectors: each computes the products with the Fishers' rows that the solver needs.

A space holds the rows A of all examples, end to end, and represents r vectors G by *coordinates*:

- ``project(coords)`` → ``P = A Gᵀ``, ``(rows, r)``;
- ``combine(S)`` → coordinates of ``Sᵀ A``;
- ``inner(a, b, P_b)`` → ``G_a G_bᵀ``, where ``P_b = project(b)``;
- ``embed(vectors)`` → the coordinates of given vectors, ``(r, n_columns)``; ``vectors(coords)`` → G itself;
- ``random(r, generator)`` → coordinates of r random combinations of all rows: solutions lie in the row space.

``n_rows`` rows are this process's; a product with A reads ``step_bytes``; ``‖g‖²`` is at most ``norm_bound`` times
``‖coords‖²``, so that rounding of ``‖g‖²`` is of this order.

:class:`GramSpace` writes ``G = C A`` and keeps only ``K = A Aᵀ``: at every stationary point
``(WᵀW ∘ GGᵀ) G = (W∘AG)ᵀ A``, so G lies in the row space and nothing is lost. Its cost does not depend on the
number of parameters. :class:`RowSpace` keeps G over the kept columns, and the rows in memory, or leaves them on disk.

Several processes hold a block of rows each. P, W and S are then those of the process's rows; coordinates and inner
products are the same in every process, since :meth:`RowSpace.combine` adds up over the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from npeff.decomposition.processes import LOCAL, Processes, normal_columns
from npeff.fishers.rows import Rows
from npeff.fishers.scaling import DEVICE_PART_BYTES, ahead, device_combine, device_gram, device_project
from npeff.models import devices


class GramSpace:
    """G = C·A, with K = A Aᵀ in memory, ``(rows, rows)``; for one process.

    Vectors that do not lie in the row space (frozen components of an expansion) come in as ``anchors``:
    extra rows of A that belong to no example.

    Args:
        rows: The scaled rows, in memory or streamed, or their inner products.
        anchors: ``(f, n_columns)`` float32 further vectors that coordinates may use.
        dtype: float32 or float64, of K and of everything derived from it.
        device: Where K lives. Rows come to a CUDA device by blocks of columns; they never have to fit there.
        block_bytes: Bytes on that device for a block of columns.
    """

    name = "gram"
    comm: Processes = LOCAL

    def __init__(
        self,
        rows: Rows,
        anchors: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        block_bytes: int = DEVICE_PART_BYTES,
    ) -> None:
        self.device = device = torch.device(device)
        self._rows, self._block_bytes = rows, block_bytes
        self._anchors = None if anchors is None or not len(anchors) else anchors.to(dtype).cpu()
        self.n_rows = rows.n_rows
        self._to_device = None if rows.products_only or not devices.has_own_memory(device) else rows
        if self._to_device is None:
            own = rows.row_gram(dtype).to(device)
        else:
            own = device_gram(self._to_device, dtype, device, block_bytes)
        if self._anchors is not None:
            if self._to_device is None:
                across = rows.project(self._anchors).to(device)
            else:
                across = device_project(self._to_device, self._anchors, device, block_bytes)
            among = (self._anchors @ self._anchors.T).to(device)
            own = torch.cat([torch.cat([own, across], 1), torch.cat([across.T, among], 1)])
        self.K = own
        self.step_bytes = self.K.nbytes
        self.norm_bound = _largest_eigenvalue(own)

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Draw random combinations of all rows."""
        coords = torch.zeros(r, len(self.K), dtype=torch.float64)
        coords[:, : self.n_rows] = torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
        return coords.to(self.K)

    def embed(self, vectors: Tensor) -> Tensor:
        """Return the coordinates of the anchors, which ``vectors`` must be."""
        assert self._anchors is not None and vectors.shape == self._anchors.shape
        coords = torch.zeros(len(vectors), len(self.K), dtype=self.K.dtype, device=self.K.device)
        coords[:, self.n_rows :] = torch.eye(len(vectors))
        return coords

    def project(self, coords: Tensor) -> Tensor:
        """Compute ``K Cᵀ``; rows past ``n_rows`` are those of the anchors."""
        return self.K @ coords.T

    def combine(self, S: Tensor) -> Tensor:
        """Return ``Sᵀ``, with zeros for the anchors."""
        return torch.nn.functional.pad(S.T, (0, len(self.K) - self.n_rows))

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """Compute ``C_a K C_bᵀ``."""
        return a @ P_b

    def vectors(self, coords: Tensor) -> Tensor:
        """Compute ``C A`` in one pass over the rows.

        Where there are inner products alone: vectors ``(r, r)`` that have the same ones among each other.
        """
        if self._rows.products_only:
            values, basis = torch.linalg.eigh((coords @ self.K @ coords.T).double())
            return ((basis * values.clamp_min(0).sqrt()) @ basis.T).to(coords).cpu()
        own = coords[:, : self.n_rows].T.contiguous()
        if self._to_device is None:
            G = self._rows.combine(own)
        else:
            G = device_combine(self._to_device, own, self._block_bytes)
        coords = coords.cpu()
        return G if self._anchors is None else G + coords[:, self.n_rows :] @ self._anchors


class RowSpace:
    """Coordinates are G itself, ``(r, n_columns)``; making one is a collective operation: every process must do it.

    Streamed rows stay on disk: every product reads them once, part by part, under a ceiling of memory. Products are
    exact: a part contributes what it would in memory, and sums over parts are taken in order.

    Args:
        rows: The scaled rows of this process.
        dtype: float32 or float64 of G and P (sparse products accumulate in that dtype).
        device: Where coordinates live, and products take place.
        comm: The processes that hold the rows.
        stream: Leave the rows where they are; otherwise they are held in memory (CSR and its transpose, or dense).
    """

    norm_bound = 1.0

    def __init__(
        self,
        rows: Rows,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        comm: Processes = LOCAL,
        *,
        stream: bool = False,
    ) -> None:
        self.n_rows, self.n_columns = rows.n_rows, rows.n_columns
        self.dtype, self.device, self.comm = dtype, torch.device(device), comm
        self.step_bytes = 2 * rows.nbytes
        counts = comm.objects(rows.n_rows)
        self._first_row, self._all_rows = sum(counts[: comm.rank]), sum(counts)
        self.name = "streamed" if stream else "rows"
        if comm.size > 1:
            self.name = f"{self.name}, {comm.size} processes"
        self._rows, self._matrix = rows, None if stream else rows.on(dtype, self.device)

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Draw random combinations of the rows of all processes; the numbers do not depend on how many there are."""
        weights = normal_columns(r, self._first_row, self.n_rows, self._all_rows, generator)
        return self.combine(weights.to(self.device, self.dtype).T.contiguous())

    def embed(self, vectors: Tensor) -> Tensor:
        """Return the vectors."""
        return vectors.to(self.device, self.dtype)

    def project(self, coords: Tensor) -> Tensor:
        """Compute ``A Gᵀ`` for the rows of this process."""
        if self._matrix is not None:
            return self._matrix.project(coords)
        vectors = coords.T.contiguous().T  # transposed once, not for every part
        out = torch.empty(self.n_rows, len(coords), dtype=self.dtype, device=self.device)
        for start, stop, part in self._parts():
            out[start:stop] = part.project(vectors)
        return out

    def combine(self, S: Tensor) -> Tensor:
        """Compute ``Sᵀ A``, summed over the rows of all processes."""
        if self._matrix is not None:
            return self.comm.sum(self._matrix.combine(S))
        out = torch.zeros(S.shape[1], self.n_columns, dtype=self.dtype, device=self.device)
        for start, stop, part in self._parts():
            part.combine(S[start:stop], out)
        return self.comm.sum(out)

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """Compute ``G_a G_bᵀ``."""
        return a @ b.T

    def vectors(self, coords: Tensor) -> Tensor:
        """Return the coordinates."""
        return coords.cpu()

    def _parts(self) -> Iterator[tuple[int, int, Rows]]:
        """Read part by part; while a device works on one, a thread reads the next."""
        parts = self._rows.parts()
        return ahead(parts) if devices.has_own_memory(self.device) else parts


FactorSpace: TypeAlias = GramSpace | RowSpace
"""The solver's whole view of the data."""


def _largest_eigenvalue(K: Tensor, products: int = 5) -> float:
    """Estimate it for a positive semi-definite matrix, within a factor of two: power iteration from its row norms."""
    v = torch.linalg.vector_norm(K, dim=1)
    value = 0.0
    for _ in range(products):
        v = K @ (v / v.norm().clamp_min(1e-30))
        value = float(v.norm())
    return value
