"""The options of stage 1, checked: the three compressions, and one dataclass that carries all options through."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from npeff.errors import ArgumentError, StorageError, check_choice, check_integers, check_number
from npeff.fishers.block_weights import BlockWeights, check_block_weights
from npeff.fishers.rows import Kind
from npeff.kernels.sketch import check_map
from npeff.models.devices import parse_bytes
from npeff.models.forward import OVER_CLASSES
from npeff.models.parameters import Parameters

SketchForm = Literal["flat", "kronecker"]
Likelihood = Literal["categorical", "probabilities", "bernoulli", "gaussian"]
Basis = Literal["reduced", "class"]
Labels = Literal["expected", "sampled", "true"]
Forward = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class TopK:
    """Keep the k entries of largest magnitude over all rows of an example together (Matena & Raffel 2023).

    Exact; ties go to the lower (row, parameter) index; exact zeros are never kept.

    Attributes:
        k: Entries per example.
    """

    k: int

    def __post_init__(self) -> None:
        check_integers(self, {"k": 1})

    def describe(self, parameters: Parameters, most_rows: int) -> dict[str, Any]:
        """Describe the compression for the provenance, JSON-able; warn where ``k`` exceeds the entries there are."""
        possible = max(1, most_rows) * parameters.n_parameters
        if self.k > possible:
            warnings.warn(
                f"TopK(k={self.k}): an example has at most {possible} entries; all are kept, and nothing is lost",
                stacklevel=6,
            )
        return {"method": "topk", "k": self.k, "k_effective": min(self.k, possible)}


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
        check_integers(self, {"d": 1, "seed": 0, "nonzeros": 1})
        check_map(self.d, self.seed, self.nonzeros)
        check_choice("form", self.form, get_args(SketchForm))
        if self.form == "kronecker" and self.d & (self.d - 1):
            raise ArgumentError(f"d: the Kronecker form needs a power of two, got {self.d}")

    def two_sided(self, shape: Sequence[int]) -> bool:
        """Say whether a parameter of that shape is sketched by its rows and columns."""
        return self.form == "kronecker" and len(shape) == 2 and math.prod(shape) >= 16 * self.d

    def describe(self, parameters: Parameters, most_rows: int) -> dict[str, Any]:
        """Describe the transform for the provenance, JSON-able; warn where exact rows are no longer than sketches."""
        if self.d >= parameters.n_parameters:
            warnings.warn(
                f"Sketch(d={self.d}): the model has {parameters.n_parameters} parameters, so exact rows "
                "(compress=None) are no longer than sketches, and exact",
                stacklevel=6,
            )
        n_two_sided = sum(self.two_sided(p.shape) for p in parameters)
        return {"method": "sketch", **asdict(self), "two_sided_parameters": n_two_sided}


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

    def describe(self, parameters: Parameters, most_rows: int) -> dict[str, Any]:
        """Describe the compression for the provenance, JSON-able."""
        return {"method": "gram"}


Compression = TopK | Sketch | GramOnly

FACTOR_OPTIONS = (
    "basis",
    "rank",
    "energy",
    "min_prob",
    "max_classes",
    "labels",
    "n_samples",
    "likelihood",
    "seed",
)
"""The options that decide the cotangents of an example, in the order of the provenance."""


@dataclass(frozen=True)
class FisherOptions:
    """The keyword arguments of :func:`npeff.compute_fishers`, whose docstring says what each one means."""

    kind: Kind = "low_rank"
    compress: Compression | None = None
    basis: Basis = "reduced"
    rank: int | None = None
    energy: float | None = None
    min_prob: float | None = None
    max_classes: int | None = None
    labels: Labels = "expected"
    n_samples: int = 1
    likelihood: Likelihood = "categorical"
    parameters: str | Sequence[str] | None = None
    block_weights: BlockWeights = "energy"
    forward: Forward | None = None
    out: str | Path | None = None
    device: torch.device | str | None = None
    seed: int = 0
    max_examples: int | None = None
    share: tuple[int, int] | None = None
    memory: int | str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_integers(self, {"rank": 1, "max_classes": 1, "n_samples": 1, "seed": 0, "max_examples": 1})

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any]) -> FisherOptions:
        """Read the options that determined the cotangents of Fishers with this provenance; the others are defaults."""
        described = provenance.get("options", {})
        return cls(**{name: described[name] for name in FACTOR_OPTIONS})

    @property
    def over_classes(self) -> bool:
        """Whether the outputs stand for one distribution over classes; ``"probabilities"`` come as their logarithms."""
        return self.likelihood in OVER_CLASSES

    def check(self) -> None:
        """Refuse values that mean nothing, and options that do not go together.

        Raises:
            ArgumentError: Naming the option.
        """
        for name, kinds in (("kind", Kind), ("basis", Basis), ("labels", Labels), ("likelihood", Likelihood)):
            check_choice(name, getattr(self, name), get_args(kinds))
        for name in ("energy", "min_prob"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
            if value is not None and value > 1:
                raise ArgumentError(f"{name}: expected a number in (0, 1], got {value!r}")
        if self.seed >= 2**63:
            raise ArgumentError(f"seed: expected an integer below 2⁶³, got {self.seed}")
        check_block_weights(self.block_weights)
        self._check_factor()
        self._check_compression()
        if self.forward is not None and not callable(self.forward):
            raise ArgumentError(f"forward: expected callable(model, batch) -> logits, got {self.forward!r}")
        if self.out is not None and not isinstance(self.out, (str, os.PathLike)):
            raise ArgumentError(f"out: expected the path of a file, got {self.out!r}")
        if self.share is not None and not _is_share(self.share):
            raise ArgumentError(f"share: expected (k, n) with 0 ≤ k < n, got {self.share!r}")
        if self.share is not None and isinstance(self.compress, GramOnly):
            raise ArgumentError(
                "share: inner products of all examples cannot be computed in shares; compress otherwise"
            )
        if self.memory is not None:
            parse_bytes(self.memory)

    def _check_factor(self) -> None:
        exact = self.labels == "expected" and self.over_classes
        for name, basis, remedy in (
            ("rank", "reduced", "max_classes="),
            ("energy", "reduced", "min_prob="),
            ("min_prob", "class", "energy="),
            ("max_classes", "class", "rank="),
        ):
            if getattr(self, name) is None:
                continue
            if not exact:
                raise ArgumentError(f"{name}: truncates a categorical factor with labels='expected'; leave it out here")
            if self.basis != basis:
                raise ArgumentError(f"{name}: belongs to basis={basis!r}; with basis={self.basis!r} use {remedy}")
        if self.n_samples != 1 and self.labels != "sampled":
            raise ArgumentError(
                f"n_samples: counts the draws of labels='sampled'; got {self.n_samples} with labels={self.labels!r}"
            )

    def most_rows(self, n_outputs: int) -> int:
        """Return the most rows that an example can have with ``n_outputs`` logits."""
        if self.labels == "true":
            return 1
        if self.labels == "sampled":
            return self.n_samples
        if not self.over_classes:
            return n_outputs
        if self.basis == "class":
            return min(n_outputs, self.max_classes or n_outputs)
        return min(n_outputs - 1, self.rank or n_outputs)

    def _check_compression(self) -> None:
        if self.compress is not None and not isinstance(self.compress, Compression):
            raise ArgumentError(f"compress: expected TopK(k), Sketch(d), GramOnly() or None, got {self.compress!r}")
        if self.kind == "diagonal" and isinstance(self.compress, Sketch):
            raise ArgumentError(
                "compress: a sketch adds entries with random signs, so sketches of diagonal Fishers are not "
                "non-negative and cannot be factorised as such; use TopK(k) or None, or kind='low_rank'"
            )
        if self.kind == "diagonal" and isinstance(self.compress, GramOnly):
            raise ArgumentError(
                "compress: non-negative factors of diagonal Fishers need the rows themselves, not their inner "
                "products; use TopK(k) or None, or kind='low_rank'"
            )

    def cheapest(self) -> FisherOptions:
        """Return the options that give the same Fishers by the fewest backward passes.

        diag(AᵀA) is the same in every basis, and the reduced one has a column less than that of all classes.
        """
        all_classes = self.basis == "class" and self.min_prob is None and self.max_classes is None
        return replace(self, basis="reduced") if self.kind == "diagonal" and all_classes else self

    def describe(self, parameters: Parameters, n_outputs: int) -> dict[str, Any]:
        """Describe all options that decide the result, for the provenance; JSON-able."""
        described: dict[str, Any] = {"kind": self.kind, **{name: getattr(self, name) for name in FACTOR_OPTIONS}}
        described["max_examples"] = self.max_examples
        patterns = self.parameters
        described["parameters"] = [patterns] if isinstance(patterns, str) else None if patterns is None else [*patterns]
        if self.share is not None:
            described["share"] = [int(part) for part in self.share]
        most_rows = 1 if self.kind == "diagonal" else self.most_rows(n_outputs)
        described["compress"] = None if self.compress is None else self.compress.describe(parameters, most_rows)
        return described


def _is_share(share: Any) -> bool:
    if not isinstance(share, tuple | list) or len(share) != 2:
        return False
    whole = all(isinstance(part, Integral) and not isinstance(part, bool) for part in share)
    return whole and 0 <= share[0] < share[1]


def sketch_of(provenance: Mapping[str, Any]) -> Sketch | None:
    """Return the sketch by which Fishers of this provenance were compressed, or None.

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
