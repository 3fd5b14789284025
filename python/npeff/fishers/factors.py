"""Cotangents S of the logits with S Sᵀ = the output's Fisher, so that A = SᵀJ has F = AᵀA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import FisherOptions

DENSE_CLASSES = 64
"""Up to so many classes the reduced basis comes from a dense eigendecomposition."""

MOST_PASSES = 10_000
"""Beyond so many rows per example, a factor has to be truncated."""

COPIES = 4
"""Arrays of the cotangents' size that exist at once while they are made, at most."""

SPLIT = 2.0**-46
"""Equal probabilities are told apart by this share of them, so that every eigenvalue has an interval of its own."""

BISECTIONS = 66
"""Up to 11 find the exponent, 53 the digits."""

SMALLEST = 1e-280
"""Eigenvalues below count as zero."""

TERMS = 12
"""Terms of the series in p/λ ≤ 1/32."""

NEGLIGIBLE = 2.0**-40
"""Shares p/λ below are left out of the series, but for its first term."""

CHUNK = 1 << 17
"""Numbers in a table of ``p_i − λ``, examples × eigenvalues × classes, and in what is made of it at a time."""

SUMS_TO_ONE = 64 * torch.finfo(torch.float32).eps
"""Outputs whose sum differs from 1 by no more are probabilities; in half precision, by no more than its epsilon."""


@dataclass(frozen=True)
class Factors:
    """Cotangents of a batch, scaled per example to unit Frobenius norm (no underflow in half precision).

    Attributes:
        columns: ``(b, C, R)`` float64; columns beyond an example's count are zero. ``S_i = scale_i ·
            columns_i``.
        scale: ``(b,)`` float64.
        counts: ``(b,)`` int64 columns per example.
    """

    columns: Tensor
    scale: Tensor
    counts: Tensor

    def spread(self, at: Tensor, n: int) -> Factors:
        """Place the cotangents at some of n positions ``(b,)``; the other positions have no columns."""
        if len(at) == n:
            return self

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(n, *values.shape[1:]).index_copy_(0, at, values)

        return Factors(placed(self.columns), placed(self.scale), placed(self.counts))


def factorise(logits: Tensor, options: FisherOptions, targets: Tensor | None, ids: np.ndarray) -> Factors:
    """Compute the cotangents S of every example of a batch.

    For a categorical output ``S Sᵀ = diag p − ppᵀ`` (Matena & Raffel 2023, §3; the reduced basis takes the
    eigenvectors), in expectation only when ``labels="sampled"``, and ``S = e_y − p`` when ``labels="true"``.

    Args:
        logits: ``(b, C)``, any floating dtype and device; finite.
        options: Checked options.
        targets: ``(b,)`` labels or ``(b, C)`` targets on the same device; needed for ``labels="true"``.
        ids: ``(b,)`` int64 positions of the examples in the data: they and the seed decide the draws.

    Raises:
        ArgumentError: One logit only, with a categorical likelihood; or a vocabulary of outputs and no truncation.
    """
    logits = logits.detach().to(torch.float64)
    if options.over_classes and logits.shape[1] < 2:
        raise ArgumentError(
            "likelihood: a categorical output needs at least 2 logits, got 1; use likelihood='bernoulli' "
            "for one logit "
            "per yes/no question, or likelihood='gaussian' for regression"
        )
    if options.labels == "expected" and (rows := width(logits, options)) > MOST_PASSES:
        if not options.over_classes:
            raise ArgumentError(
                f"labels: {rows:,} outputs are as many rows per example, and as many backward passes; take "
                "labels='sampled', or fewer outputs in forward="
            )
        option, other = ("rank", "energy") if options.basis == "reduced" else ("max_classes", "min_prob")
        truncated = getattr(options, other) is not None
        raise ArgumentError(
            f"{other if truncated else option}: {rows:,} rows per example are as many backward passes; truncate the "
            f"factor with {option}={' as well' if truncated else f' or {other}='}, or take labels='sampled'"
        )
    if options.labels == "expected":
        columns, counts = _expected(logits, options)
    else:
        columns = _residuals(logits, options, targets, ids)
        counts = torch.full((len(logits),), columns.shape[2], dtype=torch.int64, device=logits.device)
    # Two steps: entries below √(smallest float64) would vanish when squared.
    largest = columns.new_zeros(len(columns))
    if columns.numel():
        largest = torch.maximum(columns.amax(dim=(1, 2)), -columns.amin(dim=(1, 2)))
    columns /= torch.where(largest > 0, largest, 1.0)[:, None, None]
    norm = columns.square().sum(dim=(1, 2)).sqrt()
    columns /= torch.where(norm > 0, norm, 1.0)[:, None, None]
    return Factors(columns, largest * norm, counts)


def width(logits: Tensor, options: FisherOptions) -> int:
    """Return the most columns that an example's cotangents can have, before those of ``logits (b, C)`` are made."""
    most = options.most_rows(logits.shape[1])
    if options.energy is None and options.min_prob is None:
        return most
    log_p = torch.log_softmax(logits.detach().to(torch.float64), dim=1)
    if options.min_prob is not None:
        return min(most, max(1, int((log_p.exp() >= options.min_prob).sum(dim=1).max()))) if len(log_p) else 1
    return _reduced_width(log_p, (log_p.exp() * _others(log_p)).sum(dim=1), options)


def cotangent_bytes(logits: Tensor, options: FisherOptions) -> int:
    """Return the bytes that making the cotangents of ``logits (b, C)`` takes, temporary arrays included."""
    n, n_outputs = logits.shape
    columns = width(logits, options)
    if _eigendecomposed(n_outputs, columns, options):
        columns = n_outputs
    return COPIES * 8 * n * n_outputs * columns


def check_meaning(logits: Tensor, likelihood: str) -> None:
    """Refuse probabilities that are taken for logits ``(b, C)``, and logits that are taken for probabilities.

    Raises:
        DataError: They mean something else than ``likelihood`` says.
    """
    logits = logits.detach()
    if likelihood == "bernoulli" and logits.numel() >= 8 and bool(((logits >= 0) & (logits <= 1)).all()):
        warnings.warn(
            "likelihood: 'bernoulli' takes logits, but all of the model's outputs lie between 0 and 1; if it ends in a "
            "sigmoid, take that off, or give torch.logit(outputs) in forward=",
            stacklevel=4,
        )
    if likelihood == "probabilities":
        total = torch.logsumexp(logits.double(), dim=1).exp()
        bad = ((total - 1).abs() > 0.02).nonzero()
        if len(bad):
            raise DataError(
                f"likelihood: 'probabilities' are ≥ 0 and sum to 1, but those of example {int(bad[0])} of a batch sum "
                f"to {float(total[bad[0]]):.4g}; pass likelihood='categorical' if they are logits"
            )
    if likelihood == "categorical" and logits.shape[1] > 1 and len(logits):
        allowed = max(SUMS_TO_ONE, torch.finfo(logits.dtype).eps if logits.dtype.itemsize < 4 else 0.0)
        if bool((logits >= 0).all()) and bool(((logits.double().sum(dim=1) - 1).abs() <= allowed).all()):
            raise DataError(
                "likelihood: the model's outputs are all ≥ 0 and sum to 1, so they are probabilities, not logits: pass "
                "likelihood='probabilities', or take the softmax off the model (if they are logits all the same, add a "
                "constant to them in forward=, which changes no Fisher)"
            )


def _expected(logits: Tensor, options: FisherOptions) -> tuple[Tensor, Tensor]:
    n, n_outputs = logits.shape
    if options.likelihood == "gaussian":
        columns = torch.eye(n_outputs, dtype=torch.float64, device=logits.device).repeat(n, 1, 1)
    elif options.likelihood == "bernoulli":
        log_std = (torch.nn.functional.logsigmoid(logits) + torch.nn.functional.logsigmoid(-logits)) / 2
        columns = torch.diag_embed(log_std.exp())
    elif options.basis == "class":
        return _class_columns(logits, options)
    else:
        return _reduced_columns(logits, options)
    return columns, torch.full((n,), n_outputs, dtype=torch.int64, device=logits.device)


def _others(log_p: Tensor) -> Tensor:
    """``1 − p_y`` per class, ``(…, C)``, without cancellation when p_y is nearly one."""
    p = log_p.exp()
    top = log_p.argmax(dim=-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0).sum(dim=-1, keepdim=True)
    return (1 - p).scatter(-1, top, rest)


def _class_columns(logits: Tensor, options: FisherOptions) -> tuple[Tensor, Tensor]:
    """Columns √p_y (e_y − p), without the classes below ``min_prob`` or beyond ``max_classes``.

    The most probable class is never left out.
    """
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    n, n_outputs = p.shape
    order, counts, keep = torch.arange(n_outputs, device=p.device).expand(n, -1), None, None
    if options.min_prob is not None or options.max_classes is not None:
        sorted_p, order = torch.sort(p, dim=1, descending=True, stable=True)
        keep = sorted_p >= (options.min_prob or 0.0)
        keep[:, 0] = True
        keep[:, options.max_classes or n_outputs :] = False
        counts = keep.sum(dim=1)
        width = int(counts.max())
        order, keep = order[:, :width], keep[:, :width]
    columns = -p[:, :, None].expand(-1, -1, order.shape[1]).clone()
    columns.scatter_(1, order[:, None], _others(log_p).gather(1, order)[:, None])
    columns *= (log_p / 2).exp().gather(1, order)[:, None]
    if keep is None or counts is None:
        return columns, torch.full((n,), n_outputs, dtype=torch.int64, device=p.device)
    return columns.mul_(keep[:, None]), counts


def _reduced_columns(logits: Tensor, options: FisherOptions) -> tuple[Tensor, Tensor]:
    """Eigenvectors × √eigenvalue of diag p − ppᵀ, descending, the null one dropped.

    The largest entry of each is positive.
    """
    log_p = torch.log_softmax(logits, dim=1)
    n, n_outputs = log_p.shape
    # Dividing by the trace keeps the smallest eigenvalues of a confident example in range.
    p = log_p.exp()
    variance = _others(log_p).mul_(p)
    trace = variance.sum(dim=1)
    unit = _or_one(trace)
    width = _reduced_width(log_p, trace, options)
    if not _eigendecomposed(n_outputs, width, options):
        del p, variance  # of a vocabulary, as large as the cotangents
        values, vectors = leading_eigenpairs(log_p, width)
        values = values / unit[:, None]
    else:
        scaled = p / unit.sqrt()[:, None]  # 1 / unit would overflow where the trace is subnormal
        matrix = -scaled[:, :, None] * scaled[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).copy_(variance / unit[:, None])
        values, vectors = torch.linalg.eigh(matrix)
        values = values.flip(1)[:, :width].clamp_min(0.0)
        vectors = vectors.flip(2)[:, :, :width]
    leading = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    size = (values * unit[:, None]).sqrt() * (trace > 0)[:, None]
    columns = vectors.mul_(torch.where(leading < 0, -1.0, 1.0) * size[:, None, :])
    counts = torch.full((n,), width, dtype=torch.int64, device=log_p.device)
    if options.energy is not None:
        short = values.cumsum(dim=1) < options.energy - 1e-12
        counts = (short.sum(dim=1) + 1).clamp_max(width)
        counts = torch.where(trace > 0, counts, 1)
        kept = torch.arange(width, device=log_p.device) < counts[:, None]
        width = int(counts.max())
        columns = columns.mul_(kept[:, None, :])[:, :, :width]
    return columns, counts


def _reduced_width(log_p: Tensor, trace: Tensor, options: FisherOptions) -> int:
    most = options.most_rows(log_p.shape[1])
    return most if options.energy is None else min(most, needed(log_p, trace, options.energy))


def _eigendecomposed(n_outputs: int, width: int, options: FisherOptions) -> bool:
    """Whether cotangents come from a dense eigendecomposition, whatever their width."""
    reduced = options.labels == "expected" and options.over_classes and options.basis == "reduced"
    return reduced and (n_outputs <= DENSE_CLASSES or width >= n_outputs - 1)


def _residuals(logits: Tensor, options: FisherOptions, targets: Tensor | None, ids: np.ndarray) -> Tensor:
    """Columns ∇_logits log p(y) for the true label or for draws, divided by √n_samples."""
    if options.labels == "true":
        return _score(logits, _as_outcome(logits, options, targets, ids), options)[:, :, None]
    n_outputs = logits.shape[1]
    draws = []
    for example in ids:
        generator = np.random.Generator(np.random.Philox(key=options.seed, counter=[0, 0, 0, int(example)]))
        size = options.n_samples if options.over_classes else (options.n_samples, n_outputs)
        draws.append(generator.standard_normal(size) if options.likelihood == "gaussian" else generator.random(size))
    noise = torch.from_numpy(np.stack(draws)).to(logits.device)
    if options.likelihood == "gaussian":
        return (noise / options.n_samples**0.5).transpose(1, 2)
    if options.likelihood == "bernoulli":
        outcome = (noise < torch.sigmoid(logits)[:, None, :]).to(torch.float64)
    else:
        cumulative = torch.softmax(logits, dim=1).cumsum(dim=1)
        index = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True).clamp_max(n_outputs - 1)
        outcome = torch.nn.functional.one_hot(index, n_outputs).to(torch.float64)
    return _score(logits[:, None], outcome, options).transpose(1, 2) / options.n_samples**0.5


def _as_outcome(logits: Tensor, options: FisherOptions, targets: Tensor | None, ids: np.ndarray) -> Tensor:
    n, n_outputs = logits.shape
    if targets is None:
        raise DataError(
            "labels: labels='true' needs a label for every example, but the data has none; yield (inputs, labels)"
        )
    if options.over_classes:
        bad = (targets < 0) | (targets >= n_outputs)
        if bool(bad.any()):
            first = int(bad.to(torch.uint8).argmax())
            raise DataError(
                f"labels: example {ids[first]} has label {int(targets[first])}; expected 0 ≤ label < "
                f"{n_outputs} with labels='true'"
            )
        return torch.nn.functional.one_hot(targets.to(torch.int64), n_outputs).to(torch.float64)
    if targets.numel() != logits.numel():
        raise DataError(f"labels: expected one target per output, shape {(n, n_outputs)}, got {tuple(targets.shape)}")
    outcome = targets.reshape(n, n_outputs).to(torch.float64)
    bernoulli = options.likelihood == "bernoulli"
    usable = (outcome >= 0) & (outcome <= 1) if bernoulli else torch.isfinite(outcome)
    if not bool(usable.all()):
        first, output = (int(i) for i in (~usable).nonzero()[0])
        raise DataError(
            f"labels: example {ids[first]} has the target {float(outcome[first, output])} for output {output}; "
            f"expected {'0 ≤ target ≤ 1' if bernoulli else 'finite targets'} with likelihood={options.likelihood!r}"
        )
    return outcome


def _score(logits: Tensor, outcome: Tensor, options: FisherOptions) -> Tensor:
    """∇_logits log p(outcome), ``(…, C)``: outcome minus its mean, without cancellation."""
    if options.likelihood == "gaussian":
        return outcome - logits
    if options.likelihood == "bernoulli":
        return torch.where(outcome == 1, torch.sigmoid(-logits), outcome - torch.sigmoid(logits))
    log_p = torch.log_softmax(logits, dim=-1)
    return torch.where(outcome == 1, _others(log_p), -log_p.exp())


def needed(log_p: Tensor, trace: Tensor, energy: float) -> int:
    """Count the leading eigenvalues that certainly hold a share of the trace ``Σ p (1 − p)``, in every example.

    As λ_j is at least the (j+1)-th largest probability, the sum of these is enough.
    """
    at_least = torch.sort(log_p, dim=1, descending=True).values[:, 1:].exp().cumsum(dim=1)
    counts = (at_least < energy * trace[:, None]).sum(dim=1) + 1
    return int(counts.max()) if len(counts) else 1


def leading_eigenpairs(log_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Compute the largest eigenvalues of ``diag p − ppᵀ``, ``width`` of C − 1 at most, and their unit eigenvectors.

    Returns:
        ``(n, width)`` values, descending, and ``(n, C, width)`` vectors; both zero below ``SMALLEST``.
    """
    (n, n_outputs), p = log_p.shape, log_p.exp()
    order = _order_of_head(p, width)
    head = p.gather(1, order) * (1 - SPLIT * torch.arange(order.shape[1], device=p.device, dtype=p.dtype))
    least, few = head[:, width, None], max(1, CHUNK // n_outputs)
    tail = [
        _power_sums(p[i : i + few].scatter(1, order[i : i + few], 0.0), least[i : i + few]) for i in range(0, n, few)
    ]
    sums = torch.cat(tail, dim=1)
    p.scatter_(1, order, head)
    origin, delta = log_p.new_zeros(n, width), log_p.new_zeros(n, width)
    some = max(1, min(width, CHUNK // order.shape[1]))
    step = max(1, CHUNK // (some * order.shape[1]))
    for start in range(0, n, step):
        own = slice(start, start + step)
        for first in range(0, width, some):
            which = slice(first, min(first + some, width))
            origin[own, which], delta[own, which] = _roots(head[own], sums[:, own], least[own], which)
    there = (head[:, 1 : width + 1] > 0) & (head[:, :width] > SMALLEST)
    vectors = log_p.new_empty(n, width, n_outputs)
    for start in range(0, n, few):
        own = slice(start, start + few)
        for column in range(width):
            vector, own_p = vectors[own, column], p[own]
            torch.sub(own_p, origin[own, column, None], out=vector).sub_(delta[own, column, None])  # exact near λ
            torch.div(own_p, vector, out=vector).masked_fill_(~there[own, column, None], 0.0)
            vector /= vector.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return torch.where(there, origin + delta, 0.0), vectors.mT


def _order_of_head(p: Tensor, width: int) -> Tensor:
    """The classes with probabilities above a 32nd of the one that follows the first ``width``: descending, ``(n, m)``.

    Equal ones by class.
    """
    least = p.topk(width + 1, dim=1).values[:, -1:]
    m = max(width + 1, int((p > least / 32).sum(dim=1).max()))
    if 4 * m > p.shape[1]:
        return torch.sort(p, dim=1, descending=True, stable=True).indices
    classes = p.topk(m, dim=1).indices.sort(dim=1).values
    return classes.gather(1, torch.sort(p.gather(1, classes), dim=1, descending=True, stable=True).indices)


def _or_one(unit: Tensor) -> Tensor:
    return torch.where(unit > 0, unit, 1.0)


def _power_sums(p: Tensor, unit: Tensor) -> Tensor:
    """``Σ (p / unit)^m`` for m = TERMS … 1, ``(TERMS, n, 1)``; every p is at most a 32nd of its unit ``(n, 1)``."""
    share = p / _or_one(unit)
    sums = [share.sum(dim=1, keepdim=True)]
    power = share = torch.where(share > NEGLIGIBLE, share, 0.0)
    for _ in range(1, TERMS):
        power = power * share
        sums.append(power.sum(dim=1, keepdim=True))
    return torch.stack(sums[::-1])


def _roots(head: Tensor, tail: Tensor, least: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    """The eigenvalues of some places in the order, each as a probability and the distance from it, ``(n, k)``.

    Args:
        head: ``(n, m)`` the largest probabilities, told apart, descending.
        tail: Power sums of all others.
        least: ``(n, 1)`` their unit.
        which: Which places.
    """
    upper, lower = head[:, which], head[:, which.start + 1 : which.stop + 1]
    gap = upper - lower
    # Far below every λ a probability's term is a series in p/λ, of which its moments are enough.
    unit = head[:, which.stop, None]
    near, unit = int((head > unit / 32).sum(dim=1).max()), _or_one(unit)
    all_near = near == head.shape[1] and not bool(tail.any())
    powers = torch.arange(TERMS, 0, -1, device=head.device)[:, None, None]
    head, moments = head[:, :near], _power_sums(head[:, near:], unit) + tail * (least / unit) ** powers

    def g(origin: Tensor, delta: Tensor) -> Tensor:
        inverse, series = unit / (origin + delta), torch.zeros_like(origin)
        for moment in () if all_near else moments:
            series = (series + moment) * inverse
        return (head[:, None, :] / ((head[:, None, :] - origin[:, :, None]) - delta[:, :, None])).sum(dim=2) - series

    # From the nearer end of the interval the distance to λ is known to its last digit.
    below = g(lower, gap / 2) > 0
    origin, sign = torch.where(below, lower, upper), torch.where(below, 1.0, -1.0)
    # A root nearer than p·gap/2 would need Σ p_i > 1.
    low, high = (origin * gap / 2).clamp_min(SMALLEST * SPLIT / 4), gap / 2
    for _ in range(BISECTIONS):
        middle = low.sqrt() * high.sqrt()
        further = (g(origin, sign * middle) < 0) == below
        low, high = torch.where(further, middle, low), torch.where(further, high, middle)
    return origin, sign * low.sqrt() * high.sqrt()
