"""Where the components' vectors live: three verbs that the solver needs, and nothing else.

A space holds the rows A of all examples, end to end, and represents r vectors by *coordinates*:

- ``project(coords)`` → ``P = A Gᵀ``, ``(rows, r)``;
- ``combine(S)`` → coordinates of ``Sᵀ A``;
- ``inner(a, b, P_b)`` → ``G_a G_bᵀ``.

:class:`GramSpace` writes ``G = C A`` and keeps only ``K = A Aᵀ``: at every stationary point
``(WᵀW ∘ GGᵀ) G = (W∘AG)ᵀ A``, so G lies in the row space and nothing is lost. Its cost does not depend on the
number of parameters. :class:`SparseSpace` keeps the rows themselves and G over the kept columns;
:class:`~npeff.decomposition.sketch_space.SketchSpace` leaves them on disk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.fishers.rows import Rows
from npeff.fishers.streamed_rows import DEVICE_PART_BYTES, device_combine, device_gram, device_project
from npeff.models import devices


class FactorSpace(Protocol):
    """The solver's whole view of the data.

    Attributes:
        name: What reports call it.
        n_rows: Rows of A.
        step_bytes: What a product with A reads.
        stretch: The most that ``‖g‖²`` can be of ``‖coords‖²``: rounding of ``‖g‖²`` is of this order.
        device: Where coordinates live.
    """

    name: str
    n_rows: int
    step_bytes: int
    stretch: float
    device: torch.device

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Coordinates of r random vectors."""
        ...

    def embed(self, vectors: Tensor) -> Tensor:
        """Coordinates of given vectors ``(r, n_columns)``."""
        ...

    def project(self, coords: Tensor) -> Tensor:
        """``P = A Gᵀ``, ``(n_rows, r)``."""
        ...

    def combine(self, S: Tensor) -> Tensor:
        """Coordinates of ``Sᵀ A`` for S ``(n_rows, r)``."""
        ...

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``, ``(r_a, r_b)``, where ``P_b = project(b)``."""
        ...

    def vectors(self, coords: Tensor) -> Tensor:
        """G itself, ``(r, n_columns)``."""
        ...


class GramSpace:
    """G = C·A, with K = A Aᵀ in memory, ``(rows, rows)``.

    Vectors that do not lie in the row space (frozen components of an expansion) come in as ``anchors``:
    extra rows of A that belong to no example.

    Args:
        rows: The scaled rows, in memory or streamed, or their inner products.
        anchors: ``(f, n_columns)`` float32 further vectors that coordinates may use.
        dtype: float32 or float64, of K and of everything derived from it.
        device: Where K lives. Rows come to a CUDA device by stretches of columns; they never have to fit there.
        room: Bytes there for a stretch.
    """

    name = "gram"

    def __init__(
        self,
        rows: Rows,
        anchors: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        room: int = DEVICE_PART_BYTES,
    ) -> None:
        self.device = device = torch.device(device)
        self._rows, self._room = rows, room
        self._anchors = None if anchors is None or not len(anchors) else anchors.to(dtype).cpu()
        self.n_rows = rows.n_rows
        self._far = None if rows.products_only or not devices.has_own_memory(device) else rows
        own = rows.row_gram(dtype).to(device) if self._far is None else device_gram(self._far, dtype, device, room)
        if self._anchors is not None:
            if self._far is None:
                across = rows.project(self._anchors).to(device)
            else:
                across = device_project(self._far, self._anchors, device, room)
            among = (self._anchors @ self._anchors.T).to(device)
            own = torch.cat([torch.cat([own, across], 1), torch.cat([across.T, among], 1)])
        self.K = own
        self.step_bytes = self.K.nbytes
        self.stretch = _largest_eigenvalue(own)

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of all rows."""
        coords = torch.zeros(r, len(self.K), dtype=torch.float64)
        coords[:, : self.n_rows] = torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
        return coords.to(self.K)

    def embed(self, vectors: Tensor) -> Tensor:
        """Coordinates of the anchors, which ``vectors`` must be.

        Raises:
            ArgumentError: The space was built without these vectors as anchors.
        """
        if self._anchors is None or vectors.shape != self._anchors.shape:
            raise ArgumentError(
                "vectors: a GramSpace can only embed the anchors that it was built with; use SparseSpace"
            )
        coords = torch.zeros(len(vectors), len(self.K), dtype=self.K.dtype, device=self.K.device)
        coords[:, self.n_rows :] = torch.eye(len(vectors))
        return coords

    def project(self, coords: Tensor) -> Tensor:
        """``K Cᵀ``; rows past ``n_rows`` are those of the anchors."""
        return self.K @ coords.T

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ``, with zeros for the anchors."""
        return torch.nn.functional.pad(S.T, (0, len(self.K) - self.n_rows))

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``C_a K C_bᵀ``."""
        return a @ P_b

    def vectors(self, coords: Tensor) -> Tensor:
        """``C A``, one pass over the rows.

        Where there are inner products alone: vectors ``(r, r)`` that have the same ones among each other.
        """
        if self._rows.products_only:
            values, basis = torch.linalg.eigh((coords @ self.K @ coords.T).double())
            return ((basis * values.clamp_min(0).sqrt()) @ basis.T).to(coords).cpu()
        own = coords[:, : self.n_rows].T.contiguous()
        G = self._rows.combine(own) if self._far is None else device_combine(self._far, own, self._room)
        coords = coords.cpu()
        return G if self._anchors is None else G + coords[:, self.n_rows :] @ self._anchors


class SparseSpace:
    """The rows themselves (CSR and its transpose, or dense), coordinates = G ``(r, n_columns)``.

    Args:
        rows: The scaled rows.
        dtype: float32 or float64 of G and P (sparse products accumulate in that dtype).
        device: Where coordinates live.
    """

    name = "sparse"
    stretch = 1.0

    def __init__(self, rows: Rows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        self.n_rows, self.n_columns = rows.n_rows, rows.n_columns
        self.dtype, self.device = dtype, torch.device(device)
        self._rows = rows
        self.step_bytes = 2 * rows.nbytes
        self._matrix = rows.on(dtype, self.device)

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of all rows, as in the Gram space: the row space is where solutions lie."""
        return self.combine(
            torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
            .to(self.device, self.dtype)
            .T.contiguous()
        )

    def embed(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return vectors.to(self.device, self.dtype)

    def project(self, coords: Tensor) -> Tensor:
        """``A Gᵀ``."""
        return self._matrix.project(coords)

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``."""
        return self._matrix.combine(S)

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``."""
        return a @ b.T

    def vectors(self, coords: Tensor) -> Tensor:
        """The coordinates."""
        return coords.cpu()


def _largest_eigenvalue(K: Tensor, products: int = 5) -> float:
    """Of a positive semi-definite matrix, within a factor of two or so: power iteration from its row norms."""
    v = torch.linalg.vector_norm(K, dim=1)
    value = 0.0
    for _ in range(products):
        v = K @ (v / v.norm().clamp_min(1e-30))
        value = float(v.norm())
    return value
