"""What decides a computation's result, as files tell it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from npeff.compress import GramOnly, Sketch
from npeff.gradients.factors import FactorOptions

if TYPE_CHECKING:
    from npeff.fisher_run import Run


def header_of(run: Run, digest: str, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
    """What decides the result, for files: kind, parameters, provenance."""
    return {
        "kind": run.kind,
        "parameters": run.parameters.to_json(),
        "provenance": {
            "model": type(run.model).__name__,
            "model_digest": digest,
            "options": _described(run, n_outputs, max_examples, patterns),
            "versions": {"npeff": _version(), "torch": torch.__version__},
        },
    }


def _described(run: Run, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
    options = {name: getattr(run.options, name) for name in FactorOptions.__dataclass_fields__}
    described = {"kind": run.kind, **options, "max_examples": max_examples}
    described["parameters"] = [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)
    if run.share is not None:
        described["share"] = list(run.share)
    described["compress"] = None
    if isinstance(run.compress, Sketch):
        n_two_sided = sum(run.compress.two_sided(p.shape) for p in run.parameters)
        if run.compress.d >= run.parameters.n_parameters:
            warnings.warn(
                f"Sketch(d={run.compress.d}): the model has {run.parameters.n_parameters} parameters, so exact "
                "rows (compress=None) are no longer than sketches, and exact",
                stacklevel=6,
            )
        described["compress"] = {**run.compress.describe(), "two_sided_parameters": n_two_sided}
    elif isinstance(run.compress, GramOnly):
        described["compress"] = run.compress.describe()
    elif run.compress is not None:
        rows = 1 if run.kind == "diagonal" else run.options.most_rows(n_outputs)
        possible = max(1, rows) * run.parameters.n_parameters
        if run.compress.k > possible:
            warnings.warn(
                f"TopK(k={run.compress.k}): an example has at most {possible} entries; k is {possible}",
                stacklevel=6,
            )
        described["compress"] = {
            "method": "topk",
            "k": run.compress.k,
            "k_effective": min(run.compress.k, possible),
        }
    return described


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("npeff")
    except PackageNotFoundError:
        return "0"
