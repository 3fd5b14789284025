"""``npeff plan``: what stages 1 and 2 will take, before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npeff.cli.common import WRITABLE, command
from npeff.cli.fisher_options import fisher_options, understood


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
@fisher_options
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
    from npeff.models.targets import load_data, load_model

    result = npeff.plan(
        load_model(model),
        load_data(data),
        **understood(options, parameters, forward),
    )
    click.echo(str(result))
    if json_file is not None:
        from npeff.storage.files import atomic
        from npeff.storage.recognition import refuse_npeff_file

        refuse_npeff_file(json_file)
        with atomic(json_file) as scratch:
            scratch.write_text(result.to_json(), encoding="utf-8")
