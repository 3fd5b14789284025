"""Stage 1 of the pipeline: model + data → Fishers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batches import Batch, batch_digest
from npeff.batches.reading import FixedOrder, Repeats, check_data
from npeff.errors import ArgumentError, DataError, ResumeError
from npeff.fishers.block_weights import BlockWeights
from npeff.fishers.exact_gram import exact_gram
from npeff.fishers.fishers import FisherBlock, Fishers
from npeff.fishers.logits import Logits, largest
from npeff.fishers.options import Basis, Compression, FisherOptions, Forward, GramOnly, Labels, Likelihood, Sketch, TopK
from npeff.fishers.passes import Ids, Run
from npeff.fishers.rows import Kind
from npeff.fishers.shards import FisherWriter, begun_block_weights
from npeff.fishers.sinks import DenseSink, Sink, SketchSink
from npeff.fishers.topk_sink import TopKSink
from npeff.gradients.eligibility import BLOCKS, differ, placed, select_parameters
from npeff.kernels import NonFiniteError
from npeff.kernels.streams import InOrder
from npeff.language.places import places_of
from npeff.models import devices
from npeff.models.parameters import ModelWatch
from npeff.storage.files import check_target, ending_in_order


class EmptyShareError(DataError):
    """No batch falls to a share: there are more shares than batches."""


def compute_fishers(
    model: nn.Module,
    data: Iterable[Any],
    *,
    kind: Kind = "low_rank",
    compress: Compression | None = None,
    basis: Basis = "reduced",
    rank: int | None = None,
    energy: float | None = None,
    min_prob: float | None = None,
    max_classes: int | None = None,
    labels: Labels = "expected",
    n_samples: int = 1,
    likelihood: Likelihood = "categorical",
    parameters: str | Sequence[str] | None = None,
    block_weights: BlockWeights = "energy",
    forward: Forward | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    share: tuple[int, int] | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Fishers:
    """Compute the per-example Fishers of a model.

    With J the Jacobian of the logits, ``F = Σ_y p_y ∇log p_y ∇log p_yᵀ = Jᵀ (diag p − ppᵀ) J = AᵀA``, where
    ``A = SᵀJ`` for any ``S Sᵀ = diag p − ppᵀ`` (Matena & Raffel 2023; see docs/mathematics). One backward
    pass per column of S.

    Args:
        model: Any PyTorch module, usually after ``model.eval()``. It is left exactly as it was.
        data: Iterable of batches, in the same order every time: ``(inputs, labels)``, a mapping with or without
            ``"labels"``, or a bare tensor, with the examples as their first dimension; :class:`npeff.Batch` for
            all else. Integer labels ``(b, T)`` make positions of sequences examples: logits are then ``(b, T, C)``, and
            every position whose label is not −100 counts; see :class:`npeff.Batch`.
        kind: ``"low_rank"`` keeps A, ``"diagonal"`` keeps diag F (the same whatever the basis).
        compress: ``TopK(k)``, ``Sketch(d)``, ``GramOnly()``, or None for exact rows.
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
        likelihood: What the outputs mean: ``"categorical"`` logits, ``"probabilities"`` of classes (a model that
            ends in a softmax), ``"bernoulli"`` logits (one question each), or ``"gaussian"`` means of unit variance.
        parameters: Name patterns as in the shell (``"layers.3.*"``), one or several; ``"!…"`` excludes.
            ``"blocks"`` stands for the weights of all linear layers in the transformer blocks: no embeddings, norms,
            biases, nor the head. None takes all; with :class:`npeff.language.Places`, the blocks.
        block_weights: Weights of the Fisher's blocks, for sketches and inner products too, which cannot be weighted
            afterwards: ``"energy"`` leaves the Fishers as they are; ``"balanced"`` gives every layer about the same
            share of the trace, measured on the first examples; or a mapping from name patterns to weights
            (parameters that no pattern matches keep weight 1; 0 leaves a block out), such as the ``block_weights`` of
            other Fishers or of components. Rows and norms are those of the weighted Fishers.
        forward: ``forward(model, batch) -> logits`` for models that are not simply called on the inputs.
        out: File to write. Work is saved while it is done, at Ctrl-C, SIGTERM and SIGHUP too (called from the main
            thread); the same call resumes it.
        device: Where to compute; the model's own device by default. The model is moved there and back.
        seed: Decides the draws.
        max_examples: Stop after so many examples.
        share: ``(k, n)``: only batches k, k + n, k + 2n …, for n processes that share the work;
            :func:`npeff.distributed.compute_fishers` does so, and joins what they made.
        memory: Bytes (``"4GB"`` is as good as a number) that a batch may take for activations, cotangents and output
            gradients; larger batches are cut, whatever their size, with the same result, at most to single examples.
            The positions of a sequence go forward together, and backward some at a time.
            None: activations are not bounded, cotangents and output gradients by 512 MB, on a CUDA device by a quarter
            of its free memory if that is more.
        progress: Show a progress bar on stderr.

    Returns:
        Fishers; opened from ``out`` if given.

    Raises:
        ArgumentError: An argument has a wrong value, or does not go with the others; or a DataLoader shuffles.
        DataError: Data is empty, unlabelled, misshapen, comes in another order each time, or gives non-finite logits or
            gradients; or the outputs are not what ``likelihood`` says.
        EmptyShareError: No batch falls to this share.
        ModelError: The model has no per-example gradients as it stands, fails on a batch, or changed during the work.
        OutOfMemoryError: There is too little memory for a batch.
        ResumeError: ``out`` holds work on another model, other data or other options.
    """
    places = places_of(data)
    if places is not None and parameters is None:
        parameters = BLOCKS
    given = locals()
    options = FisherOptions(**{name: given[name] for name in FisherOptions.__dataclass_fields__})
    options.check()
    inner = getattr(model, "_orig_mod", model)  # torch.compile hides the operations that rules look for
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    if out is not None:
        check_target(Path(out))
    data = check_data(data)
    if places is not None:
        places.check_model(inner)
    # Work that is saved while it is done is saved at a SIGTERM, too.
    with nullcontext() if out is None else ending_in_order(), placed(inner, device) as place:
        about = {} if places is None else {"places": places.describe()}
        begun = None if out is None else begun_block_weights(Path(out))
        run = Run(inner, place, select_parameters(inner, parameters), options.cheapest(), about, begun)
        if isinstance(compress, GramOnly):
            return exact_gram(run, data)
        watch = ModelWatch(run.model)
        run.engine  # noqa: B018  a model without per-example gradients is refused before its data are touched
        order, repeats = FixedOrder(data, lambda: run.batches(data)), Repeats(data)
        batches = run.batches(data)
        first = next(batches, None)
        if first is None:
            raise DataError(
                "data: it yielded no batches; if it is a generator it may be used up: pass a DataLoader or a list"
            )
        order.check(first)
        run.choose_block_weights(first)
        first_logits = run.choose_rules(first)
        header = run.header(watch.digest, first_logits.shape[1])
        pipeline, done = BatchPipeline(run, watch), 0
        bar = tqdm(
            total=_n_batches(data, first, run.options),
            desc="Fishers",
            unit="batch",
            disable=not progress,
            smoothing=0.05,
        )
        target = None if out is None else Path(out)
        with bar, FisherWriter(target, header, validate=pipeline.validate) as writer:
            with pipeline.writing(writer):
                for number, batch in enumerate(chain([first], batches)):
                    ids = np.arange(done, done + batch.n_examples, dtype=np.int64)
                    done += batch.n_examples
                    if share is not None and number % share[1] != share[0]:
                        continue
                    digest = batch_digest(batch)
                    repeats.add(digest)
                    if writer.skip(digest, batch.n_examples):
                        if number == 0:
                            _check_function(writer.stored_logits(batch.n_examples), first_logits, target)
                        _pass_over(bar)
                    else:
                        pipeline.add(batch, ids, digest)
                        bar.update(1)
                    bar.set_postfix(examples=done, refresh=False)
                repeats.end()
            pipeline.validate()
            if share is not None and not writer.examples_done:
                raise EmptyShareError("share: {} of {}: the data has fewer batches".format(*share))
            return writer.finish(run.coverage())


def _n_batches(data: Iterable[Any], first: Batch, options: FisherOptions) -> int | None:
    """How many batches there will be, for the progress bar; None where the data does not say."""
    try:
        total = len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
    if options.max_examples is not None:
        total = min(total, -(-options.max_examples // first.n_examples))
    return total if options.share is None else len(range(options.share[0], total, options.share[1]))


def _pass_over(bar: tqdm[Any]) -> None:
    """Count a batch that an earlier run computed, without regard to it in the estimated speed."""
    bar.update(1)
    if not bar.disable:
        bar.initial = bar.n
        bar.start_t = bar.last_print_t = time.time()


def _check_function(stored: Logits | None, logits: Tensor, out: Path | None) -> None:
    """Refuse to continue work with a model that computes something else with the same weights.

    Raises:
        ResumeError: The first batch has other logits than it had.
    """
    if stored is None:
        return
    before = stored.take(slice(len(logits)))
    same = before.shape == logits.shape and bool(torch.isfinite(logits).all())
    if not same or differ(before.numbers_of(logits), before.numbers, logits.dtype):
        raise ResumeError(
            f"the model gives other logits than those that {out} was computed from, although its weights are the "
            "same: its code or forward= changed. Use them as they were, choose another out, or remove it "
            "to start anew."
        )


SINKS: dict[type, type[Sink]] = {TopK: TopKSink, Sketch: SketchSink, type(None): DenseSink}
"""What keeps the rows, by the type of the compression."""


class PendingBatch:
    """The Fishers of a batch, on their way to the host; the batch's passes are run when it is made.

    With ``at_once`` gradients that are not finite are refused there; otherwise a device is not waited for, and
    :meth:`finite` tells.

    Raises:
        DataError: Logits or gradients are not finite, or labels are missing.
    """

    def __init__(self, run: Run, batch: Batch, ids: Ids, at_once: bool = True) -> None:
        self._pieces, options = [], run.options
        make = next(made for kind, made in SINKS.items() if isinstance(options.compress, kind))
        with run.engine.recording():
            for one in run.passes(batch, ids):
                sink = make(run.parameters, one.factors, one.slot_ids, options, at_once)
                for block in one.blocks(
                    squared=options.kind == "diagonal",
                    paired=sink.paired,
                    last_first=isinstance(options.compress, TopK),
                    gathered=options.compress is not None,
                ):
                    sink.add(run.weighted(block))
                known = one.logits.shape[1], one.stored_labels(), one.ids, one.places, one.filled
                self._pieces.append((*sink.finish(largest(one.logits, options.over_classes)), *known))

    def finite(self) -> bool:
        """Say whether all gradients were finite; wait for the batch's work on the device."""
        return all([np.isfinite(numbers.wait()[0]).all() for numbers, *_ in self._pieces])

    def block(self) -> FisherBlock:
        """Return the Fishers, once they are on the host; any thread may wait for them."""
        blocks = []
        while self._pieces:
            numbers, rows, n_outputs, labels, ids, places, filled = self._pieces.pop(0)
            norms, counts, scale, *kept = numbers.wait()
            norms, logits = norms.astype(np.float32)[filled], Logits.kept(kept, n_outputs)
            blocks.append(FisherBlock(rows(counts, scale), counts[filled], norms, logits, labels, ids, places))
        return FisherBlock.joined(blocks)


class BatchPipeline:
    """The order in which batches are computed, checked and written.

    A batch is computed without a look at its gradients; one with a gradient that is not finite is computed again, to
    name the example and the parameter. On a device a batch is checked when the next one has been given to it, so that
    the device always has work.
    """

    def __init__(self, run: Run, watch: ModelWatch) -> None:
        self._run, self._watch, self._deferred = run, watch, devices.has_own_memory(run.device)
        self._computing = threading.Lock()  # the model is checked while it does not run
        self._waiting: deque[tuple[Batch, Ids, str, PendingBatch]] = deque()

    def validate(self) -> None:
        """Refuse a model that changed; called between batches, from any thread.

        Raises:
            ModelError: The model changed.
        """
        with self._computing:
            try:
                self._run.check_function()
            finally:  # changed weights are named rather than what they change
                self._watch.check(thorough=True)

    @contextmanager
    def writing(self, writer: FisherWriter) -> Iterator[None]:
        """Send batches to the writer, on a thread of its own, within the block; at its end all have been written.

        Raises:
            BaseException: The error that the writer raised.
        """
        with InOrder[tuple[PendingBatch, str]](
            lambda item: writer.append(item[0].block(), item[1]), waiting=1
        ) as thread:
            self._thread = thread
            yield
            self._settle(0)

    def add(self, batch: Batch, ids: Ids, digest: str) -> None:
        """Compute a batch, and hand finished batches to the writer; waits while the writer has enough to do.

        Raises:
            DataError: Logits or gradients of the batch, or of the batch before it, are not finite.
            ModelError: The model changed.
        """
        with self._computing:
            try:
                pending = PendingBatch(self._run, batch, ids, at_once=False)
            except NonFiniteError:
                pending = PendingBatch(self._run, batch, ids)
            self._watch.check()
        self._waiting.append((batch, ids, digest, pending))
        self._settle(1 if self._deferred else 0)

    def _settle(self, left: int) -> None:
        while len(self._waiting) > left:
            batch, ids, digest, pending = self._waiting.popleft()
            if not pending.finite():
                with self._computing:
                    pending = PendingBatch(self._run, batch, ids)
            self._thread.put((pending, digest))
