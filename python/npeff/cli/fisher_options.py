"""The options of what a Fisher is: shared by the commands that compute Fishers and those that plan to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--basis",
        type=click.Choice(["reduced", "class"]),
        default="reduced",
        show_default=True,
        help="Rows of a low-rank Fisher: C−1 exact ones, or one per class as published.",
    ),
    click.option("--rank", type=click.IntRange(min=1), help="At most this many rows per example (basis reduced)."),
    click.option(
        "--energy",
        type=click.FloatRange(0, 1, min_open=True),
        help="Rows that hold this share of the trace (basis reduced).",
    ),
    click.option("--min-prob", type=click.FloatRange(0, 1), help="Only classes at least this likely (basis class)."),
    click.option(
        "--max-classes",
        type=click.IntRange(min=1),
        help="At most this many classes per example (basis class).",
    ),
    click.option(
        "--labels",
        type=click.Choice(["expected", "sampled", "true"]),
        default="expected",
        show_default=True,
        help="Expectation over the model's labels, draws from them, or the empirical Fisher.",
    ),
    click.option(
        "--samples",
        "n_samples",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Draws per example, for --labels sampled.",
    ),
    click.option(
        "--likelihood",
        type=click.Choice(["categorical", "probabilities", "bernoulli", "gaussian"]),
        default="categorical",
        show_default=True,
        help="What the outputs are: logits of classes, probabilities of classes (after a softmax), logits of yes/no "
        "questions, or means.",
    ),
    click.option(
        "--parameters",
        multiple=True,
        metavar="PATTERN",
        help="Only parameters whose name matches, as in 'layer4.*'; repeatable.",
    ),
    click.option(
        "--forward",
        metavar="TARGET",
        help="module:callable for (model, batch) -> logits, where model(inputs) is not enough.",
    ),
    click.option("--device", help="cpu, cuda, cuda:1 …  [default: where the model is]"),
)


def fisher_options(function: F) -> F:
    """``--basis`` to ``--device``: which rows, of which parameters, computed how and where."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def understood(options: dict[str, Any], parameters: tuple[str, ...], forward: str | None) -> dict[str, Any]:
    """The options as :func:`npeff.compute_fishers` takes them.

    Args:
        options: The values of ``--basis`` … ``--device``; a threshold on classes implies the basis of classes.
        parameters: Patterns, none for all.
        forward: ``module:callable``.
    """
    from npeff.models.targets import load_object

    options = options | {"parameters": list(parameters) or None, "forward": None}
    if options["min_prob"] is not None or options["max_classes"] is not None:
        options["basis"] = "class"
    if forward is not None:
        options["forward"] = load_object(forward, "--forward")
    return options
