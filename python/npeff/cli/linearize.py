"""``npeff linearize``: the contributions of an example's input and of the model's biases to its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npeff.cli.command import check_out, command, components_of, for_report, misused, note
from npeff.cli.options import WRITABLE, Arguments

if TYPE_CHECKING:
    from npeff.companions.linearize import LinearMap

SHOWN = 12


@command(
    """
        npeff linearize train.py:model train.py:data --example 17
        npeff linearize train.py:model train.py:data --example 17 --output 3 --out example17.png
        npeff linearize train.py:model train.py:data --at layer3 --table contributions.csv
        npeff linearize bert.py:model bert.py:batches --at embeddings --smooth freeze
        npeff linearize train.py:model train.py:data --component components.h5:3,7 -k 6 --out pixels.json
    """,
    Arguments("npeff.companions.linearize:linearize", only=("at", "smooth", "forward")),
    Arguments("npeff.companions.linearize:attribute_top_examples", only=("k", "embed")),
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option("--example", type=click.IntRange(min=0), default=0, show_default=True, help="Its position in DATA.")
@click.option("--output", type=click.IntRange(min=0), help="Which output to explain.  [default: the largest]")
@click.option(
    "--component",
    metavar="FILE:J",
    help="Instead: attribute component J (or several, FILE:J,J,…) to the inputs of its top examples; DATA is the data "
    "of its Fishers. -k and --embed belong to it.",
)
@click.option("--out", type=WRITABLE, help="Picture to write: .png, .svg or .pdf; with --component .json for a report.")
@click.option("--table", type=WRITABLE, help="Table to write: .csv, every contribution of the input and of the biases.")
def linearize(
    model: str,
    data: str,
    example: int,
    output: int | None,
    component: str | None,
    out: Path | None,
    table: Path | None,
    **options: Any,
) -> None:
    """Split an output of MODEL on one example of DATA into the contributions of the input numbers and of the biases.

    A piecewise linear network (ReLU, max-pooling, convolutions, batch normalisation in evaluation mode, …) is exactly
    F(x) = W·x + b around x. MODEL and DATA are module:callable or file.py:callable, as for npeff fishers.
    """
    if component and out is None:
        misused("--component: give --out, a name ending in .json")
    if "embed" in options and not (component and "forward" in options):
        misused("--embed belongs to --component, and needs --forward for what the model does with it")
    if "k" in options and not component:
        misused("-k belongs to --component")
    check_out(out, *((".json",) if component else (".png", ".svg", ".pdf")))
    check_out(table, ".csv", option="--table")
    from npeff.companions.linearize import attribute_top_examples
    from npeff.companions.linearize.linear_map import linearize
    from npeff.models.targets import load_data, load_model

    net = load_model(model)
    if component and out:
        if "at" in options:
            misused("--at: a component is attributed to the input; leave --at or --component out")
        components, which = components_of(component)
        found = attribute_top_examples(net, components, load_data(data), which, **options)
        for_report(out, components, attributions=found)
        return
    inputs = _example(net, load_data(data), example)
    linear = linearize(net, inputs, batched=True, **options)
    n_outputs = linear.output.shape[1]
    if output is not None and output >= n_outputs:
        misused(f"--output: expected a position below {n_outputs}, got {output}")
    chosen = int(linear.output[0].argmax()) if output is None else output
    linear = linearize(net, inputs, chosen, batched=True, **options)
    _tell(linear, example, chosen)
    if table:
        _write_table(linear, table)
        click.echo(f"{table}: {linear.x.numel() + len(linear.bias_contributions()):,} contributions")
    if out:
        _draw(linear, chosen, out)
        click.echo(f"{out}: the input and what it contributed to output {chosen}")


def _example(net: Any, data: Any, wanted: int) -> Any:
    """The inputs of one example, as a batch of one."""
    import torch

    from npeff.batches.batches import examples_at

    first = next(iter((*net.parameters(), *net.buffers())), None)
    (batch,) = examples_at(data, [wanted], first.device if first is not None else torch.device("cpu"))
    inputs = batch.inputs
    if isinstance(inputs, (tuple, list)):
        return inputs[0] if len(inputs) == 1 else tuple(inputs)
    return inputs


def _tell(linear: LinearMap, example: int, output: int) -> None:
    value, b = float(linear.output[0, 0]), float(linear.b[0, 0])
    contributions = linear.contributions()[0, 0]
    given = float(contributions.double().sum())
    where = "the input" if linear.at == "input" else f"the output of {linear.at}"
    click.echo(f"example {example}, output {output}: {value:.6g} = {given:.6g} from {where} + {b:.6g} from biases")
    click.echo(f"left over: {linear.residual():.1e} of the output")
    for item in linear.frozen[:5]:
        note(f"  not piecewise linear: {item}")
    if len(linear.frozen) > 5:
        note(f"  and {len(linear.frozen) - 5} more")
    biases = sorted(linear.bias_contributions().items(), key=lambda item: -abs(float(item[1][0, 0])))
    click.echo(f"{'contribution':>14}  of")
    flat = contributions.reshape(-1)
    order = flat.abs().argsort(descending=True)[:SHOWN]
    rows = [(float(flat[i]), f"{where}{_position(int(i), contributions.shape)}") for i in order]
    rows += [(float(part[0, 0]), f"the biases of {name}") for name, part in biases[:SHOWN]]
    for part, name in sorted(rows, key=lambda row: -abs(row[0]))[:SHOWN]:
        click.echo(f"{part:14.6g}  {name}")


def _position(index: int, shape: Any) -> str:
    import numpy as np

    return "[" + ", ".join(str(int(i)) for i in np.unravel_index(index, tuple(shape))) + "]"


def _write_table(linear: LinearMap, path: Path) -> None:
    import csv

    from npeff.storage.files import atomic

    x, contributions = linear.x[0], linear.contributions()[0, 0]
    weights = linear.W[0, 0].reshape(-1).tolist()
    values = zip(x.reshape(-1).tolist(), weights, contributions.reshape(-1).tolist(), strict=True)
    with atomic(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["of", "position", "value", "weight", "contribution"])
        for i, (value, weight, part) in enumerate(values):
            writer.writerow([linear.at, _position(i, x.shape).strip("[]"), value, weight, part])
        for name, bias in linear.bias_contributions().items():
            writer.writerow([name, "biases", "", "", float(bias[0, 0])])


def _draw(linear: LinearMap, output: int, path: Path) -> None:
    from npeff.companions.linearize import contribution_figure
    from npeff.storage.files import atomic

    maps = {f"output {output}: W": linear.W[:, 0], f"output {output}: W∘x": linear.contributions()[:, 0]}
    with atomic(path) as scratch:
        contribution_figure(linear.x, maps).savefig(scratch, format=path.suffix.lower().removeprefix("."))
