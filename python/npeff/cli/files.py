"""``npeff info`` and ``npeff export``: what is in a file, and the same for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from npeff.cli.command import check_members, command, loaded, misused, size, unruled
from npeff.cli.options import EXISTING, WRITABLE


@command(
    """
        npeff info fishers.h5
        npeff info components.h5 --json | jq .provenance
    """
)
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def info(path: Path, as_json: bool) -> None:
    """Say what FILE holds, without reading its arrays.

    FILE is one that a command of npeff wrote, in HDF5, JSON or safetensors, unfinished work of npeff fishers included,
    or in one of the published layouts.
    """
    found = _described(path)
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


def _described(path: Path) -> dict[str, Any]:
    """What a file holds, JSON-able; arrays as name → shape and dtype.

    Raises:
        ForeignFileError: No command of npeff writes such files.
    """
    from npeff.components.loading import describe
    from npeff.errors import ForeignFileError

    try:
        return describe(path)
    except ForeignFileError:
        summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
        with path.open("rb") as file:
            head = file.read(64)
        if head.lstrip(b"\xef\xbb\xbf \n\r\t")[:1] in (b"{", b"["):
            return summary | _described_json(path)
        if path.suffix.lower() == ".safetensors":
            return summary | _described_tensors(path)
        if head.startswith(b"\x89HDF") and (table := _described_table(path)):
            return summary | table
        raise


def _described_json(path: Path) -> dict[str, Any]:
    from npeff.reports.evidence import describe_extras, read_extras_file

    content = read_extras_file(path)
    if isinstance(content, dict) and {"choices", "advice", "n_parameters"} <= set(content):
        plain = {name: value for name, value in content.items() if isinstance(value, str | int | float)}
        return {"format": "JSON", "content": "a plan of npeff plan", **plain}
    return describe_extras(path)


def _described_tensors(path: Path) -> dict[str, Any]:
    """A component's vector as ``npeff export --component`` writes it.

    Raises:
        ForeignFileError: The file is damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    from npeff.errors import ForeignFileError

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            arrays = {name: [list(part.get_shape()), part.get_dtype()] for name, part in slices.items()}
            about = json.loads((file.metadata() or {}).get("npeff", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ForeignFileError(f"{path}: expected a safetensors file of npeff export --component ({error})") from error
    return {
        "format": "safetensors",
        "content": "a component's vector as tensors",
        "arrays": arrays,
        "provenance": about,
    }


def _described_table(path: Path) -> dict[str, Any]:
    """Tables of ``npeff encode`` and ``npeff influence``; empty for other HDF5 files."""
    import h5py

    from npeff.storage.hdf5 import open_hdf5

    with open_hdf5(path) as file:
        arrays = {n: [list(d.shape), str(d.dtype)] for n, d in file.items() if isinstance(d, h5py.Dataset)}
    for content, names in (
        ("coefficients, of npeff encode", {"coefficients", "kkt", "unexplained"}),
        ("influence scores, of npeff influence", {"values", "test_values", "residuals"}),
    ):
        if names <= set(arrays):
            return {"format": "HDF5", "content": content, "arrays": arrays}
    return {}


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
    """
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
    if component is None:
        import npeff
        from npeff.components.published import write_published

        write_published(npeff.load(path), out)
    else:
        components = loaded(path, "Components")
        check_members([component], components, path)
        components.save_state_dict(component, out)
    click.echo(f"{out}: {size(out.stat().st_size)}")
