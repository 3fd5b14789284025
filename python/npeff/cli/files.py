"""``npeff info`` and ``npeff export``: what is in a file, and the same for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from npeff.cli.command import check_members, command, loaded, misused, size, unruled
from npeff.cli.options import EXISTING, WRITABLE, Arguments
from npeff.cli.texts import data_of_components


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
        npeff export components.h5 --component 7 --model lm.py:model --data lm.py:data --out g7.safetensors
        npeff export components.h5 --component 7 --peft --model lm.py:model --rank 8 --scale 0.3 --out adapter/
    """,
    Arguments("npeff:Components.to_peft", only=("rank", "scale")),
    Arguments("npeff:compute_fishers", only=("forward", "device", "progress")),
)
@click.argument("path", metavar="FILE", type=EXISTING)
@click.option("--out", type=WRITABLE, required=True, help="File to write; with --peft a folder.")
@click.option("--layout", type=click.Choice(["published"]), help="Write all of it in the layout of the published code.")
@click.option(
    "--component",
    type=click.IntRange(min=0),
    metavar="J",
    help="Write one component's vector as parameter-shaped tensors.",
)
@click.option("--peft", is_flag=True, help="Write it as a LoRA adapter, which peft loads; needs --model.")
@click.option("--model", metavar="MODEL", help="The model of the Fishers.")
@click.option("--data", metavar="DATA", help="The data of the Fishers, where the vector has to be recovered.")
def export(
    path: Path,
    out: Path,
    layout: str | None,
    component: int | None,
    peft: bool,
    model: str | None,
    data: str | None,
    **options: Any,
) -> None:
    """Write what FILE holds in another form.

    With --component the tensors carry the model's parameter names: load them with safetensors and add a
    multiple to the weights. Where the vector has to be recovered, --model and --data do so, and it is kept in FILE.
    --rank and --scale belong to --peft.
    """
    if (layout is None) == (component is None):
        misused("give either --layout published or --component J")
    if component is None and (peft or model or data):
        misused("--peft, --model and --data belong to --component J")
    if peft and model is None:
        misused("--peft: an adapter is for the layers of a model; give --model")
    if not peft and {"rank", "scale"} & options.keys():
        misused("--rank and --scale belong to --peft")
    if component is None:
        import npeff
        from npeff.components.published import write_published

        write_published(npeff.load(path), out)
        click.echo(f"{out}: {size(out.stat().st_size)}")
        return
    from npeff.models.targets import load_model

    components = loaded(path, "Components")
    check_members([component], components, path)
    given: Any = (load_model(model) if model else None, data_of_components(data, components) if data else None)
    if peft:
        share = components.to_peft(component, out, *given, **options)
        total = sum(part.stat().st_size for part in out.iterdir())
        click.echo(f"{out}: an adapter with {share:.0%} of the vector's squared norm, {size(total)}")
        return
    components.save_state_dict(component, out, *given, **options)
    click.echo(f"{out}: {size(out.stat().st_size)}")
