"""Moving a model's weights along a direction: in place and back, or without touching them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, Terminated

Direction = Mapping[str, Tensor]
"""Parameter-shaped tensors by parameter name, as :meth:`npeff.Components.state_dict` gives; what is missing is 0."""


class Weights:
    """The weights of a model, moved in place, and put back bit for bit from copies of what was moved.

    Only the tensors that a direction touches are copied, once. Tied weights are one tensor and move once. Values
    are computed in float32 (float64 for float64 weights) and rounded to the weights' dtype last.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False))
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._moved: set[int] = set()

    def move(self, direction: Direction, magnitude: float) -> None:
        """Set θ to (θ as it was + magnitude · direction).

        Args:
            direction: Parameter-shaped tensors on the model's device.
            magnitude: What they are multiplied by.
        """
        parts = {id(self._tensors[name]): (self._tensors[name], part) for name, part in direction.items()}
        stale = self._moved - parts.keys()
        for key in stale:
            self._put_back(key)
        for key, (tensor, part) in parts.items():
            if key not in self._saved:
                self._saved[key] = tensor, tensor.detach().clone()
            self._moved.add(key)
            with _writing(tensor):
                tensor.copy_(moved_by(self._saved[key][1], part, magnitude))

    def restore(self) -> None:
        """Put everything back.

        Raises:
            KeyboardInterrupt: One that comes meanwhile, once all is back.
            Terminated: Likewise.
        """
        try:
            self._put_all_back()
        except (KeyboardInterrupt, Terminated):
            self._put_all_back()
            raise

    def _put_all_back(self) -> None:
        for key in list(self._moved):
            self._put_back(key)

    def _put_back(self, key: int) -> None:
        tensor, saved = self._saved[key]
        with _writing(tensor):
            tensor.copy_(saved)
        self._moved.discard(key)

    def realised(self, direction: Direction, magnitude: float) -> float:
        """Norm of the change that rounding to the weights' dtype leaves, relative to the norm asked for.

        1 in float32; far from it where half-precision weights swallow a small change.
        """
        asked = left = 0.0
        for name, part in direction.items():
            tensor = self._tensors[name]
            saved = self._saved.get(id(tensor), (tensor, tensor))[1].detach()
            change = moved_by(saved, part, magnitude).to(saved.dtype).double() - saved.double()
            asked += float((magnitude * part.double()).square().sum())
            left += float(change.square().sum())
        return (left / asked) ** 0.5 if asked else 1.0


def moved_by(base: Tensor, part: Tensor, magnitude: float | Tensor) -> Tensor:
    """``base + magnitude · part`` in float32, or float64 for a float64 base."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return base.to(wide) + magnitude * part.to(wide)


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """Let a parameter be written, also one made under ``torch.inference_mode()``."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


@contextmanager
def applied(model: nn.Module, direction: Direction, magnitude: float = 1.0) -> Iterator[nn.Module]:
    """Within it the model's weights are ``θ + magnitude · direction``; afterwards θ again, bit for bit.

    No copy of the model is made: of the tensors that the direction touches alone, for the way back. Everything that
    uses the model sees the moved weights (``generate``, hooks, compiled versions). Whatever happens to those tensors
    inside is undone at the end, also after an exception or Ctrl-C.

    Args:
        model: Any model; tied weights move once.
        direction: Tensors (or arrays) by parameter name, each of its parameter's shape:
            ``components.state_dict(j)``, of unit norm, or any other.
        magnitude: What the direction is multiplied by; negative to go the other way.

    Yields:
        The model.

    Raises:
        ArgumentError: The direction has a name or a shape that the model has not, or is not finite.
    """
    placed = on_model(model, direction, "direction")
    weights = Weights(model)
    try:
        weights.move(placed, checked_magnitude(magnitude))
        yield model
    finally:
        weights.restore()


@contextmanager
def ablated(
    model: nn.Module,
    directions: Direction | Sequence[Direction],
    origin: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Within it the weights have no part along the directions: ``θ − P (θ − θ₀)``, P the projection onto their span.

    For one direction g this is ``θ − ĝ ĝᵀ(θ − θ₀)``, ĝ = g/‖g‖. With ``origin`` (the weights before training, or
    before fine-tuning) only what was learned along g is removed; without it θ₀ = 0, and the weights themselves
    lose their part along g. Put back as by :func:`applied`.

    Args:
        model: Any model.
        directions: One direction, or several to be removed together.
        origin: θ₀ by parameter name; every parameter that a direction touches must be there.

    Yields:
        The model.

    Raises:
        ArgumentError: A direction or ``origin`` does not fit the model, or every direction is zero.
    """
    several = [directions] if isinstance(directions, Mapping) else list(directions)
    placed = [on_model(model, direction, "directions") for direction in several]
    change = _part_along(model, placed, origin)
    weights = Weights(model)
    try:
        weights.move(change, -1.0)
        yield model
    finally:
        weights.restore()


def _part_along(
    model: nn.Module, directions: Sequence[Direction], origin: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """``P (θ − θ₀)``, parameter-shaped, float64.

    Raises:
        ArgumentError: Nothing is to be removed, or ``origin`` lacks a parameter.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    names = list(dict.fromkeys(name for direction in directions for name in direction))
    if not any(bool(part.any()) for direction in directions for part in direction.values()):
        raise ArgumentError("directions: every one is zero, so there is nothing to remove")
    start: Mapping[str, Tensor] = {}
    if origin is not None:
        if missing := [name for name in names if name not in origin]:
            raise ArgumentError(f"origin: expected every parameter that is touched, but {missing[0]!r} is missing")
        start = on_model(model, {name: origin[name] for name in names}, "origin")
    theta = _flat({name: tensors[name].detach() for name in names}, names, tensors)
    theta = theta - _flat(start, names, tensors)
    G = torch.stack([_flat(direction, names, tensors) for direction in directions])
    _, values, V = torch.linalg.svd(G, full_matrices=False)
    V = V[values > 1e-7 * values.max()]
    sizes = [tensors[name].numel() for name in names]
    parts = (V.T @ (V @ theta)).split(sizes)
    return {name: part.reshape(tensors[name].shape) for name, part in zip(names, parts, strict=True)}


def _flat(direction: Direction, names: Sequence[str], like: Mapping[str, Tensor]) -> Tensor:
    parts = [direction[name] if name in direction else torch.zeros_like(like[name]) for name in names]
    return torch.cat([part.detach().double().reshape(-1) for part in parts])


def on_model(model: nn.Module, direction: Any, argument: str) -> dict[str, Tensor]:
    """A direction checked against the model, on the device of each parameter, without its zero tensors.

    Returns:
        Tensors by name, in the order given, float32, or float64 for float64 parameters.

    Raises:
        ArgumentError: It is no mapping, names or shapes differ from the model's, or it is not finite.
    """
    if not isinstance(direction, Mapping):
        raise ArgumentError(
            f"{argument}: expected tensors by parameter name, as components.state_dict(j) gives, "
            f"got {type(direction).__name__}"
        )
    tensors = dict(model.named_parameters(remove_duplicate=False))
    placed: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, given in direction.items():
        if name not in tensors:
            raise ArgumentError(f"{argument}: the model has no parameter {name!r}; it has {_some(tensors)}")
        parameter = tensors[name]
        if (other := seen.setdefault(id(parameter), name)) != name:
            raise ArgumentError(f"{argument}: {other} and {name} are one tied tensor in the model; give it once")
        part = torch.as_tensor(given)
        if part.shape != parameter.shape:
            raise ArgumentError(
                f"{argument}: {name} has shape {tuple(parameter.shape)} in the model, got {tuple(part.shape)}"
            )
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        part = part.detach().to(parameter.device, wide)
        if not bool(torch.isfinite(part).all()):
            raise ArgumentError(f"{argument}: {name} has values that are not finite")
        if bool(part.any()):
            placed[name] = part
    return placed


def checked_magnitude(value: Any) -> float:
    """A finite number.

    Raises:
        ArgumentError: It is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(f"magnitude: expected a finite number, got {value!r}")
    return number


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:6]) + (" …" if len(names) > 6 else "")
