"""``npeff decompose``, ``recover``, ``encode`` and ``trust``: components of Fishers, and what is done with both."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npeff.cli.command import (
    check_members,
    check_out,
    command,
    listed,
    loaded,
    misused,
    note,
    several,
    size,
)
from npeff.cli.options import EXISTING, WRITABLE, Arguments
from npeff.cli.texts import data_of_components

if TYPE_CHECKING:
    from npeff.components.components import Encoded
    from npeff.fishers.fishers import Fishers
    from npeff.trust import Selection

PUBLISHED = ("learning_rate", "g_only", "joint", "log_every")


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    numbers = listed(value)
    if numbers is None or min(numbers) < 1:
        raise click.BadParameter(f"expected a number of components, or several as in 16,32,64, got {value!r}")
    return numbers


@command(
    """
        npeff decompose fishers.h5 --n-components 64 --out components.h5
        npeff decompose fishers.h5 --n-components 16,32,64,128 --select --out components.h5
        npeff decompose fishers.h5 --n-components 64 --block-weights balanced --n-init 8 --out components.h5
        npeff decompose fishers.h5 --n-components 48 --wrong-only --out heuristics.h5
    """,
    Arguments("npeff:decompose", skip=("published", "init", "callback")),
    Arguments("npeff.trust:select", only=("folds",)),
    Arguments("npeff:PublishedOptions"),
    shared=True,
)
@click.argument("path", metavar="FISHERS", type=EXISTING)
@click.option("--n-components", callback=_numbers, required=True, metavar="R[,R…]", help="How many; several: --select.")
@click.option(
    "--select",
    is_flag=True,
    help="Try several numbers; take the one that the held-out loss recommends. The report shows the losses.",
)
@click.option("--out", type=WRITABLE, required=True, help="File to write.")
@click.option("--wrong-only", is_flag=True, help="Only examples that the model predicts wrongly.")
def decompose(path: Path, n_components: list[int], select: bool, out: Path, wrong_only: bool, **options: Any) -> None:
    """Factorise FISHERS into components.

    Started by torchrun (torchrun --nproc-per-node=4 -m npeff decompose …), each process holds a block of the
    examples; killed, the same command resumes. --learning-rate, --g-only, --joint and
    --log-every belong to --algorithm published, --folds to --select.
    """
    published = {name: options.pop(name) for name in PUBLISHED if name in options}
    folds = {name: options.pop(name) for name in ("folds",) if name in options}
    if published and options.get("algorithm") != "published":
        misused(
            f"--{' and --'.join(published).replace('_', '-')}: give --algorithm published, the solver they belong to"
        )
    if len(n_components) > 1 and not select:
        misused(f"--n-components {','.join(map(str, n_components))}: several numbers need --select")
    if folds and not select:
        misused("--folds belongs to --select")
    if select and options.get("algorithm") == "published":
        misused("--select works with --algorithm npeff")
    if select and several():
        misused("--select tries numbers of components in one process; choose one, then start several")
    import npeff
    from npeff import distributed
    from npeff.storage.container import check_replaceable

    check_replaceable(out, "components")  # before the search: a slip in --out must not cost it
    if published:
        options["published"] = npeff.PublishedOptions(**published)
    fishers = loaded(path, "Fishers")
    if wrong_only:
        fishers = fishers.filter(wrong=True)
    if several():
        options.setdefault("checkpoint", out.with_name(f"{out.name}.search"))
        components = distributed.decompose(fishers, n_components[0], **options)
        if components is None:
            return
    elif select:
        selection = _selected(fishers, n_components, options | folds)
        components = npeff.decompose(fishers, selection.chosen, **options)
        # for the report
        components = replace(components, provenance={**components.provenance, "selection": selection.to_json()})
    else:
        components = npeff.decompose(fishers, n_components[0], **options)
    components.save(out)
    if options.get("checkpoint"):  # only now that the components are safe
        Path(options["checkpoint"]).unlink(missing_ok=True)
    click.echo(
        f"{out}: {components.n_components} components of {len(fishers):,} examples, relative loss {components.loss:.4f}"
    )
    if components.not_recovered:
        note(
            f"perturb and trace recover the vectors that they need; for all at once: npeff recover {out} MODEL DATA "
            f"--out {out}"
        )


def _selected(fishers: Any, numbers: list[int], options: dict[str, Any]) -> Selection:
    """Try the numbers of components, and print a table of their held-out losses."""
    import npeff

    plain = {name: value for name, value in options.items() if name not in ("checkpoint", "algorithm")}
    selection = npeff.trust.select(fishers, numbers, **plain)
    click.echo("components  loss  held-out loss (mean ± standard deviation over folds)")
    for column, r in enumerate(selection.n_components):
        folds = selection.held_out[:, column]
        mark = "  ← chosen" if r == selection.chosen else ""
        click.echo(f"{r:10d}  {selection.train[column]:.4f}  {folds.mean():.4f} ± {folds.std(ddof=1):.4f}{mark}")
    return selection


@command(
    """
        npeff recover components.h5 train.py:model train.py:data --out recovered.h5
        npeff recover components.h5 train.py:model train.py:data --component 3,7 --out recovered.h5
        npeff recover components.h5 lm.py:model lm.py:data --rank 8 --out components.h5
    """,
    Arguments("npeff:Components.recover", only=("rank",)),
    Arguments("npeff:compute_fishers", only=("forward", "device", "progress")),
)
@click.argument("path", metavar="COMPONENTS", type=EXISTING)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option("--component", "-j", metavar="J[,J…]", help="Which components.  [default: all]")
@click.option("--out", type=WRITABLE, required=True, help="File of components to write; may be COMPONENTS itself.")
def recover(path: Path, model: str, data: str, component: str | None, out: Path, **options: Any) -> None:
    """Compute the vectors in parameter space of COMPONENTS that were made of sketches, or of inner products alone.

    MODEL and DATA are those of the Fishers, the data in the same order. One pass over DATA serves all components asked
    for, and takes about as long as the Fishers took. perturb and trace recover what they need by themselves, and keep
    it in COMPONENTS; this does so beforehand, for many components at once.
    """
    js = None if component is None else listed(component)
    if component is not None and js is None:
        misused(f"--component: expected J or J,J,…, got {component!r}")
    from npeff.models.targets import load_model
    from npeff.storage.container import check_replaceable

    check_replaceable(out, "components")
    components = loaded(path, "Components")
    if js:
        check_members(js, components, path)
    recovered = components.recover(load_model(model), data_of_components(data, components), js, **options)
    recovered.save(out)
    n = recovered.n_components - len(recovered.not_recovered)
    lost = "" if recovered.factored is None else f", factors lose up to {recovered.factored_lost.sum(1).max():.1%}"
    click.echo(
        f"{out}: {n} of {recovered.n_components} components have vectors in parameter space{lost}, "
        f"{size(out.stat().st_size)}"
    )


@command(
    """
        npeff encode components.h5 fishers_new.h5 --out coefficients.h5
        npeff encode components.h5 fishers_new.h5 --out coefficients.csv
    """,
    Arguments("npeff:Components.encode"),
)
@click.argument("components_path", metavar="COMPONENTS", type=EXISTING)
@click.argument("fishers_path", metavar="FISHERS", type=EXISTING)
@click.option("--out", type=WRITABLE, required=True, help="Ending in .h5, .npz or .csv.")
def encode(components_path: Path, fishers_path: Path, out: Path, **options: Any) -> None:
    """Coefficients of the examples in FISHERS on fixed COMPONENTS, solved to optimality.

    FISHERS must be computed with the same parameters and options as those the components come from. The table holds
    the coefficients, and per example its id, label, prediction, KKT residual and unexplained share.
    """
    check_out(out, ".h5", ".npz", ".csv")
    components, fishers = loaded(components_path, "Components"), loaded(fishers_path, "Fishers")
    encoded = components.encode(fishers, **options)
    _write_coefficients(encoded, fishers, out)
    worst = float(encoded.kkt.max()) if len(encoded.kkt) else 0.0
    n, r = encoded.coefficients.shape
    click.echo(f"{out}: coefficients of {n:,} examples on {r} components; largest KKT residual {worst:.1e}")


def _write_coefficients(encoded: Encoded, fishers: Fishers, path: Path) -> None:
    """Write coefficients and what identifies the examples; to CSV with a column ``component_j`` per component."""
    import numpy as np

    from npeff.storage.files import atomic
    from npeff.storage.writing import Data, write_hdf5

    columns: dict[str, Any] = {
        "ids": np.asarray(fishers.ids),
        "labels": np.asarray(fishers.labels),
        "predictions": np.asarray(fishers.predictions),
        "kkt": encoded.kkt,
        "unexplained": encoded.unexplained,
    }
    arrays = {"coefficients": encoded.coefficients, **columns}
    with atomic(path) as scratch:
        if path.suffix.lower() == ".csv":
            with scratch.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([*columns, *(f"component_{j}" for j in range(encoded.coefficients.shape[1]))])
                for i, row in enumerate(encoded.coefficients):
                    writer.writerow([*(column[i] for column in columns.values()), *row])
        elif path.suffix.lower() == ".npz":
            with scratch.open("wb") as binary:
                np.savez_compressed(binary, **arrays)
        else:
            write_hdf5(scratch, [Data.of(name, values) for name, values in arrays.items()], {})


@command(
    """
        npeff trust fishers.h5 components.h5
        npeff trust fishers.h5 components.h5 --repeats 8 --shuffles 5 --out trust.json
    """,
    Arguments("npeff.trust:stability"),
)
@click.argument("fishers_path", metavar="FISHERS", type=EXISTING)
@click.argument("components_path", metavar="COMPONENTS", type=EXISTING)
@click.option(
    "--shuffles", type=click.IntRange(min=0), default=2, show_default=True, help="Decompositions of shuffled Fishers."
)
@click.option("--out", type=WRITABLE, help="JSON file to write, for npeff report --extras.")
def trust(fishers_path: Path, components_path: Path, shuffles: int, out: Path | None, **options: Any) -> None:
    """How stable COMPONENTS are, what they explain of FISHERS, and what chance would give."""
    import numpy as np

    import npeff
    from npeff.perturbation.effect import plain, write_json

    check_out(out)
    fishers, components = loaded(fishers_path, "Fishers"), loaded(components_path, "Components")
    if shuffles and fishers.rows.products_only:
        note("no null model: inner products alone (--gram-only) have no entries that could be shuffled")
        shuffles = 0
    stable = npeff.trust.stability(fishers, components, **options)
    shares = npeff.trust.explained(components, fishers)
    found: dict[str, Any] = {"explained": shares}
    found["stability"] = stable.to_json() | {"components_digest": components.digest}
    energy = np.square(components.coefficients.astype(np.float64)).mean(0)
    if shuffles:
        shared = {name: value for name, value in options.items() if name in ("seed", "progress")}
        found["null"] = npeff.trust.null_model(fishers, components, repeats=shuffles, **shared).to_json()
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
