"""``npeff info`` and ``npeff export``: what is in a file, and the same for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from npeff.cli.common import EXISTING, WRITABLE, command, misused, size, unruled, wants


@command(
    examples="""
        npeff info fishers.h5
        npeff info components.h5 --json | jq .provenance
    """
)
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def info(path: Path, as_json: bool) -> None:
    """Say what FILE holds, without reading its arrays.

    FILE is one of npeff's, unfinished work of npeff fishers included, or in one of the published layouts.
    """
    from npeff.storage import describe

    found = describe(path)
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    lines = dict(found)
    lines["bytes"] = size(int(found["bytes"])) if "bytes" in found else "?"
    parameters = lines.pop("parameters", None) or []
    coverage = lines.pop("coverage", None) or []
    if parameters:
        lines["parameters"] = {p["name"]: " × ".join(map(str, p["shape"])) or "1" for p in parameters}
    if "arrays" in lines:
        lines["arrays"] = {
            name: f"{' × '.join(map(str, shape))} {dtype}" for name, (shape, dtype) in lines["arrays"].items()
        }
    if slow := dict(unruled(coverage)):
        lines["without a gradient rule"] = slow
    _print(lines)


def _print(lines: dict[str, Any], indent: str = "") -> None:
    width = min(28, max((len(str(name)) for name in lines), default=0))
    for name, value in lines.items():
        if isinstance(value, dict) and value:
            click.echo(f"{indent}{name}:")
            _print(value, indent + "  ")
        else:
            text = (
                f"{value:,}"
                if type(value) is int
                else value
                if isinstance(value, str)
                else json.dumps(value, default=str)
            )
            click.echo(f"{indent}{name:<{width}}  {text}")


@command(
    examples="""
        npeff export fishers.h5 --layout published --out theirs.h5
        npeff export components.h5 --component 7 --out g7.safetensors
    """
)
@click.argument("path", metavar="FILE", type=EXISTING)
@click.option("--out", type=WRITABLE, required=True, help="File to write.")
@click.option("--layout", type=click.Choice(["published"]), help="Write all of it in the layout of the published code.")
@click.option(
    "--component",
    type=click.IntRange(min=0),
    metavar="J",
    help="Write one component's vector as parameter-shaped tensors.",
)
def export(path: Path, out: Path, layout: str | None, component: int | None) -> None:
    """Write what FILE holds in another form.

    With --component the tensors carry the model's parameter names: load them with safetensors and add a
    multiple to the weights.
    """
    if (layout is None) == (component is None):
        misused("give either --layout published or --component J")
    import npeff

    loaded = npeff.load(path)
    if component is None:
        from npeff.storage.published import write_published

        write_published(loaded, out)
    else:
        components = wants(loaded, "Components", path)
        if component >= components.n_components:
            misused(f"--component: {path} has components 0 to {components.n_components - 1}, got {component}")
        components.save_state_dict(component, out)
    click.echo(f"{out}: {size(out.stat().st_size)}")
