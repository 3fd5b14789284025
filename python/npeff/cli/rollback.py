"""``npeff rollback``: which training triples made a prediction of a knowledge-graph model."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from npeff.cli.command import check_out, command, components_of, for_report, misused, note, size
from npeff.cli.options import EXISTING, WRITABLE, Arguments

if TYPE_CHECKING:
    from npeff.companions.rollback import Explanation, Record, Vocabulary

FIELDS = (
    "head",
    "relation",
    "tail",
    "probability",
    "rank",
    "influence",
    "because_head",
    "because_relation",
    "because_tail",
)


@command(
    """
        npeff rollback train.txt --record record.h5
        npeff rollback record.h5 --targets test.txt -k 10 --out explanations.tsv
        npeff rollback record.h5 --targets data.txt --component components.h5:3,7 --out behind.json
        npeff rollback train.txt --model complex --dim 32 --epochs 20 --targets test.txt --predicted --check
    """,
    Arguments("npeff.companions.rollback:Recipe"),
    Arguments("npeff.companions.rollback:fit", only=("all_rows", "progress")),
)
@click.argument("path", metavar="TRIPLES|RECORD", type=EXISTING)
@click.option("--targets", type=EXISTING, help="Triples to explain; a tail ? stands for the predicted one.")
@click.option("--predicted", is_flag=True, help="Explain the predicted tails in place of the given ones.")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Training triples per target.")
@click.option("--check", is_flag=True, help="Leave the explanations out, train again, and report what changed.")
@click.option(
    "--component",
    metavar="FILE:J",
    help="Instead: the training triples behind component J (or several, FILE:J,J,…), over its K top examples; the "
    "triples of --targets are those whose Fishers were computed, in their order.",
)
@click.option(
    "--out",
    type=WRITABLE,
    help="Tab-separated file of explanations; with --component .json for a report.  [default: print them]",
)
@click.option("--record", "record_path", type=WRITABLE, help="Write the record of the training to this file.")
@click.option(
    "--model", "kind", type=click.Choice(["distmult", "complex"]), default="distmult", show_default=True, help="Score."
)
@click.option("--dim", type=click.IntRange(min=1), default=10, show_default=True, help="Elements per embedding.")
def rollback(
    path: Path,
    targets: Path | None,
    predicted: bool,
    k: int,
    check: bool,
    out: Path | None,
    record_path: Path | None,
    component: str | None,
    kind: str,
    dim: int,
    **options: Any,
) -> None:
    """Explain predictions of knowledge-graph models by the training triples that made them.

    TRIPLES, one a line as head, relation and tail separated by tabs, train a model at batch size 1 while every
    triple's updates of the weights are recorded; a RECORD of an earlier training is explained without training. The
    influence of a triple is the probability that the target loses when its updates are subtracted (Gradient Rollback).
    """
    if targets is None and (record_path is None or out or check or predicted):
        misused("give --targets to explain, or --record to keep the record of a training for later")
    if component and (targets is None or check or predicted):
        misused(
            "--component: give --targets, the triples whose Fishers were computed; it goes without the other options"
        )
    if component and (out is None or out.suffix.lower() != ".json"):
        misused("--component: give --out, a name ending in .json")
    from npeff.companions import rollback as companion

    is_record = False
    if path.is_file():
        with path.open("rb") as file:
            is_record = file.read(4) == b"\x89HDF"
    if is_record and record_path is not None:
        misused(f"{path} is a record already: --record belongs to a training")
    check_out(out)
    recording = {name: options.pop(name) for name in ("all_rows", "progress") if name in options}
    if is_record:
        record = companion.Record.load(path)
    else:
        triples = companion.read_triples(path)
        known = companion.Vocabulary.of(triples)
        seed = options.get("seed", 0)
        model = companion.MODELS[kind](len(known.entities), len(known.relations), dim, seed=seed)  # type: ignore[arg-type]
        record = companion.fit(
            model,
            known.encode(triples),
            companion.Recipe(**options),
            out=record_path,
            names={"entities": known.entities, "relations": known.relations},
            **recording,
        )
    names = _names(record, path)
    if targets is None:
        click.echo(f"{record_path}: {len(record):,} triples, {size(record.nbytes)} of updates")
        return
    method = companion.GradientRollback(record.model(), record)
    wanted = companion.read_triples(targets)
    rows = names.encode([(h, r, h if t == "?" else t) for h, r, t in wanted], str(targets))
    if component and out:
        components, chosen = components_of(component)
        behind = {j: companion.component_rollback(method, components, j, rows, k) for j in chosen}
        for_report(out, components, influences=behind)
        return
    guesses = method.predictions(rows)
    open_ = [i for i, (_, _, tail) in enumerate(wanted) if predicted or tail == "?"]
    rows[open_] = guesses[open_]
    explanations = [method.explain(row, k) for row in rows]
    if out is None:
        _write(sys.stdout, explanations, record, names)
    else:
        from npeff.storage.files import atomic

        with atomic(out) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            _write(file, explanations, record, names)
        click.echo(f"{out}: {len(explanations)} targets, {sum(map(len, explanations))} training triples")
    if check:
        found = companion.faithfulness(method, k, rows, progress=recording.get("progress", True))
        note(
            f"without them, trained again: {found.pd:.0f} % of the targets less probable (by {found.drop:.3f} on "
            f"average), {found.tc:.0f} % of the predicted tails changed"
        )


def _names(record: Record, path: Path) -> Vocabulary:
    from npeff.companions.rollback import Vocabulary

    if not {"entities", "relations"} <= set(record.names):
        misused(f"{path}: a record without names of entities and relations; explain it from Python")
    return Vocabulary(tuple(record.names["entities"]), tuple(record.names["relations"]))


def _write(file: IO[str], explanations: Iterable[Explanation], record: Record, names: Vocabulary) -> None:
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(FIELDS)
    for found in explanations:
        (target,) = names.decode(found.target[None])
        because = names.decode(record.examples[found.positions])
        for rank, (influence, triple) in enumerate(zip(found.influences, because, strict=True), 1):
            writer.writerow([*target, f"{found.probability:.6f}", rank, f"{influence:.6g}", *triple])
