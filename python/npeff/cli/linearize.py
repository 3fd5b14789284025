"""``npeff linearize``: the contributions of an example's input and of the model's biases to its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npeff.cli.common import WRITABLE, command, components_of, for_report, misused, note

if TYPE_CHECKING:
    from npeff.companions.linearize import LinearMap

SHOWN = 12


@command(
    examples="""
        npeff linearize train.py:model train.py:data --example 17
        npeff linearize train.py:model train.py:data --example 17 --output 3 --out example17.png
        npeff linearize train.py:model train.py:data --at layer3 --table contributions.csv
        npeff linearize bert.py:model bert.py:batches --at embeddings --smooth freeze
        npeff linearize train.py:model train.py:data --component components.h5:3,7 --top 6 --out pixels.json
    """
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option("--example", type=click.IntRange(min=0), default=0, show_default=True, help="Its position in DATA.")
@click.option("--output", type=click.IntRange(min=0), help="Which output to explain.  [default: the largest]")
@click.option("--at", default="input", show_default=True, help="Explain by the output of this layer instead.")
@click.option(
    "--smooth",
    type=click.Choice(["refuse", "freeze"]),
    default="refuse",
    show_default=True,
    help="Refuse a model that is not piecewise linear, or hold its gates.",
)
@click.option(
    "--component",
    metavar="FILE:J",
    help="Instead: attribute component J (or several, FILE:J,J,…) to the inputs of its top examples; DATA is the data "
    "of its Fishers.",
)
@click.option("--top", type=click.IntRange(min=1), default=4, show_default=True, help="Examples per component.")
@click.option(
    "--embed",
    metavar="TARGET",
    help="module:callable for (model, inputs) -> (1, t, d), where inputs are tokens; --forward takes what it gives.",
)
@click.option("--out", type=WRITABLE, help="Picture to write: .png, .svg or .pdf; with --component .json for a report.")
@click.option("--table", type=WRITABLE, help="Table to write: .csv, every contribution of the input and of the biases.")
@click.option(
    "--forward",
    metavar="TARGET",
    help="module:callable for (model, inputs) -> outputs, where model(inputs) is not enough.",
)
def linearize(
    model: str,
    data: str,
    example: int,
    output: int | None,
    at: str,
    smooth: Any,
    out: Path | None,
    table: Path | None,
    forward: str | None,
    component: str | None,
    top: int,
    embed: str | None,
) -> None:
    """Split an output of MODEL on one example of DATA into the contributions of the input numbers and of the biases.

    A piecewise linear network (ReLU, max-pooling, convolutions, batch normalisation in evaluation mode, …) is exactly
    F(x) = W·x + b around x. MODEL and DATA are module:callable or file.py:callable, as for npeff fishers.
    """
    endings = (".json",) if component else (".png", ".svg", ".pdf")
    if component and out is None:
        misused("--component: give --out, a name ending in .json")
    if embed and not (component and forward):
        misused("--embed belongs to --component, and needs --forward for what the model does with it")
    for option, path, suffixes in (("--out", out, endings), ("--table", table, (".csv",))):
        if path is not None and path.suffix.lower() not in suffixes:
            misused(f"{option}: expected a name ending in {' or '.join(suffixes)}, got {path}")
    from npeff.companions.linearize.linearizing import linearize
    from npeff.models.targets import load_data, load_model, load_object
    from npeff.storage.files import check_target
    from npeff.storage.recognition import refuse_npeff_file

    for path in (out, table):
        if path is not None:
            refuse_npeff_file(path)
            check_target(path)
    net = load_model(model)
    function = load_object(forward, "--forward") if forward else None
    if component and out:
        from npeff.companions.linearize import attribute_top_examples

        components, which = components_of(component)
        given = load_object(embed, "--embed") if embed else None
        found = attribute_top_examples(
            net, components, load_data(data), which, top, embed=given, forward=function, smooth=smooth
        )
        for_report(out, components, attributions=found)
        return
    inputs = _example(net, load_data(data), example)
    linear = linearize(net, inputs, at=at, smooth=smooth, batched=True, forward=function)
    n_outputs = linear.output.shape[1]
    if output is not None and output >= n_outputs:
        misused(f"--output: expected a position below {n_outputs}, got {output}")
    chosen = int(linear.output[0].argmax()) if output is None else output
    linear = linearize(net, inputs, chosen, at, smooth=smooth, batched=True, forward=function)
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
