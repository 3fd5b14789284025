"""One experiment: both signs, the random controls, the curve, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.perturbation.diagonal import diagonal_moves
from npeff.perturbation.directions import Directions, random_direction
from npeff.perturbation.effect import CONTROLS, Control, Curve, Effect, Side
from npeff.perturbation.examples import Piece
from npeff.perturbation.magnitude import Found, search, wanted_range
from npeff.perturbation.measures import Sets, figures, intervals, of_draws, ratio_of
from npeff.perturbation.options import Options
from npeff.perturbation.session import Measured, Session
from npeff.perturbation.subjects import Move, Subject, moves_of
from npeff.perturbation.weights import Direction

Array = npt.NDArray[Any]

NEAR_ZERO = 0.01
"""A coefficient up to this share of the top examples' mean counts as none."""


@dataclass(frozen=True, eq=False)
class Taken:
    """A move with the magnitude and sign at which it is measured."""

    move: Move
    direction: Direction
    found: dict[int, Found]
    measured: dict[int, Measured]
    sign: int

    @property
    def magnitude(self) -> float:
        """Of the sign kept."""
        return self.found[self.sign].magnitude

    @property
    def kept(self) -> Measured:
        """What the sign kept did."""
        return self.measured[self.sign]


def experiment(
    session: Session,
    components: Components,
    subject: Subject,
    options: Options,
    places: Array,
    top: Array,
    baseline: Array,
) -> Effect:
    """Perturb along one subject.

    Args:
        session: The examples that are measured.
        components: The decomposition.
        subject: The component or group.
        options: Checked.
        places: ``(n_examples,)`` place of each row of the coefficients in the session.
        top: Rows of the top examples.
        baseline: Rows of the baseline.

    Returns:
        The effect.

    Raises:
        ArgumentError: There is no direction, or the outputs are not finite at the magnitude asked for.
    """
    coefficient = subject.coefficient[session.rows]
    at_top, at_base = (np.unique(places[rows]) for rows in (top, baseline))
    none = coefficient <= NEAR_ZERO * coefficient[at_top].mean()
    disjoint = np.array([i for i in at_base if none[i]], np.int64)
    disjoint = np.setdiff1d(disjoint, at_top)
    norms = components.norms[session.rows].astype(np.float64)
    sets = Sets(at_top, at_base, disjoint, coefficient, norms, session.correct)
    pieces = session.examples.subset(at_top)
    tried: list[Side] = []
    if components.kind == "diagonal":
        moves = diagonal_moves(session, components, subject, options, pieces, at_base, tried)
    else:
        moves = moves_of(directions_of(session, components), subject, options.combine, options.reject, options.max_sim)
    taken = [take(session, move, options, pieces, sets) for move in moves]
    shares = [t.move.share for t in taken]
    measured = Measured.average([t.kept for t in taken], shares)
    if not np.isfinite(measured.kl).all():
        raise ArgumentError(
            f"magnitude: {int((~np.isfinite(measured.kl)).sum())} examples have outputs that are not finite at "
            f"{taken[0].magnitude:.3g}; choose a smaller magnitude, or a smaller target_kl"
        )
    curvature = [session.curvature(t.direction) for t in taken]
    mean_curvature = sum(s * c for s, c in zip(shares, curvature, strict=True))
    along = [float(c[at_base].mean()) for c in curvature]
    sides = [*tried, *(side for t in taken for side in _sides(t, sets))]
    wanted = None if options.magnitude is not None else wanted_range(options.target_kl)
    before = {"top": at_top, "baseline": at_base, "all": np.arange(len(coefficient))}
    return Effect(
        components=subject.members,
        kind=components.kind,
        combine=None if len(subject.members) == 1 else _combination(options, components.kind),
        magnitude=float(np.dot(shares, [t.magnitude for t in taken])),
        sign=taken[0].sign if len(taken) == 1 else 0,
        target_kl=wanted,
        reached=all(t.found[t.sign].reached for t in taken),
        figures=intervals(
            measured,
            sets,
            np.asarray(mean_curvature),
            confidence=options.confidence,
            n_resamples=options.n_resamples,
            seed=options.seed,
        ),
        before={name: _accuracy(session.correct[which]) for name, which in before.items()},
        controls=_controls(session, taken, along, options, sets),
        sides=tuple(sides),
        curve=_curve(session, taken, options, sets),
        ids=session.examples.ids,
        coefficient=coefficient,
        kl=measured.kl,
        flipped=measured.flipped,
        top=at_top,
        baseline=at_base,
        disjoint=disjoint,
        details={
            "likelihood": session.likelihood,
            "fisher_norm": float(np.dot(shares, along)),
            "fisher_norm_found_by": session.curvature_method,
            "rounding": min(session.weights.realised(t.direction, t.sign * t.magnitude) for t in taken),
            "moves": [
                {
                    "component": t.move.component,
                    "share": t.move.share,
                    "explained": t.move.explained,
                    "rejection": t.move.rejection,
                }
                for t in taken
            ],
            "n_random": options.n_random,
            "confidence": options.confidence,
            "seed": options.seed,
        },
    )


def directions_of(session: Session, components: Components) -> Directions:
    """The directions of the components, with what was computed of them before."""
    if session.directions is None:
        session.directions = Directions(components)
    return session.directions


def take(session: Session, move: Move, options: Options, pieces: Sequence[Piece], sets: Sets) -> Taken:
    """Take a move to its magnitude, each sign, and keep the sign with the larger KL ratio."""
    direction = session.placed(move.vector)
    found = {sign: search(session, direction, sign, options, pieces) for sign in options.signs}
    measured = {sign: session.measure(direction, sign * found[sign].magnitude) for sign in options.signs}
    return Taken(move, direction, found, measured, _larger(measured, sets))


def _larger(measured: dict[int, Measured], sets: Sets) -> int:
    def key(sign: int) -> float:
        ratio = ratio_of(measured[sign], sets)
        return ratio if np.isfinite(ratio) else -np.inf

    return max(measured, key=key)


def _sides(taken: Taken, sets: Sets) -> list[Side]:
    return [
        Side(
            component=taken.move.component,
            sign=sign,
            magnitude=found.magnitude,
            reached=found.reached,
            kl_top=float(taken.measured[sign].kl[sets.top].mean()),
            kl_baseline=float(taken.measured[sign].kl[sets.baseline].mean()),
            ratio=ratio_of(taken.measured[sign], sets),
            kept=sign == taken.sign,
            mix=taken.move.mix,
            step=None if taken.move.scale is None else found.magnitude / taken.move.scale,
        )
        for sign, found in taken.found.items()
    ]


def _controls(
    session: Session, taken: Sequence[Taken], along: Sequence[float], options: Options, sets: Sets
) -> dict[str, Control]:
    """Random directions as far as the component went, each both ways, the larger ratio kept as for the component."""
    if not options.n_random:
        return {}
    shares = [t.move.share for t in taken]
    controls = {}
    for name in CONTROLS:
        values: dict[str, list[float]] = {}
        sizes: list[float] = []
        for draw in range(options.n_random):
            parts, curvatures, lengths = [], [], []
            for q, (t, fisher) in enumerate(zip(taken, along, strict=True)):
                direction, curvature, size = _random(session, name, t, fisher, draw * len(taken) + q, options, sets)
                both = {sign: session.measure(direction, sign * size) for sign in options.signs}
                parts.append(both[_larger(both, sets)])
                curvatures.append(curvature)
                lengths.append(size)
            sizes.append(float(np.dot(shares, lengths)))
            mean = sum(s * c for s, c in zip(shares, curvatures, strict=True))
            for figure, value in figures(Measured.average(parts, shares), sets, np.asarray(mean)).items():
                values.setdefault(figure, []).append(value)
        summary = {
            figure: of_draws(drawn, confidence=options.confidence, n_resamples=options.n_resamples, seed=options.seed)
            for figure, drawn in values.items()
        }
        arrays = {figure: np.asarray(drawn) for figure, drawn in values.items()}
        controls[name] = Control(arrays, summary, np.asarray(sizes))
    return controls


def _random(
    session: Session, name: str, taken: Taken, fisher: float, number: int, options: Options, sets: Sets
) -> tuple[Direction, Array, float]:
    """A random direction, vᵀF_iv along it, and how far to go.

    Equal are the norm, the norm in the mean Fisher, or the norm within every tensor.
    """
    if name == "equal_tensor_norms":
        vector = random_direction(session.parameters.n_parameters, options.seed, number)
        for parameter in session.parameters:
            own = float(np.linalg.norm(vector[parameter.slice]))
            vector[parameter.slice] *= float(np.linalg.norm(taken.move.vector[parameter.slice])) / (own or 1.0)
        direction = session.placed(vector)
        return direction, session.curvature(direction), taken.magnitude
    curvature = session.random_curvature(options.seed, number)
    own = float(curvature[sets.baseline].mean())
    factor = float(np.sqrt(fisher / own)) if name == "equal_fisher_norm" and own > 0 else 1.0
    return session.random(options.seed, number), curvature, taken.magnitude * factor


def _curve(session: Session, taken: Sequence[Taken], options: Options, sets: Sets) -> Curve | None:
    if not options.curve:
        return None
    factors = np.geomspace(0.25, 2.0, options.curve) if options.curve > 1 else np.ones(1)
    shares = [t.move.share for t in taken]
    magnitudes = np.zeros((len(options.signs), len(factors)))
    means = np.zeros((3, *magnitudes.shape))
    for s, sign in enumerate(options.signs):
        for p, factor in enumerate(factors):
            sizes = [factor * t.found[sign].magnitude for t in taken]
            pairs = zip(taken, sizes, strict=True)
            measured = Measured.average([session.measure(t.direction, sign * size) for t, size in pairs], shares)
            magnitudes[s, p] = np.dot(shares, sizes)
            for i, which in enumerate((sets.top, sets.baseline, sets.disjoint)):
                means[i, s, p] = measured.kl[which].mean() if len(which) else np.nan
    return Curve(magnitudes, options.signs, *means)


def _combination(options: Options, kind: str) -> str:
    if kind == "diagonal":
        return "weighted sum"
    return options.combine if isinstance(options.combine, str) else "weights"


def _accuracy(correct: Array) -> float:
    known = correct[~np.isnan(correct)]
    return float(known.mean()) if len(known) else float("nan")
