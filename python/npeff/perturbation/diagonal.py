"""Moves along a diagonal component: which (δ, λ) reaches the wanted KL with the least change of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.batches.batches import Batch
from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.models.parameters import Parameters
from npeff.perturbation.data_fisher import summed_fisher
from npeff.perturbation.effect import Side
from npeff.perturbation.examples import Piece
from npeff.perturbation.magnitude import Found, search
from npeff.perturbation.merging import interpolation, signed_gradient
from npeff.perturbation.options import Options
from npeff.perturbation.session import Session
from npeff.perturbation.subjects import Move, Subject

Array = npt.NDArray[Any]


def diagonal_moves(
    session: Session,
    components: Components,
    subject: Subject,
    options: Options,
    pieces: Sequence[Piece],
    baseline: Array,
    tried: list[Side],
) -> list[Move]:
    """The way to move for a diagonal subject.

    For each λ the merged weights are ``θ ± δ ρ(λ)∘sign(∇)``: a direction, along which δ is searched for. λ is free
    then: many pairs reach the same KL. Kept is the pair that changes the weights least in the Euclidean norm
    (mean over the signs), a choice that does not look at the ratio which is to be measured.

    Args:
        session: The examples.
        components: Diagonal ones.
        subject: h, or the group whose weighted sum of h is used.
        options: Checked.
        pieces: The top examples.
        baseline: Places of the examples that f̄ is the mean over, unless it is given.
        tried: The sides of every λ that is not kept are added here.

    Returns:
        One move.

    Raises:
        ArgumentError: The component is zero, or does not meet the gradient anywhere.
    """
    H = [components.vector(k).astype(np.float64) for k in subject.members]
    h = np.asarray(sum(w * v for w, v in zip(subject.mass, H, strict=True)))
    norm = float(np.linalg.norm(h))
    if norm == 0:
        raise ArgumentError(f"j: component {list(subject.members)} is zero, so there is nothing to move along")
    fisher = _given(components.parameters, options.fisher)
    if fisher is None:
        fisher = _mean_fisher(session, baseline)
    signs = signed_gradient(session.model, session.parameters, pieces, session.likelihood, session.forward)
    candidates: list[tuple[Move, dict[int, Found]]] = []
    mixes = options.mixes if options.magnitude is None or options.mix is not None else (0.5,)
    for mix in mixes:
        change = interpolation(h / norm, fisher, mix, options.floor) * signs
        scale = float(np.linalg.norm(change))
        if scale == 0:
            continue
        move = Move(change / scale, None if len(H) > 1 else subject.members[0], mix=mix, scale=scale)
        candidates.append((move, _searched(session, move, options, pieces) if len(mixes) > 1 else {}))
    if not candidates:
        raise ArgumentError("j: the component and the top examples' gradient have no parameter in common")

    def effort(candidate: tuple[Move, dict[int, Found]]) -> tuple[bool, float]:
        found = candidate[1].values()
        return not all(f.reached for f in found), float(np.mean([f.magnitude for f in found] or [0.0]))

    best = min(candidates, key=effort)
    for move, found in candidates:
        if move is not best[0]:
            tried.extend(_side(move, sign, f) for sign, f in found.items())
    return [best[0]]


def _searched(session: Session, move: Move, options: Options, pieces: Sequence[Piece]) -> dict[int, Found]:
    direction = session.placed(move.vector)
    return {sign: search(session, direction, sign, options, pieces) for sign in options.signs}


def _side(move: Move, sign: int, found: Found) -> Side:
    step = None if move.scale is None else found.magnitude / move.scale
    nan = float("nan")
    return Side(
        move.component, sign, found.magnitude, found.reached, found.kl, nan, nan, False, mix=move.mix, step=step
    )


def _mean_fisher(session: Session, baseline: Array) -> Array:
    """f̄ over the baseline, computed once a session."""
    key = baseline.tobytes()
    if session.fishers.get("key") != key:
        chosen = np.zeros(len(session.examples), bool)
        chosen[baseline] = True

        def batches() -> Iterator[tuple[Batch, Array]]:
            for piece in session.examples:
                wanted = piece.at(chosen)
                if len(wanted.places):
                    yield wanted.batch, wanted.rows.cpu().numpy()

        total, count = summed_fisher(session.model, session.parameters, batches(), session.likelihood, session.forward)
        session.fishers = {"key": key, "mean": total / count}
    return np.asarray(session.fishers["mean"])


def _given(parameters: Parameters, fisher: Any) -> Array | None:
    """A data set's Fisher as a flat vector.

    Raises:
        ArgumentError: It does not fit the parameters, or has negative or infinite values, or is zero.
    """
    if fisher is None:
        return None
    if isinstance(fisher, Mapping):
        if missing := [p.name for p in parameters if p.name not in fisher]:
            raise ArgumentError(f"fisher: expected every parameter of the components, but {missing[0]!r} is missing")
        parts = [np.asarray(fisher[p.name], np.float64) for p in parameters]
        for p, part in zip(parameters, parts, strict=True):
            if part.shape != p.shape:
                raise ArgumentError(f"fisher: {p.name} has shape {p.shape} in the components, got {part.shape}")
        flat = np.concatenate([part.reshape(-1) for part in parts])
    else:
        flat = np.asarray(fisher, np.float64)
    if flat.shape != (parameters.n_parameters,):
        raise ArgumentError(f"fisher: expected tensors by name or shape ({parameters.n_parameters},), got {flat.shape}")
    if not np.isfinite(flat).all() or flat.min() < 0 or not flat.any():
        raise ArgumentError("fisher: expected finite values ≥ 0, not all 0: the mean diagonal Fisher of a data set")
    return flat
