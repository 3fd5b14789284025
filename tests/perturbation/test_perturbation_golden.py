"""The numbers of perturbations, traces and a repair on a small network, as they were when this test was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npeff
from npeff.components.strategies import Strategy
from perturbation_cases import batches, components_of, deep

STORED = Path(__file__).parents[1] / "data" / "perturbation_numbers.json"
FIGURES = (
    "ratio",
    "disjoint_ratio",
    "normalised_ratio",
    "normalised_rank_correlation",
    "flipped_top",
    "flipped_baseline",
)
OPTIONS: dict[str, Any] = {"top": 8, "baseline": 40, "n_random": 3, "curve": 3, "n_resamples": 100, "progress": False}
CASES: dict[str, dict[str, Any]] = {
    "low rank": {"j": 1},
    "low rank, a given magnitude": {"j": 2, "magnitude": 0.4, "sign": -1},
    "a group, one by one": {"j": (0, 3), "reject": "span"},
    "a group, principal": {"j": (1, 2), "combine": "principal", "reject": "sequential", "max_sim": 0.5},
    "bernoulli": {"j": 0, "likelihood": "bernoulli"},
    "gaussian": {"j": 0, "likelihood": "gaussian", "target_kl": 0.5},
    "diagonal": {"j": 1, "kind": "diagonal"},
    "diagonal, one share": {"j": (0, 2), "kind": "diagonal", "floor": 1e-3, "seed": 3},
}


def numbers_of(name: str) -> dict[str, Any]:
    """Everything that a perturbation of that name measures."""
    options = dict(CASES[name])
    kind, likelihood = options.pop("kind", "low_rank"), options.pop("likelihood", "categorical")
    model, data = deep(), batches(60, 16, classes=2)
    components = components_of(model, data, kind=kind, likelihood=likelihood)
    j = options.pop("j")
    if isinstance(j, tuple):
        j = Strategy(j, components.coefficients[:, list(j)].sum(1))
    effect = npeff.perturb(model, data, components, j, **{**OPTIONS, **options})
    assert effect.curve is not None
    return {
        "magnitude": effect.magnitude,
        "sign": effect.sign,
        "reached": effect.reached,
        "fisher norm": effect.details["fisher_norm"],
        "figures": [effect.figures[figure].value for figure in FIGURES],
        "ratio": [effect.figures["ratio"].low, effect.figures["ratio"].high],
        "controls": {
            name: [control.magnitudes.tolist(), [control.values[figure].tolist() for figure in FIGURES]]
            for name, control in effect.controls.items()
        },
        "sides": [[s.sign, s.magnitude, s.ratio, s.kl_top, s.kept, s.step] for s in effect.sign_results],
        "curve": [effect.curve.magnitudes.tolist(), effect.curve.top.tolist(), effect.curve.disjoint.tolist()],
        "examples": [effect.ids[effect.top].tolist(), effect.ids[effect.baseline].tolist()],
        "kl": effect.kl.tolist(),
    }


def trace_numbers() -> dict[str, Any]:
    """What traces of a low-rank and of a diagonal component find."""
    model, data, found = deep(), batches(60, 16, classes=2), {}
    for kind in ("low_rank", "diagonal"):
        components = components_of(model, data, kind=kind)
        trace = npeff.trace(model, data, components, 2, {"first": "0.*"}, top=8, n_resamples=100, progress=False)
        intervals = [[i.value, i.low, i.high] for i in trace.alone + trace.lost]
        found[kind] = [trace.magnitude, trace.energy.tolist(), intervals, trace.kl_alone.tolist()]
    return found


def repair_numbers() -> dict[str, Any]:
    """What repairs along two components and along one line find."""
    model, data, found = deep(), batches(60, 16, classes=2), {}
    components = components_of(model, data)
    repair = np.flatnonzero(components.predictions != components.labels)
    for which, options in (
        ([1, 2], {"tolerance": 0.7, "iterations": 200}),  # a minimum that rounding does not move
        (2, {"tolerance": 0.4, "by_layer": False}),
    ):
        made = npeff.mend(model, data, components, which, repair=repair, progress=False, **options)
        found[str(which)] = [made.coefficients.tolist(), list(made.repaired), list(made.accuracy), made.n_others]
    return found


def everything() -> dict[str, Any]:
    """All numbers, as they are stored."""
    return {**{name: numbers_of(name) for name in CASES}, "trace": trace_numbers(), "repair": repair_numbers()}


def close(found: Any, stored: Any) -> None:
    """Assert that nested numbers are equal but for rounding."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys()
        for name, value in stored.items():
            close(found[name], value)
    elif isinstance(stored, list):
        assert len(found) == len(stored)
        for one, value in zip(found, stored, strict=True):
            close(one, value)
    elif stored is None or isinstance(stored, bool):
        assert found == stored
    else:
        assert found == pytest.approx(stored, rel=1e-3, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_perturbations_are_as_stored(name: str) -> None:
    close(numbers_of(name), json.loads(STORED.read_text())[name])


def test_traces_are_as_stored() -> None:
    close(trace_numbers(), json.loads(STORED.read_text())["trace"])


def test_repairs_are_as_stored() -> None:
    close(repair_numbers(), json.loads(STORED.read_text())["repair"])
