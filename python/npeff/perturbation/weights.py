"""Move a model's weights along a direction: in place and back, or without writing to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from npeff.errors import ArgumentError, Terminated

TensorsByName = Mapping[str, Tensor]
"""Parameter-shaped tensors by parameter name, as from :meth:`npeff.Components.state_dict`; a missing one is 0."""


class Weights:
    """Moves the weights of a model in place, and restores them bit for bit from copies.

    Only the tensors that a direction touches are copied, once. Tied weights are one tensor and move once. Values
    are computed in float32 (float64 for float64 weights) and rounded to the weights' dtype last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False))
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._moved: set[int] = set()

    def move(self, direction: TensorsByName, magnitude: float) -> None:
        """Set θ to (θ as it was + magnitude · direction), of parameter-shaped tensors on the model's device."""
        parts = {id(self._tensors[name]): (self._tensors[name], part) for name, part in direction.items()}
        for key in self._moved - parts.keys():
            self._put_back(key)
        for key, (tensor, part) in parts.items():
            if key not in self._saved:
                self._saved[key] = tensor, tensor.detach().clone()
            saved = self._saved[key][1]
            self._moved.add(key)
            with _writing(tensor):
                if part.dtype == saved.dtype:
                    tensor.copy_(saved).add_(part, alpha=magnitude)
                else:
                    tensor.copy_(moved_by(saved, part, magnitude))

    @contextmanager
    def at(self, direction: TensorsByName, magnitude: float) -> Iterator[None]:
        """Move the weights within a ``with`` block, as :meth:`move` does, and restore them at its end."""
        try:
            self.move(direction, magnitude)
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Restore all weights.

        Raises:
            KeyboardInterrupt: If it came during the restoration, after all weights are restored.
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

    def realised(self, direction: TensorsByName, magnitude: float) -> float:
        """Compute the norm of the change after rounding to the weights' dtype, relative to the norm asked for.

        The quotient is 1 in float32, and far from 1 if half-precision weights lose a small change.
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
    """Compute ``base + magnitude · part`` in float32, or in float64 for a float64 base."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return base.to(wide) + magnitude * part.to(wide)


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """Allow writing to a parameter, also to one made under ``torch.inference_mode()``."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers and training modes at the end, whatever the forward passes did to them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    saved = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for (module, name, buffer), before in zip(buffers, saved, strict=True):
            module._buffers[name] = buffer
            if buffer is None or before is None or (buffer.shape == before.shape and torch.equal(buffer, before)):
                continue
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(before)


@contextmanager
def applied(model: nn.Module, direction: TensorsByName, magnitude: float = 1.0) -> Iterator[nn.Module]:
    """Move the model's weights to ``θ + magnitude · direction`` within a ``with`` block; then restore θ, bit for bit.

    Only the tensors that the direction touches are copied. Everything that uses the model sees the moved weights
    (``generate``, hooks, compiled versions). Any change of these tensors inside the block is undone at its end, also
    after an exception or Ctrl-C.

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
    placed, size = on_model(model, direction, "direction"), checked_magnitude(magnitude)
    with Weights(model).at(placed, size):
        yield model


@contextmanager
def ablated(
    model: nn.Module,
    directions: TensorsByName | Sequence[TensorsByName],
    origin: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Remove the weights' part along some directions within a ``with`` block: ``θ − P (θ − θ₀)``.

    P is the projection onto the span of the directions. For one direction g this is ``θ − ĝ ĝᵀ(θ − θ₀)``, ĝ = g/‖g‖.
    With ``origin`` (the weights before training, or before fine-tuning) only what was learned along g is removed;
    without it θ₀ = 0, and the weights themselves lose their part along g. They are restored as by :func:`applied`.

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
    with Weights(model).at(_part_along(model, placed, origin), -1.0):
        yield model


class Moved(nn.Module):
    """A model at ``θ + magnitude · direction`` whose own parameters are never written to.

    Calls go through ``torch.func.functional_call`` with the moved tensors in place of the model's parameters. These
    stay as they are, may serve other users of the model at the same time, and receive gradients. Tied weights stay
    tied. Only ``forward`` is moved; for ``generate`` and similar methods use :func:`applied`.

    Args:
        model: Any model; kept, not copied.
        direction: As for :func:`applied`.
        magnitude: A number, or a ``torch.nn.Parameter`` of one element to be learned.

    Attributes:
        model: The model.
        magnitude: ``()`` tensor; may be set while the model is in use.

    Raises:
        ArgumentError: The direction does not fit the model.
    """

    magnitude: Tensor

    def __init__(self, model: nn.Module, direction: TensorsByName, magnitude: float | nn.Parameter = 1.0) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._names: list[str] = []
        for i, (name, part) in enumerate(on_model(model, direction, "direction").items()):
            self._names.append(name)
            self.register_buffer(f"direction_{i}", part, persistent=False)
        if isinstance(magnitude, nn.Parameter):
            if magnitude.numel() != 1:
                raise ArgumentError(f"magnitude: expected a parameter of one element, got {tuple(magnitude.shape)}")
            self.register_parameter("magnitude", magnitude)
        else:
            device = next(iter(model.parameters())).device
            value = torch.tensor(checked_magnitude(magnitude), device=device)
            self.register_buffer("magnitude", value, persistent=False)

    def __repr__(self) -> str:
        size = float(self.magnitude.detach())
        return f"Moved({type(self.model).__name__}, {len(self._names)} tensors, magnitude {size:.4g})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's output at the moved weights."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        moved = {
            name: moved_by(tensors[name], self.get_buffer(f"direction_{i}"), self.magnitude).to(tensors[name].dtype)
            for i, name in enumerate(self._names)
        }
        return functional_call(self.model, moved, args, kwargs)


def _part_along(
    model: nn.Module, directions: Sequence[TensorsByName], origin: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """``P (θ − θ₀) = Gᵀ (G Gᵀ)⁺ G (θ − θ₀)``, parameter-shaped, float64; one parameter's directions at a time.

    Raises:
        ArgumentError: Nothing is to be removed, or ``origin`` lacks a parameter.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    names = list(dict.fromkeys(name for direction in directions for name in direction))
    if not names:
        raise ArgumentError("directions: every one is zero, so there is nothing to remove")
    start: Mapping[str, Tensor] = {}
    if origin is not None:
        if not isinstance(origin, Mapping):
            raise ArgumentError(f"origin: expected tensors by parameter name, got {type(origin).__name__}")
        first = _first_names(model)
        known = {first[name]: given for name, given in origin.items() if name in first}
        if missing := [name for name in names if name not in known]:
            raise ArgumentError(f"origin: expected every parameter that is touched, but {missing[0]!r} is missing")
        start = on_model(model, {name: known[name] for name in names}, "origin")

    def rows(name: str) -> Tensor:
        zero = torch.zeros_like(tensors[name])
        return torch.stack([direction.get(name, zero).double().reshape(-1) for direction in directions])

    at = next(iter(tensors.values())).device
    gram = torch.zeros(len(directions), len(directions), dtype=torch.float64, device=at)
    products = torch.zeros(len(directions), dtype=torch.float64, device=at)
    for name in names:
        G, theta = rows(name), tensors[name].detach().double().reshape(-1)
        if name in start:
            theta = theta - start[name].double().reshape(-1)
        gram += (G @ G.mT).to(at)
        products += (G @ theta).to(at)
    weights = torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ products
    return {name: (weights.to(tensors[name].device) @ rows(name)).reshape(tensors[name].shape) for name in names}


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter's tensor: tied parameters have one in common."""
    first: dict[int, str] = {}
    tensors = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def on_model(model: nn.Module, direction: Any, argument: str) -> dict[str, Tensor]:
    """Check a direction against the model, and move it to the device of each parameter, without its zero tensors.

    Returns:
        Float32 tensors, or float64 for float64 parameters, by the first name of each parameter.

    Raises:
        ArgumentError: The direction is no mapping, its names or shapes differ from the model's, or it is not finite.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(direction, Mapping):
        raise ArgumentError(
            f"{argument}: expected tensors by parameter name, as components.state_dict(j) gives, "
            f"got {type(direction).__name__}"
        )
    tensors, first = dict(model.named_parameters(remove_duplicate=False)), _first_names(model)
    placed: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for name, given in direction.items():
        if name not in tensors:
            some = ", ".join(list(tensors)[:6]) + (" …" if len(tensors) > 6 else "")
            raise ArgumentError(f"{argument}: the model has no parameter {name!r}; it has {some}")
        parameter = tensors[name]
        if (other := seen.setdefault(first[name], name)) != name:
            raise ArgumentError(f"{argument}: {other} and {name} are one tied tensor in the model; give it once")
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        try:
            part = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{argument}: {name} is no tensor of numbers: {error}") from error
        if part.shape != parameter.shape:
            raise ArgumentError(
                f"{argument}: {name} has shape {tuple(parameter.shape)} in the model, got {tuple(part.shape)}"
            )
        part = part.detach().to(parameter.device, wide)
        if not bool(torch.isfinite(part).all()):
            raise ArgumentError(f"{argument}: {name} has values that are not finite")
        if bool(part.any()):
            placed[first[name]] = part
    return placed


def checked_magnitude(value: Any) -> float:
    """Return the value as a finite number.

    Raises:
        ArgumentError: The value is no finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(f"magnitude: expected a finite number, got {value!r}")
    return number
