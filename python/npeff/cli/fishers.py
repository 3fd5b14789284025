"""``npeff fishers`` and ``npeff plan``: stage 1, and what it and stage 2 will take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from npeff.cli.command import check_out, command, first, misused, note, several, size, unruled
from npeff.cli.options import WRITABLE, Arguments
from npeff.cli.texts import PLACES, data_of_model, where

DEFAULT_TOP_K = 65_536
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
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@where
@click.option(
    "--block-weights",
    default="energy",
    show_default=True,
    metavar="energy|balanced|FILE",
    help="Weights of the Fisher's blocks: as they are, about the same share of the trace for every layer (measured on "
    "the first examples), or the weights of FILE, of Fishers or components.",
)
@click.option(
    "--out",
    type=WRITABLE,
    required=True,
    help="File to write; with unfinished work beside it, that is continued.",
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
def fishers(
    model: str,
    data: str,
    out: Path,
    top_k: int | None,
    sketch: int | None,
    sketch_form: str,
    exact: bool,
    gram_only: bool,
    block_weights: str,
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
        options["compress"] = npeff.Sketch(sketch, seed=options.get("seed", 0), form=sketch_form)  # type: ignore[arg-type]
    elif gram_only:
        options["compress"] = npeff.GramOnly()
    elif not exact:
        options["compress"] = npeff.TopK(top_k or DEFAULT_TOP_K)
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


def class_basis(options: dict[str, Any]) -> dict[str, Any]:
    """Complete the options: a threshold on classes implies the basis of classes."""
    thresholds = {"min_prob", "max_classes"} & options.keys()
    return options | {"basis": "class"} if thresholds else options


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
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@where
@click.option("--json", "json_file", type=WRITABLE, metavar="FILE", help="Write the plan as JSON too.")
def plan(model: str, data: str, json_file: Path | None, **options: Any) -> None:
    """Tell what Fishers of DATA under MODEL, and their decomposition, will take: time, memory, disk.

    The first batches are computed for real, once per way of keeping the Fishers; nothing of it stays. MODEL and DATA
    are as for npeff fishers.
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
