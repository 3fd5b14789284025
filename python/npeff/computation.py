"""Stage 1 of the pipeline: model + data → Fishers."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches import Batch, batch_digest, call_model, check_data, read_batch
from npeff.compress import TopK
from npeff.digests import ModelWatch
from npeff.errors import ArgumentError, DataError, ResumeError
from npeff.fishers import FisherBlock, Fishers, Kind
from npeff.gradients.collect import Collector
from npeff.gradients.engine import KEPT_BYTES, PerExampleGradients
from npeff.gradients.factors import Basis, FactorOptions, Labels, Likelihood, factorise
from npeff.gradients.selection import placed, select_parameters
from npeff.gradients.selfcheck import differ
from npeff.parameters import Parameters
from npeff.rows import concatenate
from npeff.storage.files import check_target

Forward = Callable[[Any, Any], Any]


def compute_fishers(
    model: nn.Module,
    data: Iterable[Any],
    *,
    kind: Kind = "low_rank",
    compress: TopK | None = None,
    basis: Basis = "reduced",
    rank: int | None = None,
    energy: float | None = None,
    min_prob: float | None = None,
    max_classes: int | None = None,
    labels: Labels = "expected",
    n_samples: int = 1,
    likelihood: Likelihood = "categorical",
    parameters: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
) -> Fishers:
    """Compute the per-example Fishers of a model.

    With J the Jacobian of the logits, ``F = Σ_y p_y ∇log p_y ∇log p_yᵀ = Jᵀ (diag p − ppᵀ) J = AᵀA``, where
    ``A = SᵀJ`` for any ``S Sᵀ = diag p − ppᵀ`` (Matena & Raffel 2023; see docs/mathematics). One backward
    pass per column of S.

    Args:
        model: Any PyTorch module, usually after ``model.eval()``. It is left exactly as it was.
        data: Iterable of batches: ``(inputs, labels)``, a mapping with or without ``"labels"``, or a bare
            tensor.
        kind: ``"low_rank"`` keeps A, ``"diagonal"`` keeps diag F (the same whatever the basis).
        compress: ``TopK(k)``, or None for exact rows.
        basis: ``"reduced"``: eigenvectors of diag p − ppᵀ, C−1 rows; ``"class"``: one row √p_y ∇log p_y per
            class, as published.
        rank: Reduced basis: at most so many rows, those with most energy.
        energy: Reduced basis: the fewest rows with this share of the trace of diag p − ppᵀ; ranks then differ
            per example.
        min_prob: Class basis: only classes at least so probable, by descending probability; the most probable
            one always.
        max_classes: Class basis: at most so many classes, by descending probability.
        labels: ``"expected"`` over the model's own predictions; ``"sampled"`` draws from them (unbiased);
            ``"true"`` uses the given labels: the empirical Fisher, one row.
        n_samples: Draws per example with ``labels="sampled"``. They depend on the seed and the example's
            position alone.
        likelihood: What the outputs mean: ``"categorical"`` logits, ``"bernoulli"`` logits (one question
            each), or ``"gaussian"`` means of unit variance.
        parameters: Name patterns as in the shell (``"layers.3.*"``), one or several; ``"!…"`` excludes. None
            takes all.
        forward: ``forward(model, batch) -> logits`` for models that are not simply called on the inputs.
        out: File to write. Work is saved while it is done; the same call resumes it.
        device: Where to compute; the model's own device by default. The model is moved there and back.
        seed: Decides the draws.
        max_examples: Stop after so many examples.
        progress: Show a progress bar on stderr.

    Returns:
        Fishers; opened from ``out`` if given.

    Raises:
        ArgumentError: An argument has a wrong value, or does not go with the others.
        DataError: Data is empty, unlabelled, misshapen, or gives non-finite logits or gradients.
        ModelError: The model has no per-example gradients as it stands, fails on a batch, or changed during the work.
        ResumeError: ``out`` holds work on another model, other data or other options.
    """
    options = FactorOptions(basis, rank, energy, min_prob, max_classes, labels, n_samples, likelihood, seed)
    options.check()
    if kind not in get_args(Kind):
        raise ArgumentError(f"kind: expected 'low_rank' or 'diagonal', got {kind!r}")
    if compress is not None and not isinstance(compress, TopK):
        raise ArgumentError(f"compress: expected TopK(k) or None, got {compress!r}")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if forward is not None and not callable(forward):
        raise ArgumentError(f"forward: expected callable(model, batch) -> logits, got {forward!r}")
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise ArgumentError(f"out: expected the path of a file, got {out!r}")
    if out is not None:
        check_target(Path(out))
    if max_examples is not None and (
        isinstance(max_examples, bool) or not isinstance(max_examples, int) or max_examples < 1
    ):
        raise ArgumentError(f"max_examples: expected an integer ≥ 1, got {max_examples!r}")
    if kind == "diagonal" and basis == "class" and min_prob is None and max_classes is None:
        # diag(AᵀA) is the same in every basis; the reduced one has a column less.
        options = FactorOptions("reduced", None, None, None, None, labels, n_samples, likelihood, seed)
    batches = check_data(data)
    inner = getattr(model, "_orig_mod", model)  # torch.compile hides the operations that rules look for
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    with placed(inner, device) as place:
        selected = select_parameters(inner, parameters)
        run = _Run(inner, place, selected, kind, compress, options, forward)
        return run.over(batches, None if out is None else Path(out), max_examples, progress, parameters)


@dataclass
class _Run:
    """One call of compute_fishers: everything that stays the same from batch to batch."""

    model: nn.Module
    device: torch.device
    parameters: Parameters
    kind: Kind
    compress: TopK | None
    options: FactorOptions
    forward: Forward | None

    def over(
        self, data: Iterable[Any], out: Path | None, max_examples: int | None, progress: bool, patterns: Any
    ) -> Fishers:
        from npeff.storage.shards import FisherWriter

        watch = ModelWatch(self.model)
        self.engine = PerExampleGradients(
            self.model, self.parameters, lambda model, batch: call_model(model, self.forward, batch)
        )
        batches = self._batches(data, max_examples)
        first = next(batches, None)
        if first is None:
            raise DataError(
                "data: it yielded no batches; if it is a generator it may be used up: pass a DataLoader or a list"
            )
        with self.engine.recording():
            # Rules are chosen on the first batch, also when work resumes after it: a kill changes nothing.
            logits = self.engine.forward(first)
            n_outputs = logits.shape[1]
            self.engine.prepare(first, logits)
            first_logits = logits.detach().cpu()
            del logits
        header = {
            "kind": self.kind,
            "parameters": self.parameters.to_json(),
            "provenance": {
                "model": type(self.model).__name__,
                "model_digest": watch.digest,
                "options": self._described(n_outputs, max_examples, patterns),
                "versions": {"npeff": _version(), "torch": torch.__version__},
            },
        }
        try:
            total = len(data)  # type: ignore[arg-type]
        except TypeError:
            total = None
        if total is not None and max_examples is not None:
            total = min(total, -(-max_examples // first.n_examples))
        done = 0
        bar = tqdm(total=total, desc="Fishers", unit="batch", disable=not progress, smoothing=0.05)
        with bar, FisherWriter(out, header, validate=lambda: watch.check(thorough=True)) as writer:
            for batch in chain([first], batches):
                digest = batch_digest(batch)
                if writer.skip(digest, batch.n_examples):
                    if done == 0:
                        _check_function(writer.stored_logits(batch.n_examples), first_logits, out)
                    _pass_over(bar)
                else:
                    ids = np.arange(done, done + batch.n_examples, dtype=np.int64)
                    watch.check()
                    block = self.block(batch, ids)
                    watch.check()
                    writer.append(block, digest)
                    bar.update(1)
                done += batch.n_examples
                bar.set_postfix(examples=done, refresh=False)
            watch.check(thorough=True)
            return writer.finish(self.engine.coverage())

    def _batches(self, data: Iterable[Any], max_examples: int | None) -> Iterator[Batch]:
        left = max_examples
        for number, raw in enumerate(data):
            batch = read_batch(raw, self.device, number, self.forward is not None)
            if left is not None and batch.n_examples > left:
                if not batch.sliceable:
                    raise ArgumentError(
                        f"max_examples: it ends within batch {number}, which cannot be cut; choose a "
                        "multiple of the batch size"
                    )
                batch = batch.take(slice(0, left))
            yield batch
            if left is not None:
                left -= batch.n_examples
                if left == 0:
                    return

    def block(self, batch: Batch, ids: npt.NDArray[np.int64]) -> FisherBlock:
        """The Fishers of one batch; in pieces when the backward passes would keep too much at once.

        Raises:
            DataError: Logits or gradients are not finite, or labels are missing.
        """
        with self.engine.recording():
            logits = self.engine.forward(batch)
            detached = logits.detach().to(torch.float64)
            finite = torch.isfinite(detached).all(dim=1)
            if not bool(finite.all()):
                bad = int((~finite).to(torch.uint8).argmax())
                raise DataError(
                    f"logits: example {ids[bad]} has the logits {detached[bad, :8].tolist()}; find what "
                    "overflows in the model on it, or leave it out of the data"
                )
            factors = factorise(logits, self.options, self._targets(batch, logits.shape[1], ids), ids)
            prepared = self.engine.prepare(batch, logits)
            pieces = -(-prepared.kept_bytes(factors.columns.shape[2]) // KEPT_BYTES)
            if pieces <= 1 or batch.n_examples == 1 or not batch.sliceable:
                collector = Collector(self.parameters, factors, ids, self.kind == "diagonal", self.compress)
                for block in self.engine.blocks(prepared, factors.columns, squared=self.kind == "diagonal"):
                    collector.add(block)
                rows, counts, norms = collector.finish()
                stored = self._stored_labels(batch)
                return FisherBlock(rows, counts, norms, detached.cpu().numpy().astype(np.float32), stored, ids)
        del prepared, logits, factors
        step = -(-batch.n_examples // int(pieces))
        cuts = [slice(start, min(start + step, batch.n_examples)) for start in range(0, batch.n_examples, step)]
        return _joined([self.block(batch.take(cut), ids[cut]) for cut in cuts])

    def _targets(self, batch: Batch, n_outputs: int, ids: npt.NDArray[np.int64]) -> Tensor | None:
        if batch.labels is None or self.options.likelihood != "categorical":
            return batch.labels
        classes = _as_classes(batch.labels, batch.n_examples)
        beyond = classes >= n_outputs
        if bool(beyond.any()):
            first = int(beyond.to(torch.uint8).argmax())
            raise DataError(
                f"labels: example {ids[first]} has label {int(classes[first])}; expected 0 ≤ label < {n_outputs}, "
                "the number of logits, or a negative label where it is unknown"
            )
        return classes

    def _stored_labels(self, batch: Batch) -> npt.NDArray[np.int64]:
        labels = batch.labels
        if labels is None or (
            self.options.likelihood != "categorical"
            and (labels.is_floating_point() or labels.numel() != batch.n_examples)
        ):
            return np.full(batch.n_examples, -1, np.int64)
        stored = _as_classes(labels, batch.n_examples).cpu().numpy().astype(np.int64)
        return np.where(stored < 0, -1, stored)

    def _described(self, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in FactorOptions.__dataclass_fields__}
        described = {"kind": self.kind, **options, "max_examples": max_examples}
        described["parameters"] = (
            [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)
        )
        described["compress"] = None
        if self.compress is not None:
            rows = 1 if self.kind == "diagonal" else self.options.most_rows(n_outputs)
            possible = max(1, rows) * self.parameters.n_parameters
            if self.compress.k > possible:
                warnings.warn(
                    f"TopK(k={self.compress.k}): an example has at most {possible} entries; k is {possible}",
                    stacklevel=4,
                )
            described["compress"] = {
                "method": "topk",
                "k": self.compress.k,
                "k_effective": min(self.compress.k, possible),
            }
        return described


def _pass_over(bar: tqdm[Any]) -> None:
    """Count a batch that an earlier run did: it says nothing about the speed of this one."""
    bar.update(1)
    if not bar.disable:
        bar.initial = bar.n
        bar.start_t = bar.last_print_t = time.time()


def _check_function(stored: npt.NDArray[np.float32] | None, logits: Tensor, out: Path | None) -> None:
    """Refuse to continue work with a model that computes something else with the same weights.

    Raises:
        ResumeError: The first batch has other logits than it had.
    """
    if stored is None:
        return
    before = torch.from_numpy(np.array(stored))
    if before.shape != logits.shape or not bool(torch.isfinite(logits).all()) or differ(logits, before, logits.dtype):
        raise ResumeError(
            f"the model gives other logits than those that {out} was computed from, although its weights are the "
            "same: its code or forward= changed. Use them as they were, choose another out, or remove it "
            "to start anew."
        )


def _as_classes(labels: Tensor, n: int) -> Tensor:
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = labels.is_floating_point() and bool(((labels == labels.round()) & (labels.abs() < 2**63)).all())
    if labels.shape != (n,) or labels.is_complex() or (labels.is_floating_point() and not whole):
        raise DataError(
            f"labels: expected ({n},) integer classes, got {tuple(labels.shape)} {labels.dtype}; leave them "
            "out of the batch, or turn them into classes"
        )
    classes = labels.to(torch.int64)
    if labels.dtype == torch.uint64 and bool((classes < 0).any()):
        raise DataError("labels: expected integer classes below 2⁶³")
    return classes


def _joined(blocks: list[FisherBlock]) -> FisherBlock:
    fields = {
        name: np.concatenate([getattr(block, name) for block in blocks])
        for name in ("row_counts", "norms", "logits", "labels", "ids")
    }
    return FisherBlock(rows=concatenate([block.rows for block in blocks]), **fields)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("npeff")
    except PackageNotFoundError:
        return "0"
