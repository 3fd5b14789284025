"""The companions: ``npeff linearize``, ``npeff influence`` and ``npeff rollback``.

What the parts of an input contributed to an output, which training examples are behind test losses or a component, and
which training triples made a prediction of a knowledge-graph model.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import click
from click.core import ParameterSource

from npeff.cli.command import check_out, command, components_of, for_report, misused, note, size
from npeff.cli.options import Arguments, Count, Existing, Whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from npeff.companions.influence.losses import Loss
    from npeff.companions.influence.solvers import Solver
    from npeff.companions.linearize import LinearMap
    from npeff.companions.rollback import Explanation, Record, Vocabulary

SHOWN = 12
"""Largest contributions that linearize prints."""

BARS = 40
"""Largest contributions of an input that is no picture that linearize draws."""

SOLVERS = ("cg", "exact", "lissa", "gauss-newton", "empirical-fisher", "ekfac", "identity")

TRAINING = ("record_path", "kind", "dim")
"""Options of rollback itself that belong to a training."""

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
        npeff linearize train.py:model train.py:data --example 17
        npeff linearize train.py:model train.py:data --example 17 --output 3 --out example17.png
        npeff linearize train.py:model train.py:data --at layer3 --table contributions.csv
        npeff linearize bert.py:model bert.py:batches --at embeddings --smooth freeze
        npeff linearize train.py:model train.py:data --component components.h5:3,7 -k 6 --out pixels.json
    """,
    Arguments("npeff.companions.linearize:linearize", only=("at", "smooth", "forward")),
    Arguments("npeff.companions.linearize:attribute_top_examples", only=("k", "embed")),
)
def linearize(
    model: str,
    data: str,
    *,
    example: Whole = 0,
    output: Whole | None = None,
    component: Annotated[str | None, "FILE:J"] = None,
    out: Path | None = None,
    table: Path | None = None,
    **options: Any,
) -> None:
    """Split an output of MODEL on one example of DATA into the contributions of the input numbers and of the biases.

    A piecewise linear network (ReLU, max-pooling, convolutions, batch normalisation in evaluation mode, …) is exactly
    F(x) = W·x + b around x. MODEL and DATA are module:callable or file.py:callable, as for npeff fishers.

    Options:
        example: Its position in DATA.
        output: Which output to explain.  [default: the largest]
        component: Instead: attribute component J (or several, FILE:J,J,…) to the inputs of its top examples; DATA is
            the data of its Fishers. -k and --embed belong to it.
        out: Picture to write: .png, .svg or .pdf; with --component .json for a report.
        table: Table to write: .csv, every contribution of the input and of the biases.
    """
    if component and out is None:
        misused("--component: give --out, a name ending in .json")
    if component and (table or output is not None):
        misused("--component: leave --output and --table out, which are about one example")
    if "embed" in options and not (component and "forward" in options):
        misused("--embed belongs to --component, and needs --forward for what the model does with it")
    if "k" in options and not component:
        misused("-k belongs to --component")
    check_out(out, *((".json",) if component else (".png", ".svg", ".pdf")))
    check_out(table, ".csv", option="--table")
    from npeff.companions.linearize import attribute_top_examples
    from npeff.companions.linearize.linear_map import linearize
    from npeff.models.targets import load_data, load_model

    net = load_model(model)
    if component and out:
        if "at" in options:
            misused("--at: a component is attributed to the input; leave --at or --component out")
        components, which = components_of(component)
        found = attribute_top_examples(net, components, load_data(data), which, **options)
        for_report(out, components, attributions=found)
        return
    inputs = _example(net, load_data(data), example)
    linear = linearize(net, inputs, batched=True, **options)
    n_outputs = linear.output.shape[1]
    if output is not None and output >= n_outputs:
        misused(f"--output: expected a position below {n_outputs}, got {output}")
    chosen = int(linear.output[0].argmax()) if output is None else output
    linear = linearize(net, inputs, chosen, batched=True, **options)
    rows = _contributions(linear)
    _tell(linear, rows, example, chosen)
    if table:
        _write_table(rows, table)
        click.echo(f"{table}: {len(rows):,} contributions")
    if out:
        _draw(linear, chosen, out)
        click.echo(f"{out}: the input and what it contributed to output {chosen}")


def _example(net: Any, data: Any, wanted: int) -> Any:
    """The inputs of one example, as a batch of one."""
    import torch

    from npeff.batches.reading import examples_at

    first = next(iter((*net.parameters(), *net.buffers())), None)
    (batch,) = examples_at(data, [wanted], first.device if first is not None else torch.device("cpu"))
    inputs = batch.inputs
    if isinstance(inputs, (tuple, list)):
        return inputs[0] if len(inputs) == 1 else tuple(inputs)
    return inputs


def _contributions(linear: LinearMap) -> list[tuple[str, str, Any, Any, float]]:
    """Every contribution: of what, position, value, weight, contribution; the biases have no value and no weight."""
    import numpy as np

    x, parts = linear.x[0], linear.contributions()[0, 0].reshape(-1).tolist()
    positions = (", ".join(map(str, at)) for at in np.ndindex(*x.shape))
    weights = linear.W[0, 0].reshape(-1).tolist()
    inputs = [(linear.at, *row) for row in zip(positions, x.reshape(-1).tolist(), weights, parts, strict=True)]
    return inputs + [(name, "biases", "", "", float(b[0, 0])) for name, b in linear.bias_contributions().items()]


def _tell(linear: LinearMap, rows: list[tuple[str, str, Any, Any, float]], example: int, output: int) -> None:
    value, b = float(linear.output[0, 0]), float(linear.b[0, 0])
    given = float(linear.contributions()[0, 0].double().sum())
    where = "the input" if linear.at == "input" else f"the output of {linear.at}"
    click.echo(f"example {example}, output {output}: {value:.6g} = {given:.6g} from {where} + {b:.6g} from biases")
    click.echo(f"left over: {linear.residual():.1e} of the output")
    for item in linear.frozen[:5]:
        note(f"  not piecewise linear: {item}")
    if len(linear.frozen) > 5:
        note(f"  and {len(linear.frozen) - 5} more")
    click.echo(f"{'contribution':>14}  of")
    for of, position, *_, part in sorted(rows, key=lambda row: -abs(row[-1]))[:SHOWN]:
        click.echo(f"{part:14.6g}  {f'the biases of {of}' if position == 'biases' else f'{where}[{position}]'}")


def _write_table(rows: list[tuple[str, str, Any, Any, float]], path: Path) -> None:
    from npeff.storage.files import atomic

    with atomic(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["of", "position", "value", "weight", "contribution"])
        writer.writerows(rows)


def _draw(linear: LinearMap, output: int, path: Path) -> None:
    """Draw the row of W and the contributions of the input: beside a picture as pictures, otherwise as bars."""
    from matplotlib.figure import Figure

    from npeff.batches.reading import looks_like_image
    from npeff.storage.files import atomic

    maps = {f"output {output}: W": linear.W[0, 0], f"output {output}: W∘x": linear.contributions()[0, 0]}
    arrays = {title: values.detach().cpu().double().numpy() for title, values in {"input": linear.x[0], **maps}.items()}
    if looks_like_image(linear.x.shape[1:]):
        figure = Figure((4.05, 1.6), layout="constrained", dpi=80)
        draw: Callable[..., None] = _picture
    else:
        del arrays["input"]
        figure = Figure((12.3, 0.75 + 0.16 * min(BARS, linear.x[0].numel())), layout="constrained", dpi=80)
        draw = _bars
    for axes, (title, values) in zip(figure.subplots(1, len(arrays)), arrays.items(), strict=True):
        axes.set_title(title, fontsize=8)
        draw(axes, values, signed=title != "input")
    with atomic(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lower().removeprefix("."))


def _picture(axes: Axes, image: NDArray[Any], signed: bool) -> None:
    """Draw a picture, or the sum of its channels with 0 in white and a scale of its own."""
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if signed:
        image = image.sum(2) if image.ndim == 3 else image
        most = float(abs(image).max()) or 1
        axes.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most)
    else:
        axes.imshow((image - image.min()) / ((image.max() - image.min()) or 1), cmap="gray_r")
    axes.set(xticks=[], yticks=[])


def _bars(axes: Axes, values: NDArray[Any], signed: bool) -> None:
    """Draw the largest numbers."""
    import numpy as np

    flat = values.reshape(-1)
    chosen = sorted(abs(flat).argsort(kind="stable")[::-1][:BARS].tolist())
    axes.barh(range(len(chosen)), flat[chosen], color=["#b24124" if flat[i] > 0 else "#215c8c" for i in chosen])
    positions = zip(*np.unravel_index(chosen, values.shape), strict=True)
    axes.set_yticks(range(len(chosen)), [f"[{', '.join(map(str, at))}]" for at in positions], fontsize=7)
    axes.invert_yaxis()


@command(
    """
        npeff influence train.py:model train.py:train train.py:test --weight-decay 1e-4 --out scores.h5
        npeff influence v.py:model v.py:train v.py:test --train-loss v.py:elbo --test-loss v.py:error --out s.csv
        npeff influence train.py:model train.py:train train.py:data --component components.h5:3 --out behind_3.h5
        npeff influence train.py:model train.py:train train.py:data --component components.h5:3,7 --out behind.json
    """,
    Arguments("npeff.companions.influence:CrossLossInfluence"),
    Arguments("npeff.companions.influence:ConjugateGradients", only=("tolerance",)),
    Arguments("npeff.companions.influence:component_influence", only=("k", "forward")),
)
def influence(
    model: str,
    train: str,
    test: str,
    *,
    out: Path,
    train_loss: Annotated[str, "LOSS"] = "cross_entropy",
    test_loss: Annotated[str | None, "LOSS"] = None,
    component: Annotated[str | None, "FILE:J"] = None,
    solver: Annotated[str, click.Choice(SOLVERS)] = "cg",
    memory: Annotated[float, click.FloatRange(min=0, min_open=True)] = 1.0,
    top: Whole = 5,
    **options: Any,
) -> None:
    """Influence of every example of TRAIN on every example of TEST: I = −∇L_testᵀ H⁻¹ ∇L_train.

    MODEL, TRAIN and TEST are module:callable or file.py:callable, the data iterables of batches in a fixed order. The
    model must be at an optimum of the training loss. With I > 0 training on the example raises the test loss; removing
    it changes the test loss by about −I/n.

    Options:
        out: Ending in .h5 (streamed) or .csv; .json for a report.
        train_loss: The loss that was trained: module:callable for (model, batch) -> (b,), or cross_entropy,
            squared_error.
        test_loss: Loss to explain, in the same form.  [default: the training loss]
        component: Explain component J's coefficient on its top examples instead; TEST is the data of its Fishers.
            Several, FILE:J,J,…, with an --out that ends in .json.
        solver: How H is inverted; gauss-newton and ekfac take the model's outputs with a named training loss.
        memory: In GB.
        top: Show so many examples each way.
    """
    if test_loss and component:
        misused("--test-loss and --component both say what to explain: give one of them")
    own: dict[str, Any] = {name: options.pop(name) for name in ("k", "forward") if name in options}
    tolerance = options.pop("tolerance", None)
    if own and not component:
        more = "; a loss given as module:callable calls the model itself" if "forward" in own else ""
        misused(f"{' and '.join(f'--{name}' for name in own)}: give --component, which it belongs to{more}")
    if tolerance is not None and solver != "cg":
        misused("--tolerance belongs to --solver cg")
    for_pages = out.suffix.lower() == ".json"
    if for_pages and not component:
        misused("--out: .json is what a report shows of components; give --component, or another ending")
    from npeff.companions.influence import CrossLossInfluence, component_influence
    from npeff.companions.influence.estimator import check_path
    from npeff.models.targets import load_data, load_model

    check_out(out)
    if not for_pages:
        check_path(out)
    options |= {"solver": _solver(solver, train_loss, tolerance), "memory": max(1, int(memory * 1e9))}
    trained, tested = _loss(train_loss, "--train-loss"), _loss(test_loss, "--test-loss") if test_loss else None
    made, train_data, test_data = load_model(model), load_data(train), load_data(test)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        if component:
            components, chosen = components_of(component)
            if len(chosen) > 1 and not for_pages:
                misused("--component: several components need an --out that ends in .json")
            # before H, so that its work is not lost where a vector cannot be recovered
            how = {"forward": own.get("forward"), "progress": options.get("progress", True)}
            components.ensure_vectors(range(components.n_components), made, test_data, **how)
            fitted = CrossLossInfluence(made, trained, **options).fit(train_data)
            behind = {j: component_influence(fitted, components, j, train_data, test_data, **own) for j in chosen}
            if for_pages:
                for_report(out, components, train, influences=behind)
                return
            scores = behind[chosen[0]].scores
            scores.save(out)
        else:
            scores = CrossLossInfluence(made, trained, tested, **options).scores(train_data, test_data, out=out)
    n_train, n_test = scores.values.shape
    click.echo(f"{out}: {n_train:,} × {n_test:,} scores; largest residual {float(scores.residuals.max()):.1e}")
    for line in scores.provenance.get("notes", []):
        note(f"  {line}")
    totals = scores.values.sum(axis=1)
    for direction in ("raises", "lowers"):
        for i in scores.top(top, direction=direction):
            click.echo(f"  {direction} {'the coefficients' if component else 'the test loss'}: {i} ({totals[i]:+.3g})")


def _loss(target: str, option: str) -> Loss:
    from npeff.companions.influence.losses import NAMED
    from npeff.models.targets import load_object

    if target in NAMED:
        return NAMED[target]
    loss: Loss = load_object(target, option)
    return loss


def _solver(name: str, train_loss: str, tolerance: float | None) -> Solver | str:
    from npeff.companions.influence import EKFAC, ConjugateGradients, GaussNewton
    from npeff.companions.influence.losses import NAMED_OUTPUT_LOSSES, model_outputs

    if name == "cg":
        return ConjugateGradients() if tolerance is None else ConjugateGradients(tolerance)
    if name not in ("gauss-newton", "ekfac"):
        return name
    if train_loss not in NAMED_OUTPUT_LOSSES:
        if name == "ekfac":
            return EKFAC()
        misused(
            "--solver gauss-newton needs the curvature of the loss in the outputs, known for "
            f"{', '.join(NAMED_OUTPUT_LOSSES)}; use cg, ekfac or empirical-fisher, or Python's GaussNewton(…)"
        )
    return (EKFAC if name == "ekfac" else GaussNewton)(model_outputs, NAMED_OUTPUT_LOSSES[train_loss])


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
def rollback(
    path: Annotated[Existing, "TRIPLES|RECORD"],
    *,
    targets: Existing | None = None,
    predicted: bool = False,
    k: Count = 10,
    check: bool = False,
    out: Path | None = None,
    record_path: Annotated[Path | None, "--record"] = None,
    component: Annotated[str | None, "FILE:J"] = None,
    kind: Annotated[Literal["distmult", "complex"], "--model"] = "distmult",
    dim: Count = 10,
    **options: Any,
) -> None:
    """Explain predictions of knowledge-graph models by the training triples that made them.

    TRIPLES, one a line as head, relation and tail separated by tabs, train a model at batch size 1 while every
    triple's updates of the weights are recorded; a RECORD of an earlier training is explained without training. The
    influence of a triple is the probability that the target loses when its updates are subtracted (Gradient Rollback).

    Options:
        targets: Triples to explain; a tail ? stands for the predicted one.
        predicted: Explain the predicted tails in place of the given ones.
        k: Training triples per target.
        check: Leave the explanations out, train again, and report what changed.
        out: Tab-separated file of explanations; with --component .json for a report.  [default: print them]
        record_path: Write the record of the training to this file.
        component: Instead: the training triples behind component J (or several, FILE:J,J,…), over its K top examples;
            the triples of --targets are those whose Fishers were computed, in their order.
        kind: Score.
        dim: Elements per embedding.
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
    context = click.get_current_context()
    stated = (name for name in TRAINING if context.get_parameter_source(name) is not ParameterSource.DEFAULT)
    unused = {*options, *stated} - {"progress"}
    if is_record and unused:
        flag = next(option.opts[0] for option in context.command.params if option.name in unused)
        misused(f"{path} is a record already: {flag} belongs to a training")
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
    names = _names_in(record, path)
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
        _write_explanations(sys.stdout, explanations, record, names)
    else:
        from npeff.storage.files import atomic

        with atomic(out) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            _write_explanations(file, explanations, record, names)
        click.echo(f"{out}: {len(explanations)} targets, {sum(map(len, explanations))} training triples")
    if check:
        found = companion.faithfulness(method, k, rows, progress=recording.get("progress", True))
        note(
            f"without them, trained again: {found.pd:.0f} % of the targets less probable (by {found.drop:.3f} on "
            f"average), {found.tc:.0f} % of the predicted tails changed"
        )


def _names_in(record: Record, path: Path) -> Vocabulary:
    from npeff.companions.rollback import Vocabulary

    if not {"entities", "relations"} <= set(record.names):
        misused(f"{path}: a record without names of entities and relations; explain it from Python")
    return Vocabulary(tuple(record.names["entities"]), tuple(record.names["relations"]))


def _write_explanations(file: IO[str], explanations: Iterable[Explanation], record: Record, names: Vocabulary) -> None:
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(FIELDS)
    for found in explanations:
        (target,) = names.decode(found.target[None])
        because = names.decode(record.examples[found.positions])
        for rank, (influence, triple) in enumerate(zip(found.influences, because, strict=True), 1):
            writer.writerow([*target, f"{found.probability:.6f}", rank, f"{influence:.6g}", *triple])
