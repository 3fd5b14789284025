"""``npeff trust``: what speaks for a decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npeff.cli.common import EXISTING, WRITABLE, command, note, quiet, seed, wants


@command(
    examples="""
        npeff trust fishers.h5 components.h5
        npeff trust fishers.h5 components.h5 --repeats 8 --shuffles 5 --out trust.json
    """
)
@click.argument("fishers_path", metavar="FISHERS", type=EXISTING)
@click.argument("components_path", metavar="COMPONENTS", type=EXISTING)
@click.option("--repeats", type=click.IntRange(min=2), default=4, show_default=True, help="Decompositions of parts.")
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Examples in a part."
)
@click.option(
    "--shuffles", type=click.IntRange(min=0), default=2, show_default=True, help="Decompositions of shuffled Fishers."
)
@click.option("--out", type=WRITABLE, help="JSON file to write, for npeff report --extras.")
@seed
@quiet
def trust(
    fishers_path: Path,
    components_path: Path,
    repeats: int,
    share: float,
    shuffles: int,
    out: Path | None,
    seed: int,
    quiet: bool,
) -> None:
    """How stable COMPONENTS are, what they explain of FISHERS, and what chance would give."""
    import numpy as np

    import npeff
    from npeff.perturbation.effect import plain, write_json
    from npeff.storage.recognition import refuse_npeff_file

    if out is not None:
        refuse_npeff_file(out)
    fishers = wants(npeff.load(fishers_path), "Fishers", fishers_path)
    components = wants(npeff.load(components_path), "Components", components_path)
    if shuffles and fishers.rows.products_only:
        note("no null model: inner products alone (--gram-only) have no entries that could be shuffled")
        shuffles = 0
    shares = npeff.trust.explained(components, fishers)
    stable = npeff.trust.stability(fishers, components, repeats=repeats, share=share, seed=seed, progress=not quiet)
    found: dict[str, Any] = {"explained": shares}
    found["stability"] = stable.to_json() | {"components_digest": components.digest}
    energy = np.square(components.coefficients.astype(np.float64)).mean(0)
    if shuffles:
        null = npeff.trust.null_model(fishers, components, repeats=shuffles, seed=seed, progress=not quiet)
        found["null"] = null.to_json()
    known = shares[~np.isnan(shares)]
    click.echo(f"explained of an example's Fisher: median {np.median(known):.0%}, lowest {known.min(initial=1):.0%}")
    click.echo("component  energy  comes back (|cos|)" + ("  more than chance" if shuffles else ""))
    for j in range(components.n_components):
        line = f"{j:9d}  {energy[j]:6.4f}  {stable.components[j]:18.3f}"
        click.echo(line + (f"  {'yes' if found['null']['above'][j] else 'no':>16}" if shuffles else ""))
    for n, index in stable.strategies.items():
        mark = "  as well as any" if n in stable.stable_numbers else ""
        click.echo(f"{n:2d} strategies: parts agree on {index:.2f} (adjusted Rand index){mark}")
    if shuffles:
        loss = "not on record" if np.isnan(components.loss) else f"{components.loss:.4f}"
        click.echo(f"loss {loss}; of shuffled Fishers {np.mean(found['null']['losses']):.4f}")
    if out is not None:
        write_json(plain(found), out)
        click.echo(f"{out}: for npeff report … --extras {out}")
