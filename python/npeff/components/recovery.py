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

from npeff.batches.batch_order import check_sampler
from npeff.batches.batches import Batch, check_data, read_batches
from npeff.components.factorisation import Factorisation
from npeff.errors import ArgumentError, DataError, ModelError
from npeff.fishers.factors import Factors
from npeff.fishers.options import FisherOptions, Sketch, sketch_of
from npeff.fishers.passes import Run
from npeff.gradients.eligibility import differ
from npeff.gradients.selection import placed, select_parameters
from npeff.kernels import StreamingSketch
from npeff.models.digests import model_digest
from npeff.models.memory import available_bytes, format_bytes
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Factorisation)


def recover(
    components: F,
    model: nn.Module,
    data: Iterable[Any],
    js: Sequence[int] | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> F:
    """Run one more backward pass over the data; see :meth:`npeff.Components.recover`.

    ``g_j = Σ_i Σ_row c_row,j S_i,rowᵀ J_i``: the vector–Jacobian product of a whole batch with the cotangents
    ``Σ_row c_row,j S_i,row``. S comes from the logits as they were, so that batches may be cut anew.

    Raises:
        ArgumentError: Nothing needs recovering, or the components do not say how.
        DataError: The data is not that of the Fishers.
        ModelError: The model is not that of the Fishers.
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
    wanted = list(range(components.n_components)) if js is None else list(dict.fromkeys(js))
    needed, free = 4 * len(wanted) * components.n_parameters, available_bytes()
    if needed > free:
        raise ArgumentError(
            f"js: {len(wanted)} vectors of {components.n_parameters:,} parameters take {format_bytes(needed)}, and "
            f"{format_bytes(free)} of memory are free; recover fewer at a time, with js=[…] or --component J,…"
        )
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    about = components.provenance.get("fishers", {})
    if about.get("model_digest") not in (None, model_digest(inner)):
        raise ModelError("model: its weights or modules are not those that the Fishers were computed from")
    check_sampler(data)
    with placed(inner, device) as place:
        selected = select_parameters(inner, about.get("options", {}).get("parameters"))
        if selected != components.parameters:
            raise ModelError("model: its parameters are not those that the Fishers were computed from")
        options = FisherOptions.recorded(about)
        work = _Recovery(components, Run(inner, place, selected, replace(options, forward=forward)), wanted)
        bar = tqdm(check_data(data), desc="recover", unit="batch", disable=not progress)
        for batch in read_batches(bar, place, forward is not None, options.over_classes):
            work.add(batch)
            if work.complete:
                break
    return _with_vectors(components, wanted, work.finish())


class _Recovery:
    def __init__(self, components: Factorisation, run: Run, js: list[int]) -> None:
        assert components.row_weights is not None and components.row_offsets is not None
        self.components, self.js, self.run = components, js, run
        self.weights, self.offsets = components.row_weights[:, js], components.row_offsets
        self.sums = np.zeros((len(js), run.parameters.n_parameters), np.float32)
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
        engine = self.run.engine
        with engine.recording():
            tensors = list(engine.tensors.values())
            for one in self.run.passes(batch, ids, per_example=False, replace_logits=self._as_stored):
                cotangents = self._cotangents(one.factors, one.ids)
                for column in range(len(self.js)):
                    given = cotangents[:, :, column].to(one.logits)
                    gradients = torch.autograd.grad(one.logits, tensors, given, retain_graph=True, allow_unused=True)
                    for parameter, gradient in zip(engine.parameters, gradients, strict=True):
                        if gradient is not None:
                            dense = gradient.to_dense() if gradient.is_sparse else gradient
                            self.sums[column, parameter.slice] += dense.reshape(-1).to("cpu", torch.float32).numpy()

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

    def _cotangents(self, factors: Factors, ids: Array) -> Tensor:
        """``(b, C, k)`` float64: ``Σ_row c_row,j S_row`` per example; 0 for those that do not count.

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
        columns = factors.columns * factors.scale[:, None, None]
        return torch.einsum("bcr,brk->bck", columns, torch.from_numpy(weights).to(columns.device))

    def finish(self) -> Array:
        """``(k, m)``.

        Raises:
            DataError: Examples are missing.
        """
        if self.left:
            raise DataError(
                f"data: it ended after {self.position} examples, without {self.left} of the {len(self.components.ids)} "
                "that the components were made from"
            )
        return self.sums


def _with_vectors(components: F, js: list[int], vectors: Array) -> F:
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    sketch = sketch_of(components.provenance.get("fishers", {}))
    if sketch is not None:
        sketched = sketch_vectors(sketch, components.parameters, vectors).astype(np.float64)
        stored = components.vectors[js].astype(np.float64)
        size = np.linalg.norm(sketched, axis=1) * np.linalg.norm(stored, axis=1)
        cosines = (sketched * stored).sum(1) / np.maximum(size, 1e-300)
        for j, cosine in zip(js, cosines, strict=True):
            if cosine < 0.99:
                warnings.warn(
                    f"component {j}: the recovered vector agrees with the factorised one to cos = {cosine:.3f} only; "
                    "the decomposition had not come to rest, or found next to no use for it: decompose with a lower "
                    "tolerance",
                    stacklevel=4,
                )
    unit = (vectors / np.maximum(norms, 1e-30)[:, None]).astype(np.float32)
    known = (
        {}
        if components.recovered is None or components.recovered_vectors is None
        else dict(zip(components.recovered.tolist(), components.recovered_vectors, strict=True))
    )
    known.update(zip(js, unit, strict=True))
    order = sorted(known)
    stacked = np.stack([known[j] for j in order]) if order else np.zeros((0, components.n_parameters), np.float32)
    return replace(components, recovered=np.array(order, np.int64), recovered_vectors=stacked)


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
