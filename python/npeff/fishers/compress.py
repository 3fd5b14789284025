"""What of each example's rows is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from npeff.errors import ArgumentError, StorageError
from npeff.kernels.sketch import check_map
from npeff.models.memory import parse_bytes

SketchForm = Literal["flat", "kronecker"]


@dataclass(frozen=True)
class TopK:
    """Keep the k entries of largest magnitude over all rows of an example together (Matena & Raffel 2023).

    Exact; ties go to the lower (row, parameter) index; exact zeros are never kept.

    Attributes:
        k: Entries per example.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ArgumentError(f"k: expected an integer ≥ 1, got {self.k!r}")


@dataclass(frozen=True)
class Sketch:
    """Keep d random projections of every row: a sparse Johnson–Lindenstrauss transform, the same for all examples.

    Inner products of rows are kept up to noise of variance ``(‖x‖²‖y‖² + ⟨x, y⟩²) / d`` at most over seeds, whatever
    the number of parameters. Low-rank Fishers only: a projection of a non-negative diagonal is not non-negative. The
    seed and a parameter's index alone decide the transform; see :mod:`npeff.kernels.sketch`.

    Attributes:
        d: Numbers per row: a multiple of 16·nonzeros; for the Kronecker form a power of two.
        seed: Which transform.
        form: ``"flat"``: every parameter has a bucket of its own. ``"kronecker"``: in matrices of at least
            ``16·d`` elements the buckets of a row and of a column combine, so that the sketch of ``Σ_t δ_t ⊗ a_t``
            comes from sketches of δ and a, and large linear layers never form their gradients; the variance on such
            a layer is at most four times as large.
        nonzeros: Buckets per parameter; more cost time in proportion, and leave the variance as it is.
    """

    d: int
    seed: int = 0
    form: SketchForm = "flat"
    nonzeros: int = 1

    def __post_init__(self) -> None:
        check_map(self.d, self.seed, self.nonzeros)
        if self.form not in ("flat", "kronecker"):
            raise ArgumentError(f"form: expected 'flat' or 'kronecker', got {self.form!r}")
        if self.form == "kronecker" and self.d & (self.d - 1):
            raise ArgumentError(f"d: the Kronecker form needs a power of two, got {self.d}")

    def two_sided(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of that shape is sketched by its rows and columns."""
        return self.form == "kronecker" and len(shape) == 2 and math.prod(shape) >= 16 * self.d

    def describe(self) -> dict[str, Any]:
        """All that decides the transform, JSON-able."""
        return {"method": "sketch", "d": self.d, "seed": self.seed, "form": self.form, "nonzeros": self.nonzeros}


@dataclass(frozen=True)
class GramOnly:
    """Keep no rows at all: only ``K = A Aᵀ``, the inner products of all rows of all examples. Exact, uncompressed.

    K is built layer by layer from activations and output gradients; a layer used once per example adds the Hadamard
    product of two small Gram matrices. Memory for K is ``(Σ rank)²`` float32: up to some 10⁴ rows. Low-rank Fishers
    only; vectors in parameter space come from :meth:`npeff.Components.recover`.

    Attributes:
        memory: Bytes for what the layers keep of the examples before it becomes inner products (``"4GB"`` is as good
            as a number); less memory means more passes over the data.
    """

    memory: int | str = "2GB"

    def __post_init__(self) -> None:
        parse_bytes(self.memory)

    def describe(self) -> dict[str, Any]:
        """All that decides the result, JSON-able."""
        return {"method": "gram"}


Compression = TopK | Sketch | GramOnly


def sketch_of(provenance: Mapping[str, Any]) -> Sketch | None:
    """The sketch that Fishers of this provenance were compressed by, or None.

    Raises:
        StorageError: The provenance contradicts itself.
    """
    described = (provenance.get("options") or {}).get("compress") or {}
    if not isinstance(described, Mapping) or described.get("method") != "sketch":
        return None
    try:
        return Sketch(**{name: described[name] for name in ("d", "seed", "form", "nonzeros")})
    except (ArgumentError, KeyError) as error:
        raise StorageError(f"provenance: no sketch can be described by {described!r} ({error})") from error
