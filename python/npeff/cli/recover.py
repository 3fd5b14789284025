"""``npeff recover``: vectors in parameter space of components of sketched Fishers."""

from __future__ import annotations

from pathlib import Path

import click

from npeff.cli.common import EXISTING, WRITABLE, command, listed, misused, quiet, size, wants


@command(
    examples="""
        npeff recover components.h5 train.py:model train.py:data --out recovered.h5
        npeff recover components.h5 train.py:model train.py:data --component 3,7 --out recovered.h5
    """
)
@click.argument("path", metavar="COMPONENTS", type=EXISTING)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option("--component", "-j", metavar="J[,J…]", help="Which components.  [default: all]")
@click.option("--out", type=WRITABLE, required=True, help="File of components to write; may be COMPONENTS itself.")
@click.option("--forward", metavar="TARGET", help="module:callable for (model, batch) -> logits, as for npeff fishers.")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: where the model is]")
@quiet
def recover(
    path: Path,
    model: str,
    data: str,
    component: str | None,
    out: Path,
    forward: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Compute the vectors in parameter space of COMPONENTS that were made of sketches, or of inner products alone.

    MODEL and DATA are those of the Fishers, the data in the same order. One pass over DATA serves all components asked
    for: a forward pass, and a backward pass per component. report, perturb, trace, export and the others take the file
    written here as they take COMPONENTS.
    """
    js = None if component is None else listed(component)
    if component is not None and js is None:
        misused(f"--component: expected J or J,J,…, got {component!r}")
    import npeff
    from npeff.models.targets import load_data, load_model, load_object
    from npeff.storage.recognition import check_components_target

    check_components_target(out)
    components = wants(npeff.load(path), "Components", path)
    if js and max(js) >= components.n_components:
        misused(f"--component: {path} has components 0 to {components.n_components - 1}, got {max(js)}")
    options = {"forward": load_object(forward, "--forward") if forward else None, "device": device}
    recovered = components.recover(load_model(model), load_data(data), js, progress=not quiet, **options)
    recovered.save(out)
    n = len(recovered.recovered)
    click.echo(
        f"{out}: {n} of {recovered.n_components} components have vectors in parameter space, {size(out.stat().st_size)}"
    )
