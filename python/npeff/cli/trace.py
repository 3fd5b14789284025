"""``npeff trace``: where in the network a component acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npeff.cli.common import EXISTING, WRITABLE, command, misused, quiet, seed, wants
from npeff.cli.perturb import asked, chosen, moving

ENDINGS = (".png", ".svg", ".pdf", ".json")


@command(
    examples="""
        npeff trace train.py:model train.py:data components.h5 --component 7 --out where.png
        npeff trace train.py:model train.py:data components.h5 -j 7 --groups parameter --out where.json
        npeff trace bert.py:model bert.py:data components.h5 -j 7 --groups bert.py:heads --out heads.svg
    """
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.argument("path", metavar="COMPONENTS", type=EXISTING)
@moving
@click.option(
    "--groups",
    default="layer",
    show_default=True,
    metavar="layer|parameter|TARGET",
    help="What to take one at a time; module:callable for a mapping, as made by npeff.heads and npeff.units.",
)
@click.option(
    "--out",
    type=WRITABLE,
    help="Picture, ending in .png, .svg or .pdf; or .json for the numbers, which npeff report --extras shows.",
)
@seed
@quiet
def trace(
    model: str,
    data: str,
    path: Path,
    component: int | None,
    strategy: str | None,
    sign: str,
    baseline: str,
    lam: tuple[float, ...],
    forward: str | None,
    groups: str,
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Say where in MODEL a component acts: how much of its KL each layer, tensor or head carries.

    The perturbation is applied in one part alone, and everywhere but there; both columns are shares of the KL of
    all of it on the component's top examples.
    """
    import npeff
    from npeff.models.targets import load_data, load_made, load_model
    from npeff.storage.files import check_target
    from npeff.storage.recognition import refuse_npeff_file

    if out is not None:
        if out.suffix.lower() not in ENDINGS:
            misused(f"--out: expected a name ending in .png, .svg, .pdf or .json, got {out}")
        check_target(out)
        refuse_npeff_file(out)  # before the work: a slip in --out must not cost it
    components = wants(npeff.load(path), "Components", path)
    j = chosen(components, component, strategy, path)
    parts: Any = groups if groups in ("layer", "parameter") else load_made(groups, "--groups")
    found = npeff.trace(
        load_model(model),
        load_data(data),
        components,
        j,
        parts,
        **asked(sign, baseline, lam, forward, quiet, options),
    )
    click.echo(found.table())
    if out is not None:
        if out.suffix.lower() == ".json":
            found.save(out)
        else:
            found.plot(out)
        click.echo(f"{out}: {len(found)} parts")
