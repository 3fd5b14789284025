"""``npeff fishers``: stage 1."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from npeff.cli.common import WRITABLE, command, misused, note, quiet, seed, several, size, unruled
from npeff.cli.fisher_options import fisher_options, understood
from npeff.cli.processes import first

DEFAULT_TOP_K = 65_536


@command(
    examples="""
        npeff fishers train.py:model train.py:data --out fishers.h5
        npeff fishers zoo.mnist:load zoo.mnist:test --exact --energy 0.99 --out fishers.h5
        npeff fishers train.py:model train.py:data --sketch 4096 --out fishers.h5
        npeff fishers bert.py:model bert.py:batches --kind diagonal --parameters 'bert.encoder.*' --out d.h5
    """,
    shared=True,
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.option(
    "--out",
    type=WRITABLE,
    required=True,
    help="File to write; with unfinished work beside it, that is continued.",
)
@click.option(
    "--kind",
    type=click.Choice(["low_rank", "diagonal"]),
    default="low_rank",
    show_default=True,
    help="Form of the Fishers.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Keep each example's N largest values.  [default: {DEFAULT_TOP_K}]",
)
@click.option(
    "--sketch",
    type=click.IntRange(min=1),
    metavar="D",
    help="Keep D random projections of every row, instead of --top-k; D a multiple of 16. See npeff recover.",
)
@click.option(
    "--sketch-form",
    type=click.Choice(["flat", "kronecker"]),
    default="flat",
    show_default=True,
    help="kronecker: large matrices are sketched without their gradients (see docs/sketch).",
)
@click.option("--exact", is_flag=True, help="Keep all values; instead of --top-k.")
@click.option(
    "--gram-only",
    is_flag=True,
    help="Keep exact inner products of the rows, and no rows; instead of --top-k. See npeff recover.",
)
@fisher_options
@click.option("--memory", metavar="BYTES", help="Cut batches so that activations and output gradients fit, e.g. 4GB.")
@click.option("--max-examples", type=click.IntRange(min=1), help="Stop after this many.")
@seed
@quiet
def fishers(
    model: str,
    data: str,
    out: Path,
    top_k: int | None,
    sketch: int | None,
    sketch_form: str,
    exact: bool,
    gram_only: bool,
    parameters: tuple[str, ...],
    forward: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Compute the Fisher of every example of DATA under MODEL.

    MODEL and DATA are module:callable or file.py:callable. MODEL's callable returns a torch.nn.Module in
    evaluation mode, DATA's an iterable of batches: (inputs, labels), dicts with or without "labels", or
    tensors. Keep the order of the data fixed: examples are known by their position.

    Interrupted (Ctrl-C, kill -9, power), the same command resumes from the last shard. Started by torchrun
    (torchrun --nproc-per-node=4 -m npeff fishers …), processes share the batches and make one file.
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
    from npeff.models.targets import load_data, load_model

    if first():
        _announce(out)
    if not top_k:  # a model smaller than our default is no news
        warnings.filterwarnings("ignore", message=r"TopK\(k=")
    from npeff import distributed

    compute = distributed.compute_fishers if several() else npeff.compute_fishers
    result = compute(
        load_model(model),
        load_data(data),
        compress=_compression(top_k, sketch, sketch_form, options["seed"], exact, gram_only),
        out=out,
        progress=not quiet,
        **understood(options, parameters, forward),
    )
    if not first():
        return
    click.echo(f"{out}: {len(result):,} Fishers of {result.n_parameters:,} parameters, {size(out.stat().st_size)}")
    slow = unruled(result.coverage)
    for name, why in slow[:5]:
        note(f"  {name}: {why}")
    if len(slow) > 5:
        note(f"  and {len(slow) - 5} more parameters: npeff info {out}")


def _compression(top_k: int | None, sketch: int | None, form: str, seed: int, exact: bool, gram_only: bool) -> Any:
    import npeff

    if sketch:
        return npeff.Sketch(sketch, seed=seed, form="kronecker" if form == "kronecker" else "flat")
    if gram_only:
        return npeff.GramOnly()
    return None if exact else npeff.TopK(top_k or DEFAULT_TOP_K)


def _announce(out: Path) -> None:
    """Say what is already there, since resuming happens by itself."""
    from npeff.fishers.parts import describe_parts, parts_folder

    if out.exists():
        note(f"{out} exists: checking that it was made from this model, this data and these options")
    elif parts_folder(out).is_dir():
        note(f"{out}: resuming; {describe_parts(out)['n_examples']:,} examples are done")
