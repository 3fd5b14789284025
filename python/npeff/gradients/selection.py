"""Select the parameters, and place the model on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError
from npeff.gradients.eligibility import check_eligible, check_initialised
from npeff.models.devices import usable_device
from npeff.models.parameters import Parameters

BLOCKS = "blocks"
"""The pattern that stands for :func:`block_weights`."""


def block_weights(model: nn.Module) -> frozenset[str]:
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
    """Select the floating-point parameters whose names match.

    Args:
        model: The model; tied parameters count once and can be selected by any of their names.
        patterns: Shell patterns; a name is taken if one matches it (or there are only exclusions) and no
            ``"!…"`` does. ``"blocks"`` matches :func:`block_weights`.

    Returns:
        Parameters in the model's order.

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
    blocks = block_weights(model) if BLOCKS in (*include, *exclude) else frozenset()

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
    """Lines of the coverage about parameters that are no part of any Fisher, whatever the patterns."""
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
    """The model on one device, and back on its own afterwards.

    Raises:
        ArgumentError: It lies on several devices, or nowhere, or the device cannot be used.
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
