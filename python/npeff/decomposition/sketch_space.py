"""Rows that stay on disk: every product streams them once, part by part, under a ceiling of memory.

Made for sketches, ``(Σ rank, d)`` numbers that outgrow memory with the number of examples; any stored rows will do.
Coordinates are G itself, ``(r, n_columns)``. Products are exact: a part contributes what it would in memory, and sums
over parts are taken in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from npeff.fishers.rows import DenseRows, SparseRows
from npeff.fishers.streamed_rows import StreamedRows, ahead
from npeff.models import devices


class SketchSpace:
    """The rows as they are stored, scaled while they are read.

    Args:
        rows: The rows, and how much of them a pass takes at a time.
        dtype: float32 or float64 of G and P.
        device: Where coordinates live, and products take place.
    """

    name = "sketch"
    stretch = 1.0

    def __init__(
        self, rows: StreamedRows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.rows, self.dtype, self.device = rows, dtype, torch.device(device)
        self.n_rows, self.n_columns = rows.n_rows, rows.n_columns
        self.step_bytes = 2 * rows.nbytes

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of all rows."""
        weights = torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
        return self.combine(weights.to(self.device, self.dtype).T)

    def embed(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return vectors.to(self.device, self.dtype)

    def project(self, coords: Tensor) -> Tensor:
        """``A Gᵀ``, one pass."""
        vectors = coords.T.contiguous().T  # transposed once, not for every part
        out = torch.empty(self.n_rows, len(coords), dtype=self.dtype, device=self.device)
        for start, stop, part in self._parts():
            out[start:stop] = part.project(vectors)
        return out

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``, one pass."""
        out = torch.zeros(S.shape[1], self.n_columns, dtype=self.dtype, device=self.device)
        for start, stop, part in self._parts():
            part.combine(S[start:stop], out)
        return out

    def _parts(self) -> Iterator[tuple[int, int, SparseRows | DenseRows]]:
        """Part by part; while a device works on one, a thread reads the next."""
        parts = self.rows.parts()
        return ahead(parts) if devices.has_own_memory(self.device) else parts

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``."""
        return a @ b.T

    def vectors(self, coords: Tensor) -> Tensor:
        """The coordinates."""
        return coords.cpu()
