"""Stage 1 of the pipeline: model + data → Fishers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batch_order import FixedOrder, Repeats
from npeff.batches.batches import Batch, batch_digest, check_data
from npeff.errors import ArgumentError, DataError, ResumeError, ending_in_order
from npeff.fishers.exact_gram import exact_gram
from npeff.fishers.fishers import Fishers
from npeff.fishers.logits import Logits
from npeff.fishers.options import Basis, Compression, FisherOptions, Forward, GramOnly, Labels, Likelihood
from npeff.fishers.passes import Run
from npeff.fishers.pipeline import BatchPipeline
from npeff.fishers.rows import Kind
from npeff.fishers.shards import FisherWriter
from npeff.gradients.eligibility import differ
from npeff.gradients.selection import BLOCKS, placed, select_parameters
from npeff.language.places import places_of
from npeff.models.digests import ModelWatch
from npeff.storage.files import check_target


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
            all else.
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
            None: activations are not bounded, cotangents and output gradients by 512 MB, on a CUDA device by a quarter
            of its free memory if that is more.
        progress: Show a progress bar on stderr.

    Returns:
        Fishers; opened from ``out`` if given.

    Raises:
        ArgumentError: An argument has a wrong value, or does not go with the others; or a DataLoader shuffles.
        DataError: Data is empty, unlabelled, misshapen, comes in another order each time, or gives non-finite logits or
            gradients; or the outputs are not what ``likelihood`` says.
        ModelError: The model has no per-example gradients as it stands, fails on a batch, or changed during the work.
        ResumeError: ``out`` holds work on another model, other data or other options.
    """
    places = places_of(data)
    if places is not None and parameters is None:
        parameters = BLOCKS
    given = locals()
    options = FisherOptions(**{name: given[name] for name in FisherOptions.__dataclass_fields__})
    options.check()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if out is not None:
        check_target(Path(out))
    data = check_data(data)
    inner = getattr(model, "_orig_mod", model)  # torch.compile hides the operations that rules look for
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    if places is not None:
        places.check_model(inner)
    # Work that is saved while it is done is saved at a SIGTERM, too.
    with nullcontext() if out is None else ending_in_order(), placed(inner, device) as place:
        about = {} if places is None else {"places": places.describe()}
        run = Run(inner, place, select_parameters(inner, parameters), options.cheapest(), about)
        return exact_gram(run, data) if isinstance(compress, GramOnly) else _compute(run, data)


def _compute(run: Run, data: Iterable[Any]) -> Fishers:
    """Compute all batches, one after the other; resume where ``out`` holds part of them.

    Raises:
        DataError: The data is empty, or gives non-finite logits or gradients.
        EmptyShareError: No batch falls to this share.
    """
    options, out = run.options, None if run.options.out is None else Path(run.options.out)
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
    first_logits = run.choose_rules(first)
    header = run.header(watch.digest, first_logits.shape[1])
    pipeline, share, done = BatchPipeline(run, watch), options.share, 0
    bar = tqdm(
        total=_n_batches(data, first, options),
        desc="Fishers",
        unit="batch",
        disable=not options.progress,
        smoothing=0.05,
    )
    with bar, FisherWriter(out, header, validate=pipeline.validate) as writer:
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
                        _check_function(writer.stored_logits(batch.n_examples), first_logits, out)
                    _pass_over(bar)
                else:
                    pipeline.add(batch, ids, digest)
                    bar.update(1)
                bar.set_postfix(examples=done, refresh=False)
            repeats.end()
        watch.check(thorough=True)
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
