"""Stage 1 of the pipeline: model + data → Fishers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from npeff.batches.batches import check_data
from npeff.errors import ArgumentError
from npeff.fishers.compress import Compression, GramOnly, Sketch
from npeff.fishers.exact_gram import exact_gram
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import Kind
from npeff.fishers.run import Forward, Run
from npeff.gradients.factors import Basis, FactorOptions, Labels, Likelihood
from npeff.gradients.selection import placed, select_parameters
from npeff.models.memory import parse_bytes
from npeff.storage.files import check_target
from npeff.storage.termination import ending_in_order

__all__ = ["Forward", "compute_fishers"]


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
        parameters: Name patterns as in the shell (``"layers.3.*"``), one or several; ``"!…"`` excludes. None
            takes all.
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
    options = FactorOptions(basis, rank, energy, min_prob, max_classes, labels, n_samples, likelihood, seed)
    options.check()
    if kind not in get_args(Kind):
        raise ArgumentError(f"kind: expected 'low_rank' or 'diagonal', got {kind!r}")
    if compress is not None and not isinstance(compress, Compression):
        raise ArgumentError(f"compress: expected TopK(k), Sketch(d), GramOnly() or None, got {compress!r}")
    if kind == "diagonal" and isinstance(compress, Sketch):
        raise ArgumentError(
            "compress: a sketch adds entries with random signs, so sketches of diagonal Fishers are not non-negative "
            "and cannot be factorised as such; use TopK(k) or None, or kind='low_rank'"
        )
    if kind == "diagonal" and isinstance(compress, GramOnly):
        raise ArgumentError(
            "compress: non-negative factors of diagonal Fishers need the rows themselves, not their inner products; "
            "use TopK(k) or None, or kind='low_rank'"
        )
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
    if share is not None and not _is_share(share):
        raise ArgumentError(f"share: expected (k, n) with 0 ≤ k < n, got {share!r}")
    if share is not None and isinstance(compress, GramOnly):
        raise ArgumentError("share: inner products of all examples cannot be computed in shares; compress otherwise")
    if kind == "diagonal" and basis == "class" and min_prob is None and max_classes is None:
        # diag(AᵀA) is the same in every basis; the reduced one has a column less.
        options = FactorOptions("reduced", None, None, None, None, labels, n_samples, likelihood, seed)
    bound = None if memory is None else parse_bytes(memory)
    batches = check_data(data)
    inner = getattr(model, "_orig_mod", model)  # torch.compile hides the operations that rules look for
    if not isinstance(inner, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    # Work that is saved while it is done is saved at a SIGTERM, too.
    with nullcontext() if out is None else ending_in_order(), placed(inner, device) as place:
        selected = select_parameters(inner, parameters)
        run = Run(inner, place, selected, kind, compress, options, forward, share, bound)
        if isinstance(compress, GramOnly):
            return exact_gram(run, batches, None if out is None else Path(out), max_examples, progress, parameters)
        return run.over(batches, None if out is None else Path(out), max_examples, progress, parameters)


def _is_share(share: Any) -> bool:
    whole = isinstance(share, tuple | list) and len(share) == 2 and all(type(part) is int for part in share)
    return whole and 0 <= share[0] < share[1]
