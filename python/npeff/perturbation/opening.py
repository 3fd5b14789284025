"""Before anything is measured: options, model, data and components are checked against each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.batches.batch_order import check_sampler
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import Likelihood
from npeff.gradients.eligibility import check_eligible
from npeff.gradients.selection import placed
from npeff.models.digests import model_digest
from npeff.perturbation.options import Options
from npeff.perturbation.session import Forward, Session, untouched

Array = npt.NDArray[Any]


def checked_options(components: Components, given: dict[str, Any]) -> Options:
    """Options, checked.

    Raises:
        ArgumentError: One is unknown or wrong.
    """
    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}; see npeff.decompose")
    if unknown := given.keys() - Options.__dataclass_fields__.keys():
        known = ", ".join(Options.__dataclass_fields__)
        raise ArgumentError(f"{min(unknown)}: there is no such option; there are {known}")
    if isinstance(given.get("target_kl"), list):
        given = {**given, "target_kl": tuple(given["target_kl"])}
    options = Options(**given)
    options.check(components.kind)
    return options


@contextmanager
def opened(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    rows: Array,
    likelihood: Likelihood | None,
    forward: Forward | None,
    device: torch.device | str | None,
) -> Iterator[tuple[Session, Array]]:
    """The session of some rows of the coefficients, and each row's place in it (−1 for the others).

    Raises:
        ArgumentError: The model, ``forward`` or ``likelihood`` are not what is needed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if forward is not None and not callable(forward):
        raise ArgumentError(f"forward: expected callable(model, batch) -> logits, got {forward!r}")
    inner = getattr(model, "_orig_mod", model)
    fishers = components.provenance.get("fishers") or {}
    stored = (fishers.get("options") or {}).get("likelihood", "categorical")
    likelihood = likelihood or stored
    if likelihood not in get_args(Likelihood):
        raise ArgumentError(f"likelihood: expected one of {', '.join(get_args(Likelihood))}, got {likelihood!r}")
    check_eligible(inner)
    check_sampler(data)
    _check_parameters(inner, components)
    ours = model_digest(inner)
    theirs = fishers.get("model_digest")
    if theirs and theirs != ours:
        warnings.warn("model: it is not the one of the components' Fishers (other weights)", stacklevel=4)
    ids, first = np.unique(components.ids[rows], return_index=True)
    if ids[0] < 0:
        raise ArgumentError("components: their ids are not positions in data; examples cannot be found")
    chosen = np.asarray(rows)[first]
    places = np.full(len(components.coefficients), -1, np.int64)
    places[rows] = np.searchsorted(ids, components.ids[rows])
    with placed(inner, device) as place, untouched(inner):
        session = Session(
            inner, components.parameters, data, ids, components.labels[chosen], place, likelihood, forward
        )
        session.rows = chosen
        _check_outputs(session, components.logits[chosen], None if not theirs else theirs == ours)
        yield session, places


def _check_parameters(model: nn.Module, components: Components) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if components.parameters.names == ("parameters",) and "parameters" not in tensors:
        raise ArgumentError(
            "components: they come from a file in a published layout, which has no names of parameters, so that these "
            "cannot be found in the model; take npeff's own files of the Fishers and the components"
        )
    for parameter in components.parameters:
        found = tensors.get(parameter.name)
        if found is None:
            raise ArgumentError(
                f"model: the components are of a parameter {parameter.name!r}, which {type(model).__name__} has not "
                f"({', '.join(list(tensors)[:5])} …); pass the model that the Fishers were computed from"
            )
        if tuple(found.shape) != parameter.shape:
            raise ArgumentError(
                f"model: {parameter.name} has shape {tuple(found.shape)}, expected {parameter.shape} as in the "
                "components; pass the model that the Fishers were computed from"
            )


def _check_outputs(session: Session, stored: Array, same_model: bool | None) -> None:
    """The outputs that were stored with the components tell whether the data is still the same.

    Raises:
        DataError: The model is the same, but not its outputs.
    """
    if not stored.shape[1]:
        return
    found = session.outputs.double().cpu().numpy()
    if found.shape != stored.shape:
        raise DataError(
            f"logits: expected {stored.shape[1]} per example as with the Fishers, got {found.shape[1]}; pass the same "
            "model, data and forward="
        )
    size = max(1.0, float(np.abs(stored).max()))
    differs = np.abs(found - stored).max(1) > 0.02 * size
    if not differs.any() or same_model is False:
        return
    bad = int(session.examples.ids[int(np.argmax(differs))])
    message = (
        f"data: {int(differs.sum())} of {len(differs)} examples, the first at position {bad}, have other outputs than "
        "when the Fishers were computed"
    )
    if same_model:
        raise DataError(
            f"{message}, although the model is the same; pass the same data in the same order, and forward="
        )
    warnings.warn(f"{message}; are model and data the same?", stacklevel=5)
