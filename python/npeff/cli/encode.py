"""``npeff encode``: coefficients of unseen examples."""

from __future__ import annotations

from pathlib import Path

import click

from npeff.cli.common import EXISTING, WRITABLE, command, misused, wants


@command(
    examples="""
        npeff encode components.h5 fishers_new.h5 --out coefficients.h5
        npeff encode components.h5 fishers_new.h5 --out coefficients.csv
    """
)
@click.argument("components_path", metavar="COMPONENTS", type=EXISTING)
@click.argument("fishers_path", metavar="FISHERS", type=EXISTING)
@click.option("--out", type=WRITABLE, required=True, help="Ending in .h5, .npz or .csv.")
def encode(components_path: Path, fishers_path: Path, out: Path) -> None:
    """Coefficients of the examples in FISHERS on fixed COMPONENTS, solved to optimality.

    FISHERS must be computed with the same parameters and options as those the components come from.
    """
    from npeff.cli.tables import SUFFIXES, write_coefficients

    if out.suffix.lower() not in SUFFIXES:
        misused(f"--out: expected a name ending in .h5, .npz or .csv, got {out}")
    import npeff
    from npeff.storage.recognition import refuse_npeff_file

    refuse_npeff_file(out)
    components = wants(npeff.load(components_path), "Components", components_path)
    fishers = wants(npeff.load(fishers_path), "Fishers", fishers_path)
    encoded = components.encode(fishers)
    write_coefficients(encoded, fishers, out)
    worst = float(encoded.kkt.max()) if len(encoded.kkt) else 0.0
    n, r = encoded.coefficients.shape
    click.echo(f"{out}: coefficients of {n:,} examples on {r} components; largest KKT residual {worst:.1e}")
