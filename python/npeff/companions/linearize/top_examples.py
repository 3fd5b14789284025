"""What in the inputs of components' top examples speaks for them, as a report draws it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import examples_at
from npeff.companions.linearize.components import Forward, attribute_component
from npeff.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from npeff.components.components import Components

Array = npt.NDArray[np.float32]


def attribute_top_examples(
    model: nn.Module,
    components: Components,
    data: Iterable[Any],
    which: Sequence[int] | None = None,
    k: int = 4,
    *,
    embed: Forward | None = None,
    forward: Forward | None = None,
    smooth: Literal["refuse", "freeze"] = "refuse",
) -> dict[tuple[int, int], Array]:
    """What in the inputs of components' top examples speaks for them: ``attributions=`` of :func:`npeff.report`.

    :func:`attribute_component` on each component's k top examples, where a number of the input counts for its
    component as far as it contributes to the size of the outputs' change.

    Args:
        model: The model that the components are of, in evaluation mode.
        components: A decomposition.
        data: The data whose Fishers were decomposed.
        which: Components; by default all.
        k: Top examples of each; those with a coefficient of 0 are left out.
        embed: ``callable(model, inputs) -> (1, t, d)`` floats for one example, where the inputs are tokens: then these
            are attributed, and summed over d, a number per token. The attribution is of the paths through what
            ``forward`` does with them; a change of the embedding itself, where the components have one, is left out.
        forward: ``callable(model, inputs) -> (n, C)``, or of what ``embed`` gave.
        smooth: As for :func:`npeff.companions.linearize.linearize`.

    Returns:
        ``(component, index of the example)`` → float32 array of the input's shape, or ``(t,)`` with ``embed``.

    Raises:
        ArgumentError: See :func:`attribute_component`; or ``embed`` without ``forward``.
        DataError: The data ends before the top examples; or see :func:`attribute_component`.
        ModelError: See :func:`npeff.companions.linearize.linearize`.
    """
    if embed is not None and forward is None:
        raise ArgumentError(
            "forward: embed= needs forward=callable(model, embedded) -> (1, C), what the model does next"
        )
    chosen = range(components.n_components) if which is None else which
    W = components.coefficients
    tops = {int(j): [int(i) for i in components.top_examples(int(j), k) if W[i, int(j)] > 0] for j in chosen}
    wanted = sorted({i for indices in tops.values() for i in indices})
    device = next(iter(model.parameters())).device
    batches = examples_at(data, components.ids[wanted].tolist(), device)
    inputs = {i: _inputs(model, batch.inputs, embed) for i, batch in zip(wanted, batches, strict=True)}
    found: dict[tuple[int, int], Array] = {}
    for j, indices in tops.items():
        # examples of one shape together, so that a picture costs one pass; texts differ in length
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in indices:
            groups.setdefault(tuple(inputs[i].shape), []).append(i)
        for members in groups.values():
            x = torch.cat([inputs[i] for i in members])
            maps = attribute_component(model, components, j, x, smooth=smooth, forward=forward).maps
            maps = maps.sum(-1) if embed is not None else maps
            found |= {(j, i): row.float().cpu().numpy() for i, row in zip(members, maps, strict=True)}
    return found


def _inputs(model: nn.Module, given: Any, embed: Forward | None) -> Tensor:
    """What one example is attributed to, ``(1, *s)`` floats.

    Raises:
        DataError: There is no floating-point tensor to attribute to.
    """
    if embed is not None:
        with torch.no_grad():
            given = embed(model, given)
    if isinstance(given, (tuple, list)) and len(given) == 1:
        given = given[0]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise DataError(
            f"data: expected inputs that are a floating-point tensor, got {kind}; for tokens pass "
            "embed=callable(model, inputs) -> (1, t, d) and forward="
        )
    return given.detach()
