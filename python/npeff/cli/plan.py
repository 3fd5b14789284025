"""``npeff plan``: what stages 1 and 2 will take, before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npeff.cli.common import WRITABLE, command


@command(
    examples="""
        npeff plan train.py:model train.py:data
        npeff plan train.py:model train.py:data --examples 60000 --memory 4GB --components 128
        npeff plan bert.py:model bert.py:batches --kind low_rank --energy 0.99 --json plan.json
    """
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option(
    "--examples", "n_examples", type=click.IntRange(min=1), help="How many there will be.  [default: counted]"
)
@click.option(
    "--kind", type=click.Choice(["low_rank", "diagonal"]), help="Form of the Fishers.  [default: both are shown]"
)
@click.option(
    "--components",
    "n_components",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Of the decomposition.",
)
@click.option("--memory", metavar="BYTES", help="Budget, as in 4GB.  [default: four fifths of what is free]")
@click.option("--disk", metavar="BYTES", help="Budget for the file.  [default: half of what is free]")
@click.option(
    "--batches", type=click.IntRange(min=2), default=4, show_default=True, help="Computed and timed, per option."
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the file will be: its disk is timed.  [default: the temporary folder]",
)
@click.option(
    "--basis",
    type=click.Choice(["reduced", "class"]),
    default="reduced",
    show_default=True,
    help="As for npeff fishers.",
)
@click.option("--rank", type=click.IntRange(min=1), help="As for npeff fishers.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="As for npeff fishers.")
@click.option("--min-prob", type=click.FloatRange(0, 1), help="As for npeff fishers; takes the basis of classes.")
@click.option("--max-classes", type=click.IntRange(min=1), help="As for npeff fishers; takes the basis of classes.")
@click.option("--labels", type=click.Choice(["expected", "sampled", "true"]), default="expected", show_default=True)
@click.option(
    "--samples", "n_samples", type=click.IntRange(min=1), default=1, show_default=True, help="For --labels sampled."
)
@click.option(
    "--likelihood",
    type=click.Choice(["categorical", "bernoulli", "gaussian"]),
    default="categorical",
    show_default=True,
    help="What the outputs parametrise.",
)
@click.option("--parameters", multiple=True, metavar="PATTERN", help="As for npeff fishers; repeatable.")
@click.option("--forward", metavar="TARGET", help="module:callable for (model, batch) -> logits.")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: where the model is]")
@click.option("--json", "json_file", type=WRITABLE, metavar="FILE", help="Write the plan as JSON too.")
def plan(
    model: str,
    data: str,
    parameters: tuple[str, ...],
    forward: str | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Tell what Fishers of DATA under MODEL, and their decomposition, will take: time, memory, disk.

    The first batches are computed for real, once per way of keeping the Fishers; nothing of it stays. MODEL and DATA
    are as for npeff fishers.
    """
    import npeff
    from npeff.targets import load_data, load_model, load_object

    if options["min_prob"] is not None or options["max_classes"] is not None:
        options["basis"] = "class"
    result = npeff.plan(
        load_model(model),
        load_data(data),
        parameters=list(parameters) or None,
        forward=load_object(forward, "--forward") if forward else None,
        **options,
    )
    click.echo(str(result))
    if json_file is not None:
        from npeff.storage import refuse_npeff_file
        from npeff.storage.files import atomic

        refuse_npeff_file(json_file)
        with atomic(json_file) as scratch:
            scratch.write_text(result.to_json(), encoding="utf-8")
