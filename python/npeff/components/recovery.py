"""Recover vectors in parameter space where Fishers were kept as sketches or as inner products alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.batches.reading import check_data, check_sampler
from npeff.components.factored import assemble, scale_factored, slots, squared_norm
from npeff.components.factorisation import Factorisation
from npeff.components.row_sums import RowSums
from npeff.errors import ArgumentError, DataError, ModelError, check_integer
from npeff.fishers.block_weights import column_factors
from npeff.fishers.factors import Factors
from npeff.fishers.options import FisherOptions, Sketch, sketch_of
from npeff.fishers.passes import Run
from npeff.gradients.eligibility import differ, placed, select_parameters
from npeff.kernels import StreamingSketch
from npeff.language.places import check_places
from npeff.models.devices import available_bytes, format_bytes
from npeff.models.parameters import Parameters, model_digest

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Factorisation)


def recover(
    components: F,
    model: nn.Module,
    data: Iterable[Any],
    js: Sequence[int] | None = None,
    *,
    rank: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> F:
    """Take one more pass over the data; see :meth:`npeff.Components.recover`.

    ``g_j = Σ_i Σ_row c_row,j S_i,rowᵀ J_i``, the sum of all examples' rows with weights per component
    (:mod:`npeff.components.row_sums`). With fewer components than rows, the backward passes are those of the combined
    cotangents ``Σ_row c_row,j S_i,row``. S comes from the logits as they were, so that batches may be cut anew.

    Raises:
        ArgumentError: Nothing needs recovering, or the components do not say how.
        DataError: The data is not that of the Fishers.
        ModelError: The model is not that of the Fishers.
        OutOfMemoryError: There is too little memory for a batch.
    """
    if components.compression not in ("sketch", "gram"):
        raise ArgumentError(
            "recover: these components' vectors are in parameter space already: components.vector(j) gives them, and "
            "every command takes the file as it is"
        )
    if components.row_weights is None or components.row_offsets is None:
        raise ArgumentError(
            "recover: these components do not hold the combinations of rows that their vectors are, because they were "
            "expanded; recover the components before the expansion, or decompose all at once"
        )
    if rank is not None:
        rank = check_integer("rank", rank)
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    wanted = _wanted(components, range(components.n_components) if js is None else js, rank)
    about = components.provenance.get("fishers", {})
    if about.get("model_digest") not in (None, model_digest(inner)):
        raise ModelError("model: its weights or modules are not those that the Fishers were computed from")
    check_sampler(data)
    check_places(data, about, inner)
    with placed(inner, device) as place:
        selected = select_parameters(inner, about.get("options", {}).get("parameters"))
        if selected != components.parameters:
            raise ModelError("model: its parameters are not those that the Fishers were computed from")
        if not wanted:
            return components
        _check_memory(components, len(wanted), rank, place)
        options = FisherOptions.recorded(about)
        run = Run(inner, place, selected, replace(options, forward=forward))
        work = _Recovery(components, run, wanted, rank)
        for batch in run.batches(tqdm(check_data(data), desc="recover", unit="batch", disable=not progress)):
            work.add(batch)
            if work.complete:
                break
        return _with_vectors(components, wanted, rank, *work.finish())


def _wanted(components: Factorisation, js: Iterable[int], rank: int | None) -> list[int]:
    """The components whose vectors have to be found: those asked for that are not known, whole or of that rank.

    Factors of another rank are found again, all of them: a file has factors of one rank.
    """
    whole = set() if components.recovered is None else set(components.recovered.tolist())
    if rank is None:
        return sorted(set(js) - whole)
    factored = set() if components.factored is None else set(components.factored.tolist())
    asked = set(js) - whole
    if components.rank == rank:
        return sorted(asked - factored)
    return sorted(asked | factored) if asked else []


def _check_memory(components: Factorisation, n: int, rank: int | None, place: torch.device) -> None:
    """Refuse more vectors than there is memory for.

    Raises:
        ArgumentError: There is not enough, and what to do.
    """
    needed, free = RowSums.nbytes(components.parameters, n, rank), available_bytes(place)
    if needed > free:
        smaller = "" if rank is not None else ", or as factors of low rank, with rank=8 or --rank 8"
        raise ArgumentError(
            f"js: {n} vectors of {components.n_parameters:,} parameters take {format_bytes(needed)}, and "
            f"{format_bytes(free)} of memory are free; recover fewer at a time, with js=[…] or --component J,…{smaller}"
        )


class _Recovery:
    def __init__(self, components: Factorisation, run: Run, js: list[int], rank: int | None) -> None:
        assert components.row_weights is not None and components.row_offsets is not None
        self.components, self.js, self.run = components, js, run
        self.weights, self.offsets = components.row_weights[:, js], components.row_offsets
        self.sums = RowSums(run.parameters, len(js), rank, run.device)
        self.examples: dict[int, list[int]] = {}
        for index, position in enumerate(components.ids.tolist()):
            self.examples.setdefault(int(position), []).append(index)
        self.position, self.left = 0, len(components.ids)

    @property
    def complete(self) -> bool:
        """Every example has been met."""
        return self.left == 0

    def add(self, batch: Batch) -> None:
        """Add a batch's share of every vector.

        Raises:
            DataError: An example has other logits than when its Fisher was computed.
        """
        ids = np.arange(self.position, self.position + batch.n_examples)
        self.position += batch.n_examples
        wanted = [place for place, i in enumerate(ids.tolist()) if i in self.examples]
        if not wanted:
            return
        self.left -= sum(len(self.examples[int(i)]) for i in ids[wanted])
        if batch.sliceable and wanted[-1] + 1 < batch.n_examples:  # it ends where max_examples ended
            batch, ids = batch.take(slice(0, wanted[-1] + 1)), ids[: wanted[-1] + 1]
        with self.run.engine.recording():
            for one in self.run.passes(batch, ids, self._as_stored):
                columns, weights = one.factors.columns, self._weights(one.factors, one.slot_ids)
                if len(self.js) < one.n_columns:
                    columns, weights = _combined(columns, weights)
                for block in one.blocks(columns, paired=lambda *_: True, gathered=True):
                    self.sums.add(block, weights)

    def _as_stored(self, logits: Tensor, ids: Array) -> Tensor:
        """The logits ``(b, C)`` float64, as they were stored where they differ by rounding alone.

        Raises:
            DataError: They differ by more.
        """
        own = [(place, self.examples[i][0]) for place, i in enumerate(ids.tolist()) if i in self.examples]
        factorised = logits.to(torch.float64)
        if not own:
            return factorised
        places, indices = (list(column) for column in zip(*own, strict=True))
        fresh, stored = logits[places], self.components.logits.take(indices)
        if fresh.shape != stored.shape or differ(stored.numbers_of(fresh), stored.numbers, logits.dtype):
            raise DataError(
                f"data: examples {ids[0]} to {ids[-1]} have other logits than when their Fishers were computed; "
                "give the same data in the same order, and the same forward="
            )
        factorised[places] = stored.restored(fresh)
        return factorised

    def _weights(self, factors: Factors, ids: Array) -> Tensor:
        """``(b, R, k)`` float64: the weight of each row of unit-norm cotangents in every vector.

        Raises:
            DataError: An example had more rows than it has now.
        """
        width = factors.columns.shape[2]
        weights = np.zeros((len(ids), width, len(self.js)))
        for place, example in enumerate(ids.tolist()):
            for index in self.examples.get(example, ()):
                own = self.weights[self.offsets[index] : self.offsets[index + 1]]
                if len(own) > width:
                    raise DataError(f"data: the Fisher of example {example} had {len(own)} rows, not {width}")
                weights[place, : len(own)] += own
        return torch.from_numpy(weights).to(factors.columns.device) * factors.scale[:, None, None]

    def finish(self) -> tuple[Array, Array]:
        """Return the sums ``(k, p)``, and ``(k, n_tensors)`` the squared norms that their factors lose.

        Raises:
            DataError: Examples are missing.
        """
        if self.left:
            raise DataError(
                f"data: it ended after {self.position} examples, without {self.left} of the {len(self.components.ids)} "
                "that the components were made from"
            )
        return self.sums.finish()


def _combined(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One cotangent per component in place of one per row, of unit norm ``(b, C, k)``; and weights ``(b, k, k)``."""
    columns = torch.einsum("bcr,brk->bck", columns, weights)
    size = torch.linalg.vector_norm(columns, dim=1)
    return columns / torch.where(size > 0, size, 1.0)[:, None], torch.diag_embed(size)


def _with_vectors(components: F, js: list[int], rank: int | None, sums: Array, lost: Array) -> F:
    """Add vectors, scaled to unit norm, what their factors lose included."""
    sketch = sketch_of(components.provenance.get("fishers", {}))
    for row, j in enumerate(js):
        _without_left_out(components, rank, sums[row], lost[row])
        squares = squared_norm(components.parameters, rank, sums[row])
        norm = math.sqrt(squares + lost[row].sum())
        if sketch is not None:
            vector = sums[row] if rank is None else assemble(components.parameters, rank, sums[row])
            _check_against_sketch(components, j, sketch, vector, math.sqrt(squares) / max(norm, 1e-30))
        lost[row] /= max(norm, 1e-30) ** 2
        scale_factored(components.parameters, rank, sums[row], 1 / max(norm, 1e-30))
    if rank is None:
        order, stacked = _merged(js, sums, components.recovered, components.recovered_vectors)
        return replace(components, recovered=order, recovered_vectors=stacked)
    same = components.rank == rank
    order, stacked = _merged(js, sums, *((components.factored, components.factored_vectors) if same else (None, None)))
    _, losses = _merged(js, lost, *((components.factored, components.factored_lost) if same else (None, None)))
    return replace(components, rank=rank, factored=order, factored_vectors=stacked, factored_lost=losses)


def _without_left_out(components: Factorisation, rank: int | None, stored: Array, lost: Array) -> None:
    """Set the blocks of weight 0 to 0: the Fishers held nothing of them."""
    weights = components.block_weights or {}
    for number, slot in enumerate(slots(components.parameters, rank)):
        if weights.get(slot.parameter.name, 1.0) == 0:
            stored[slot.offset : slot.offset + slot.numel] = 0.0
            lost[number] = 0.0


def _merged(js: list[int], rows: Array, known: Array | None, known_rows: Array | None) -> tuple[Array, Array]:
    """The components known then, ascending, and their rows."""
    if known is None or known_rows is None or not len(known):
        return np.array(js, np.int64), np.asarray(rows, np.float32)
    every = dict(zip(known.tolist(), known_rows, strict=True)) | dict(zip(js, rows, strict=True))
    return np.array(sorted(every), np.int64), np.stack([every[j] for j in sorted(every)]).astype(np.float32)


def _check_against_sketch(components: Factorisation, j: int, sketch: Sketch, vector: Array, kept: float) -> None:
    """Compare a vector with the sketch that was factorised.

    Args:
        components: Of sketched Fishers.
        j: The component.
        sketch: How they were sketched.
        vector: ``(n_parameters,)``.
        kept: Norm of the vector over that of what it stands for: the cosine expected.
    """
    weights = components.block_weights
    weighted = vector if weights is None else vector * column_factors(components.parameters, weights, components.kind)
    sketched = sketch_vectors(sketch, components.parameters, weighted[None])[0].astype(np.float64)
    stored = components.vectors[j].astype(np.float64)
    size = np.linalg.norm(sketched) * np.linalg.norm(stored)
    cosine = float(sketched @ stored) / max(size, 1e-300)
    if cosine < 0.99 * kept - 4 * math.sqrt((1 - kept**2) / sketch.d):  # what is lost has a sketch of random direction
        warnings.warn(
            f"component {j}: the recovered vector agrees with the factorised one to cos = {cosine:.3f} only; "
            "the decomposition had not come to rest, or found next to no use for it: decompose with a lower "
            "tolerance",
            stacklevel=5,
        )


def sketch_vectors(sketch: Sketch, parameters: Parameters, vectors: Array) -> Array:
    """Compute the sketches ``(k, d)`` float32 of vectors in parameter space ``(k, n_parameters)``."""
    stream = StreamingSketch(len(vectors), sketch.d, sketch.seed, nonzeros=sketch.nonzeros)
    for parameter in parameters:
        values = vectors[:, parameter.slice]
        if sketch.two_sided(parameter.shape):
            n, k = parameter.shape
            step = max(1, math.ceil((1 << 20) / k))
            for row in range(0, n, step):
                part = values[:, row * k : min(n, row + step) * k]
                stream.push_matrix(part, parameter.offset, (n, k), np.full(len(vectors), row, np.int64))
        else:
            stream.push(values, parameter.offset)
    return stream.finish()
