"""Stages 1 to 3: ``npeff plan``, ``fishers``, ``decompose``, ``recover`` and ``encode``.

What the work will take; Fishers of a model and data; components of Fishers, and what is computed with both.
"""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from npeff.cli.command import (
    PLACES,
    Where,
    check_members,
    check_out,
    command,
    data_of_components,
    data_of_model,
    first,
    listed,
    loaded,
    misused,
    next_step,
    note,
    several,
    size,
    unruled,
)
from npeff.cli.options import Arguments, Count, Existing

if TYPE_CHECKING:
    from npeff.components.components import Encoded
    from npeff.fishers.fishers import Fishers
    from npeff.trust import Selection

DEFAULT_TOP_K = 65_536
"""Where no way to keep the Fishers is given; the help of --top-k states it."""
UNPLANNED = ("kind", "compress", "block_weights", "share", "out", "seed", "max_examples", "memory", "progress")
"""Arguments of ``compute_fishers`` that ``plan`` does not take, or in a sense of its own."""


@command(
    """
        npeff fishers train.py:model train.py:data --out fishers.h5
        npeff fishers zoo.mnist:load zoo.mnist:test --exact --energy 0.99 --out fishers.h5
        npeff fishers train.py:model train.py:data --sketch 4096 --out fishers.h5
        npeff fishers bert.py:model bert.py:batches --kind diagonal --parameters 'bert.encoder.*' --out d.h5
        npeff fishers hf:SmolLM2-135M prompts.jsonl --rank 2 --sketch 2048 --sketch-form kronecker --out f.h5
    """,
    Arguments("npeff:compute_fishers", skip=("compress", "share")),
    PLACES,
    shared=True,
)
def fishers(
    model: str,
    data: str,
    *,
    where: Where = None,
    out: Path,
    top_k: Annotated[Count | None, "N"] = None,
    sketch: Annotated[Count | None, "D"] = None,
    sketch_form: Literal["flat", "kronecker"] = "flat",
    exact: bool = False,
    gram_only: bool = False,
    block_weights: Annotated[str, "energy|balanced|FILE"] = "energy",
    **options: Any,
) -> None:
    """Compute the Fisher of every example of DATA under MODEL.

    MODEL and DATA are module:callable or file.py:callable. MODEL's callable returns a torch.nn.Module in
    evaluation mode, DATA's an iterable of batches: (inputs, labels), dicts with or without "labels", or
    tensors. Keep the order of the data fixed: examples are known by their position.

    Language models: MODEL may be hf:PATH, a folder or a .gguf file with a model of the transformers package, or its
    name on the hub; DATA a .txt, .jsonl, .csv or .parquet file of texts, or a folder written by Dataset.save_to_disk.
    An example is then a token and the prediction that the model makes there. Unless --parameters says otherwise, the
    Fishers are about the weights of the linear layers in the transformer blocks.

    Interrupted (Ctrl-C, kill -9, power), the same command resumes from the last shard. Started by torchrun
    (torchrun --nproc-per-node=4 -m npeff fishers …), processes share the batches and make one file.

    Options:
        out: File to write; with unfinished work beside it, that is continued.
        top_k: Keep each example's N largest values.  [default: 65536]
        sketch: Keep D random projections of every row, instead of --top-k; D a multiple of 16. See npeff recover.
        sketch_form: kronecker: large matrices are sketched without their gradients (see docs/sketch).
        exact: Keep all values; instead of --top-k.
        gram_only: Keep exact inner products of the rows, and no rows; instead of --top-k. See npeff recover.
        block_weights: Weights of the Fisher's blocks: as they are, about the same share of the trace for every layer
            (measured on the first examples), or the weights of FILE, of Fishers or components.
    """
    ways = {
        "--exact keeps all values": exact,
        "--top-k the largest": top_k,
        "--sketch random projections": sketch,
        "--gram-only inner products alone": gram_only,
    }
    chosen = [way for way, given in ways.items() if given]
    if len(chosen) > 1:
        misused(f"{', '.join(chosen)}: give one of them")
    if sketch_form != "flat" and not sketch:
        misused("--sketch-form belongs to --sketch")
    import npeff
    from npeff import distributed
    from npeff.models.targets import load_model

    if sketch:
        options["compress"] = npeff.Sketch(sketch, seed=options.get("seed", 0), form=sketch_form)
    elif gram_only:
        options["compress"] = npeff.GramOnly()
    elif not exact:
        options["compress"] = npeff.TopK(top_k or DEFAULT_TOP_K)
    if where is not None:
        options["where"] = where
    if block_weights not in ("energy", "balanced"):
        if not Path(block_weights).is_file():
            misused(
                f"--block-weights: expected energy, balanced or a file of Fishers or components, got {block_weights}"
            )
        options["block_weights"] = npeff.load(block_weights).block_weights or "energy"
    elif block_weights == "balanced":
        options["block_weights"] = block_weights
    if not top_k:  # that a model is smaller than the default is no news
        warnings.filterwarnings("ignore", message=r"TopK\(k=")
    batches = data_of_model(data, model, options)
    if first():
        _announce(out)
    compute = distributed.compute_fishers if several() else npeff.compute_fishers
    result = compute(load_model(model), batches, out=out, **class_basis(options))
    if not first():
        return
    click.echo(f"{out}: {len(result):,} Fishers of {result.n_parameters:,} parameters, {size(out.stat().st_size)}")
    if "parameters" not in options and result.provenance["options"]["parameters"]:
        note(f"  of the linear layers of the blocks, {len(result.parameters)}; --parameters '*' takes all parameters")
    slow = unruled(result.coverage)
    for name, why in slow[:5]:
        note(f"  {name}: {why}")
    if len(slow) > 5:
        note(f"  and {len(slow) - 5} more parameters: npeff info {out}")
    number = str(max(1, min(32, len(result) // 8)))
    next_step("decompose", out, "--n-components", number, "--out", out.with_name("components.h5"), options=options)


def class_basis(options: dict[str, Any]) -> dict[str, Any]:
    """Complete the options: a threshold on classes implies the basis of classes, where no other one is given."""
    thresholds = {"min_prob", "max_classes"} & options.keys()
    return {"basis": "class"} | options if thresholds else options


def _announce(out: Path) -> None:
    """Say what is already there, since resuming happens by itself."""
    from npeff.fishers.parts import describe_parts, parts_folder

    if out.exists():
        note(f"{out} exists: checking that it was made from this model, this data and these options")
    elif parts_folder(out).is_dir():
        note(f"{out}: resuming; {describe_parts(out)['n_examples']:,} examples are done")


@command(
    """
        npeff plan train.py:model train.py:data
        npeff plan train.py:model train.py:data --n-examples 60000 --memory 4GB --n-components 128
        npeff plan bert.py:model bert.py:batches --kind low_rank --energy 0.99 --json plan.json
    """,
    Arguments("npeff:plan"),
    Arguments("npeff:compute_fishers", skip=UNPLANNED),
    PLACES,
)
def plan(
    model: str,
    data: str,
    *,
    where: Where = None,
    json_file: Annotated[Path | None, "--json", "FILE"] = None,
    **options: Any,
) -> None:
    """Tell what Fishers of DATA under MODEL, and their decomposition, will take: time, memory, disk.

    The first batches are computed for real, once per way of keeping the Fishers; nothing of it stays. MODEL and DATA
    are as for npeff fishers.

    Options:
        json_file: Write the plan as JSON too.
    """
    import npeff
    from npeff.models.targets import load_model
    from npeff.storage.files import atomic

    check_out(json_file, option="--json")
    batches = data_of_model(data, model, options)
    result = npeff.plan(load_model(model), batches, **class_basis(options))
    click.echo(str(result))
    if json_file is not None:
        with atomic(json_file) as scratch:
            scratch.write_text(result.to_json(), encoding="utf-8")


PUBLISHED = ("learning_rate", "g_only", "joint", "log_every")


class Numbers(click.ParamType):  # type: ignore[type-arg]  # no generic in earlier clicks
    """One number from 1, or several separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the numbers."""
        numbers = listed(value)
        if numbers is None or min(numbers) < 1:
            self.fail(f"expected a number of components, or several as in 16,32,64, got {value!r}", param, ctx)
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
def decompose(
    path: Annotated[Existing, "FISHERS"],
    *,
    n_components: Annotated[list[int], Numbers(), "R[,R…]"],
    select: bool = False,
    out: Path,
    wrong_only: bool = False,
    **options: Any,
) -> None:
    """Factorise FISHERS into components.

    Started by torchrun (torchrun --nproc-per-node=4 -m npeff decompose …), each process holds a block of the
    examples; killed, the same command resumes. --learning-rate, --g-only, --joint and
    --log-every belong to --algorithm published, --folds to --select.

    Options:
        n_components: How many; several: --select.
        select: Try several numbers; take the one that the held-out loss recommends. The report shows the losses.
        out: File to write.
        wrong_only: Only examples that the model predicts wrongly.
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
    about = " (DATA as for npeff fishers)"
    next_step("report", out, "--data", "DATA", "--out", out.with_name("report"), options=options, about=about)


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
def recover(
    path: Annotated[Existing, "COMPONENTS"],
    model: str,
    data: str,
    *,
    component: Annotated[str | None, "-j", "J[,J…]"] = None,
    out: Path,
    **options: Any,
) -> None:
    """Compute the vectors in parameter space of COMPONENTS that were made of sketches, or of inner products alone.

    MODEL and DATA are those of the Fishers, the data in the same order. One pass over DATA serves all components asked
    for, and takes about as long as the Fishers took. perturb and trace recover what they need by themselves, and keep
    it in COMPONENTS; this does so beforehand, for many components at once.

    Options:
        component: Which components.  [default: all]
        out: File of components to write; may be COMPONENTS itself.
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
def encode(
    components_path: Annotated[Existing, "COMPONENTS"],
    fishers_path: Annotated[Existing, "FISHERS"],
    *,
    out: Path,
    **options: Any,
) -> None:
    """Coefficients of the examples in FISHERS on fixed COMPONENTS, solved to optimality.

    FISHERS must be computed with the same parameters and options as those the components come from. The table holds
    the coefficients, and per example its id, label, prediction, KKT residual and unexplained share.

    Options:
        out: Ending in .h5, .npz or .csv.
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
