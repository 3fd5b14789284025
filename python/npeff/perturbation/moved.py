"""A model at moved weights, without writing to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from npeff.perturbation.weights import Direction, checked_magnitude, moved_by, on_model


class Moved(nn.Module):
    """A model at ``θ + magnitude · direction`` whose own parameters are never written to.

    Calls go through ``torch.func.functional_call`` with the moved tensors in place of the model's, which therefore
    stay as they are, may be shared with other users of the model at the same time, and receive gradients.
    ``torch.nn.utils.parametrize`` was not chosen: it changes the model (class, state-dict names) and loses ties. Tied
    weights stay tied. Only ``forward`` is moved; for ``generate`` and the like use :func:`applied`.

    Args:
        model: Any model; held, not copied.
        direction: As for :func:`applied`.
        magnitude: A number, or a ``torch.nn.Parameter`` of one element to be learned.

    Attributes:
        model: The model.
        magnitude: ``()`` tensor; may be set while the model is in use.

    Raises:
        ArgumentError: The direction does not fit the model.
    """

    magnitude: Tensor

    def __init__(self, model: nn.Module, direction: Direction, magnitude: float | nn.Parameter = 1.0) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._names: list[str] = []
        for i, (name, part) in enumerate(on_model(model, direction, "direction").items()):
            self._names.append(name)
            self.register_buffer(f"direction_{i}", part, persistent=False)
        if isinstance(magnitude, nn.Parameter):
            self.register_parameter("magnitude", magnitude)
        else:
            device = next(iter(model.parameters())).device
            value = torch.tensor(checked_magnitude(magnitude), device=device)
            self.register_buffer("magnitude", value, persistent=False)

    def __repr__(self) -> str:
        size = float(self.magnitude.detach())
        return f"Moved({type(self.model).__name__}, {len(self._names)} tensors, magnitude {size:.4g})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at the moved weights."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        moved = {
            name: moved_by(tensors[name], self.get_buffer(f"direction_{i}"), self.magnitude).to(tensors[name].dtype)
            for i, name in enumerate(self._names)
        }
        return functional_call(self.model, moved, args, kwargs)
