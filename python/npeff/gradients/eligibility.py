"""Check whether a model has per-example gradients, for which of its parameters, and on which device.

No layer and no computation may mix examples or be random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from npeff.batches.batches import Batch
from npeff.errors import ArgumentError, ModelError, NpeffError
from npeff.gradients.fallback import TOLERANCE
from npeff.models.devices import usable_device
from npeff.models.parameters import Parameters

BLOCKS = "blocks"
"""The pattern that stands for :func:`linear_in_blocks`."""


def linear_in_blocks(model: nn.Module) -> frozenset[str]:
    """Name the weights of the linear layers in a model's transformer blocks.

    Blocks are the outermost lists of modules (``nn.ModuleList``), whatever a model calls them. Embeddings, norms,
    biases, convolutions, and everything outside the blocks, such as the head, are left out. Linear layers are
    ``nn.Linear`` and its subclasses, the ``Conv1D`` of GPT-2, the projections of ``nn.MultiheadAttention``, and the
    stacked matrices of experts.

    Raises:
        ArgumentError: The model has no such layers.
    """
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if any(path.startswith(prefix) for prefix in lists)
        for name, tensor in module.named_parameters(recurse=False)
        if _is_linear(module, name, tensor)
    )
    if not found:
        raise ArgumentError(
            f"parameters: {BLOCKS!r} stands for the linear layers of transformer blocks, and {type(model).__name__} "
            "has none within an nn.ModuleList; name its parameters by patterns"
        )
    return found


def _is_linear(module: nn.Module, name: str, tensor: Tensor) -> bool:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return name.endswith("proj_weight")
    if kind.endswith("Experts"):
        return tensor.dim() == 3
    return name == "weight" and (isinstance(module, nn.Linear) or kind == "Conv1D")


def select_parameters(model: nn.Module, patterns: str | Sequence[str] | None) -> Parameters:
    """Select the floating-point parameters whose names match, in the model's order; tied ones count once, by any name.

    A name is taken if one of the shell patterns matches it (or there are only exclusions) and no ``"!…"`` does.
    ``"blocks"`` matches :func:`linear_in_blocks`.

    Raises:
        ArgumentError: Nothing matches, or a pattern matches nothing.
    """
    check_initialised(model)
    floating = [(name, tensor) for name, tensor in model.named_parameters() if not _no_fisher(tensor)]
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(name)
    if not floating:
        check_eligible(model)  # quantised modules have no parameters of their own
        why = "".join(f" ({line['parameter']}: {line['reason']})" for line in left_out(model)[:1])
        raise ArgumentError(f"model: {type(model).__name__} has no floating-point parameters{why}")
    if patterns is not None and not isinstance(patterns, Iterable):
        raise ArgumentError(f"parameters: expected a pattern or a list of patterns, got {patterns!r}")
    wanted = ["*"] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted or not all(isinstance(pattern, str) for pattern in wanted):
        raise ArgumentError(f"parameters: expected a pattern or a list of patterns, got {patterns!r}")
    include = [pattern for pattern in wanted if not pattern.startswith("!")] or ["*"]
    exclude = [pattern[1:] for pattern in wanted if pattern.startswith("!")]
    names = list(chain.from_iterable(aliases.values()))
    blocks = linear_in_blocks(model) if BLOCKS in (*include, *exclude) else frozenset()

    def fits(name: str, pattern: str) -> bool:
        return name in blocks if pattern == BLOCKS else fnmatchcase(name, pattern)

    for pattern in (*include, *exclude):
        if not any(fits(name, pattern) for name in names):
            raise ArgumentError(f"parameters: {pattern!r} matches none of {_listing(names)}")

    def matches(tensor: Tensor, some: list[str]) -> bool:
        return any(fits(name, pattern) for name in aliases[id(tensor)] for pattern in some)

    chosen = [
        (name, tensor.shape) for name, tensor in floating if matches(tensor, include) and not matches(tensor, exclude)
    ]
    if not chosen:
        without = "".join(f"; {line['parameter']}: {line['reason']}" for line in left_out(model)[:5])
        raise ArgumentError(f"parameters: {wanted!r} leaves none of {_listing(names)}{without}")
    return Parameters.of(chosen)


def left_out(model: nn.Module) -> list[dict[str, str]]:
    """List the parameters that are no part of any Fisher, whatever the patterns, as lines of the coverage."""
    return [
        {"parameter": name, "rule": "left out", "reason": reason}
        for name, tensor in model.named_parameters()
        if (reason := _no_fisher(tensor))
    ]


def _no_fisher(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex parameters have no Fisher here; store real and imaginary part, and join them by torch.complex"
    coarse = tensor.dtype.itemsize < 2  # float8, as integers
    return "" if tensor.is_floating_point() and not coarse else f"{str(tensor.dtype)[6:]} parameters have no gradient"


def _listing(names: list[str]) -> str:
    return f"the {len(names)} parameters {', '.join(names[:20])}" + (" …" if len(names) > 20 else "")


@contextmanager
def placed(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Move the model to one device within the block, and back to its own afterwards.

    Raises:
        ArgumentError: The model lies on several devices, or nowhere, or the device cannot be used.
    """
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1:
        raise ArgumentError(
            f"model: its parameters and buffers lie on {', '.join(sorted(map(str, devices)))}; expected one "
            "device; call model.to(device)"
        )
    if not devices:
        check_eligible(model)
        raise ArgumentError(f"model: {type(model).__name__} has no parameters")
    home = devices.pop()
    if home.type == "meta":
        raise ArgumentError("model: its parameters are on the meta device, without values; load its weights first")
    target = home if device is None else usable_device(device)
    if target.type == home.type and (target.index is None or target.index == home.index):
        target = home
    if target == home:
        yield home
        return
    try:
        model.to(target)
        yield target
    finally:
        model.to(home)


def check_initialised(model: nn.Module) -> None:
    """Refuse lazy parameters, which have no shape before the model was called.

    Raises:
        ModelError: Naming them.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"model: {', '.join(lazy[:5])}{' …' if len(lazy) > 5 else ''} "
            f"{'have' if len(lazy) > 1 else 'has'} no shape yet (lazy modules); call the model once on a batch of "
            "inputs, then load its weights if there are any"
        )


def check_eligible(model: nn.Module) -> None:
    """Refuse layers that mix examples, or that are random.

    Raises:
        ModelError: Naming the modules and the remedy.
    """
    check_initialised(model)
    problems = [
        f"{name or type(module).__name__} ({problem})"
        for name, module in model.named_modules()
        for problem in _problems(module)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ModelError(f"model: per-example gradients do not exist as it stands: {shown}")


def _problems(module: nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    origin = type(module).__module__.split(".")
    if kind.endswith("PackedParams"):  # of a quantised module, which is named itself
        return
    if (origin[0] == "torch" and "quantized" in origin) or any(
        tensor.is_quantized for tensor in chain(module.parameters(False), module.buffers(False)) if not is_lazy(tensor)
    ):
        yield f"{kind} is quantised, so no gradient passes through it: take the model as it was before quantisation"
    elif isinstance(module, _InstanceNorm):
        if module.training and module.track_running_stats:
            yield f"{kind} in training mode updates its running statistics: call model.eval()"
    elif isinstance(module, _BatchNorm):
        if module.running_mean is None:
            yield (
                f"{kind} without running statistics normalises by the batch: "
                "build it with track_running_stats=True, or use GroupNorm"
            )
        elif module.training:
            yield f"{kind} in training mode normalises by the batch: call model.eval()"
    elif isinstance(module, _DropoutNd):
        if module.training and module.p > 0:
            yield f"{kind} is active, so gradients are random: call model.eval()"
    elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        if module.training and module.dropout > 0:
            yield f"{kind} has active dropout, so gradients are random: call model.eval()"
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        yield (
            f"{kind} with max_norm rewrites its weight in every forward pass: renormalise it once and set max_norm=None"
        )


def check_deterministic(run: Callable[[Batch], Tensor], batch: Batch, logits: Tensor, precision: torch.dtype) -> None:
    """Check that the model gives a batch the same logits again.

    Raises:
        ModelError: It does not.
    """
    if differ(run(batch).detach(), logits, precision):
        raise ModelError(
            "model: two passes over the same batch give different logits; make it deterministic (model.eval() switches "
            "dropout off; dropout by a function needs training=False)"
        )


def check_independence(
    run: Callable[[Batch], Tensor], batch: Batch, logits: Tensor, precision: torch.dtype, *, half: bool = False
) -> None:
    """Check that the first and the last example alone have the ``logits (b, C)`` that they have in the batch.

    With ``half``, every second example is run without the others instead. A batch that cannot be cut is called again as
    it is.

    Raises:
        ModelError: The logits differ.
    """
    logits = logits.detach()
    if batch.places is not None and batch.n_sequences < batch.n_examples:
        some = batch.one_each()
        batch, logits = batch.take(some), logits[some]
    if batch.n_examples == 1 or not batch.sliceable:
        check_deterministic(run, batch, logits, precision)
        return
    if half:
        part = run(batch.take(slice(0, None, 2))).detach()
        if differ(part, logits[::2], precision):
            example = 2 * int((part - logits[::2]).abs().amax(dim=1).argmax())
            found, when = part[example // 2, None], "without half of the others"
            alone = _alone(run, batch, example)
            if alone is not None and differ(alone, logits[example : example + 1], precision):
                found, when = alone, "when it is alone"
            raise ModelError(_explain(run, batch, logits, example, found, precision, when))
        return
    for example in (0, batch.n_examples - 1):
        alone = _alone(run, batch, example)
        if alone is not None and differ(alone, logits[example : example + 1], precision):
            raise ModelError(_explain(run, batch, logits, example, alone, precision, "when it is alone"))


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Say whether logits differ by more than rounding in a dtype.

    Raises:
        ModelError: Their shapes differ.
    """
    if one.shape != other.shape:
        raise ModelError(
            f"model: the same examples have logits of shape {tuple(other.shape)} within their batch and "
            f"{tuple(one.shape)} when called again; make their number independent of the batch, or choose them "
            "in forward=callable(model, batch) -> logits"
        )
    one, other = one.to(torch.float64), other.to(torch.float64)
    finite = torch.isfinite(one) & torch.isfinite(other)
    gap = torch.where(finite, one - other, 0.0).abs()
    size = torch.where(finite, other, 0.0).abs().max().clamp_min(1.0)
    return bool((gap > 5 * TOLERANCE.get(dtype, 2e-4) * size).any())


def _alone(run: Callable[[Batch], Tensor], batch: Batch, example: int) -> Tensor | None:
    """The example's logits ``(1, C)`` in a batch of its own.

    A model that cannot be called on one example, as with ``.squeeze()``, is called on this one and another; None where
    that would be the batch itself.
    """
    one = batch.take(torch.tensor([example]))
    try:
        return run(one).detach()
    except NpeffError:
        if batch.n_examples == 2:
            return None
        two = batch.take(torch.tensor([example, (example + 1) % batch.n_examples]))
        return run(two).detach()[:1]


def _explain(
    run: Callable[[Batch], Tensor],
    batch: Batch,
    logits: Tensor,
    example: int,
    alone: Tensor,
    precision: torch.dtype,
    when: str,
) -> str:
    check_deterministic(run, batch, logits, precision)
    gap = float((alone - logits[example : example + 1]).abs().max())
    said = f"model: example {example} of a batch has other logits {when} (largest difference {gap:.3g})"
    try:
        twice = run(batch.take(torch.tensor([example, example]))).detach()[:1]
    except NpeffError:
        twice = alone
    if gap < float(logits.abs().max().clamp_min(1.0)) and precision in (torch.bfloat16, torch.float16):
        return (
            f"{said}, computed in {str(precision).removeprefix('torch.')}: too much for rounding, too little to "
            "tell why; compute in float32, without autocast"
        )
    if differ(twice, alone, precision):
        return (
            f"{said}, and others again in a batch of twice itself: examples influence each other by their number, as "
            "through a sum over the batch, or the batch is cut wrongly; remove that dependence in forward=, or pass "
            f"batches of one example. To take it, {batch.how_cut()}"
        )
    return (
        f"{said}, but not in a batch of twice itself: examples influence each other, as through a mean over the batch, "
        "or the batch is cut wrongly; use model.eval(), remove that dependence in forward=, or pass batches of one "
        f"example. To take it, {batch.how_cut()}"
    )
