"""Commands beside the pipeline: ``npeff demo``, ``npeff doctor``, ``npeff info`` and ``npeff export``.

The whole pipeline on handwritten digits, what this machine offers, what is in a file, and the same for other programs.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import webbrowser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import click

from npeff.cli.command import check_members, command, data_of_components, loaded, misused, size, unruled
from npeff.cli.options import Arguments, Existing, Whole

PACKAGES = ("npeff", "torch", "numpy", "scipy", "h5py", "scikit-learn", "matplotlib", "safetensors")
FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile",
    "asimd", "sve", "sve2",
)  # fmt: skip

Lines = list[tuple[str, str]]
"""What doctor finds, as names and values; failures are reported, never raised."""


@command(
    """
        npeff demo
        npeff demo --out /tmp/demo --n-components 16 --no-open
    """,
    Arguments("npeff.demo:run_demo", skip=("say",)),
)
def demo(
    *,
    out: Path = Path("npeff-demo"),
    open_page: Annotated[bool, "--open"] = True,
    **options: Any,
) -> None:
    """Train a small network on handwritten digits and show its components.

    Needs no download and about a minute: the digits come with scikit-learn (pip install 'npeff[demo]').
    Run again, it starts anew.

    Options:
        out: Folder for everything made.
        open_page: Open the page in a browser.
    """
    from npeff.demo import run_demo

    page = run_demo(out, say=click.echo, **options)
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if open_page and screen and webbrowser.open(page.resolve().as_uri()):
        click.echo("Opened it in your browser.")


@command(
    """
        npeff doctor
    """
)
def doctor() -> None:
    """Say which hardware and kernels are used, and why not faster ones."""
    sections = {"Versions": _versions, "Processor": _processor, "Kernels": _kernels, "CUDA": _cuda}
    for title, find in sections.items():
        click.echo(click.style(title, bold=True))
        lines = find()
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            for row, text in enumerate(value.splitlines() or [""]):
                click.echo(f"  {name if row == 0 else '':<{width}}  {text}")
        click.echo()


def _versions() -> Lines:
    lines = [("Python", f"{platform.python_version()} ({sys.executable})")]
    for package in PACKAGES:
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    return lines


def _processor() -> Lines:
    import psutil
    import torch

    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    flags = entries.get("flags", entries.get("Features", "")).split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPEFF_THREADS")
    set_ = ", ".join(f"{name}={os.environ[name]}" for name in limits if name in os.environ)
    return [
        ("model", entries.get("model name") or platform.processor() or platform.machine()),
        ("cores", f"{usable} usable of {os.cpu_count()}"),
        ("threads", f"{torch.get_num_threads()} in torch" + (f" ({set_})" if set_ else "")),
        ("features", " ".join(name for name in FEATURES if name in flags) or "unknown on this system"),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
    ]


def _kernels() -> Lines:
    lines: Lines = []
    try:
        from npeff.kernels import dispatch

        kernels: dict[tuple[str, str, str], list[str]] = {}
        for line in dispatch.report():
            kernels.setdefault((line.device, line.implementation, line.reason), []).append(line.kernel)
        for (device, implementation, reason), names in kernels.items():
            why = f"\n({reason})" if reason else ""
            lines.append((device, f"{implementation}: {', '.join(names)}{why}"))
        lines.append(("threads", f"{dispatch.num_threads()} in the CPU kernels"))
    except Exception as error:  # doctor is for broken installations too
        lines.append(("unavailable", f"{type(error).__name__}: {error}"))
    return lines


def _cuda() -> Lines:
    import torch

    lines: Lines = []
    try:
        from npeff import _cuda

        devices = int(_cuda.device_count())
        seen = f"{devices} device{'' if devices == 1 else 's'} found" if devices else f"no device: {_cuda.absence()}"
        lines.append(("npeff._cuda", "built with CUDA {}.{}; ".format(*_cuda.toolkit()) + seen))
        reasons = {i: _cuda.usable(i) for i in range(devices)}
        lines += [(f"npeff on cuda:{i}", f"cannot run: {reason}") for i, reason in reasons.items() if reason]
    except ImportError as error:
        lines.append(("npeff._cuda", f"not built ({error}); build where nvcc is found to have it"))
    except Exception as error:  # a driver that is present but broken
        lines.append(("npeff._cuda", f"built, but it cannot be used: {error}"))
    built, driver = torch.version.cuda, Path("/proc/driver/nvidia/version")
    lines.append(("torch", f"built for CUDA {built}" if built else "built without CUDA: models run on the processor"))
    none = "no NVIDIA driver found on this machine" if sys.platform == "linux" else "unknown on this system"
    lines.append(("driver", driver.read_text(errors="replace").splitlines()[0] if driver.exists() else none))
    usable = torch.cuda.device_count() if built and torch.cuda.is_available() else 0
    for i in range(usable):
        found = torch.cuda.get_device_properties(i)
        about = f"{found.name}, {found.total_memory >> 30} GiB, compute {found.major}.{found.minor}"
        lines.append((f"cuda:{i}", about))
    return lines if usable else [*lines, ("devices", "none that torch can use")]


@command(
    """
        npeff info fishers.h5
        npeff info components.h5 --json | jq .provenance
    """
)
def info(
    path: Annotated[Path, "FILE"],
    *,
    as_json: Annotated[bool, "--json"] = False,
) -> None:
    """Say what FILE holds, without reading its arrays.

    FILE is one that a command of npeff wrote, in HDF5, JSON or safetensors, unfinished work of npeff fishers included,
    or in one of the published layouts.

    Options:
        as_json: Everything, for programs.
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
    from npeff.reports.extras import describe_extras, read_extras_file

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
def export(
    path: Annotated[Existing, "FILE"],
    *,
    out: Path,
    layout: Literal["published"] | None = None,
    component: Annotated[Whole | None, "J"] = None,
    peft: bool = False,
    model: Annotated[str | None, "MODEL"] = None,
    data: Annotated[str | None, "DATA"] = None,
    **options: Any,
) -> None:
    """Write what FILE holds in another form.

    With --component the tensors carry the model's parameter names: load them with safetensors and add a
    multiple to the weights. Where the vector has to be recovered, --model and --data do so, and it is kept in FILE.
    --rank and --scale belong to --peft.

    Options:
        out: File to write; with --peft a folder.
        layout: Write all of it in the layout of the published code.
        component: Write one component's vector as parameter-shaped tensors.
        peft: Write it as a LoRA adapter, which peft loads; needs --model.
        model: The model of the Fishers.
        data: The data of the Fishers, where the vector has to be recovered.
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
