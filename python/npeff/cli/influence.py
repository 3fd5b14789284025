"""``npeff influence``: the training examples behind test losses, or behind a component."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npeff.cli.command import check_out, command, components_of, for_report, misused, note
from npeff.cli.options import WRITABLE, Arguments

if TYPE_CHECKING:
    from npeff.companions.influence.objective import Loss
    from npeff.companions.influence.solvers import Solver

SOLVERS = ("cg", "exact", "lissa", "gauss-newton", "empirical-fisher", "ekfac", "identity")


@command(
    """
        npeff influence train.py:model train.py:train train.py:test --weight-decay 1e-4 --out scores.h5
        npeff influence v.py:model v.py:train v.py:test --train-loss v.py:elbo --test-loss v.py:error --out s.csv
        npeff influence train.py:model train.py:train train.py:data --component components.h5:3 --out behind_3.h5
        npeff influence train.py:model train.py:train train.py:data --component components.h5:3,7 --out behind.json
    """,
    Arguments("npeff.companions.influence:CrossLossInfluence"),
    Arguments("npeff.companions.influence:ConjugateGradients", only=("tolerance",)),
    Arguments("npeff.companions.influence:component_influence", only=("k", "surrogate", "forward")),
)
@click.argument("model", metavar="MODEL")
@click.argument("train", metavar="TRAIN")
@click.argument("test", metavar="TEST")
@click.option("--out", type=WRITABLE, required=True, help="Ending in .h5 (streamed), .npz or .csv; .json for a report.")
@click.option(
    "--train-loss",
    default="cross_entropy",
    show_default=True,
    metavar="LOSS",
    help="The loss that was trained: module:callable for (model, batch) -> (b,), or cross_entropy, squared_error.",
)
@click.option("--test-loss", metavar="LOSS", help="Loss to explain, in the same form.  [default: the training loss]")
@click.option(
    "--component",
    metavar="FILE:J",
    help="Explain component J's coefficient on its top examples instead; TEST is the data of its Fishers. "
    "Several, FILE:J,J,…, with an --out that ends in .json.",
)
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default="cg",
    show_default=True,
    help="How H is inverted; gauss-newton and ekfac take the model's outputs with a named training loss.",
)
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="In GB.")
@click.option("--top", type=click.IntRange(min=0), default=5, show_default=True, help="Show so many examples each way.")
def influence(
    model: str,
    train: str,
    test: str,
    out: Path,
    train_loss: str,
    test_loss: str | None,
    component: str | None,
    solver: str,
    memory: float,
    top: int,
    **options: Any,
) -> None:
    """Influence of every example of TRAIN on every example of TEST: I = −∇L_testᵀ H⁻¹ ∇L_train.

    MODEL, TRAIN and TEST are module:callable or file.py:callable, the data iterables of batches in a fixed order. The
    model must be at an optimum of the training loss. With I > 0 training on the example raises the test loss; removing
    it changes the test loss by about −I/n.
    """
    if test_loss and component:
        misused("--test-loss and --component both say what to explain: give one of them")
    own: dict[str, Any] = {name: options.pop(name) for name in ("k", "surrogate", "forward") if name in options}
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
            components.check_recovered(range(components.n_components))  # before the search: the work would be lost
            own |= {"train_loss": trained, "fitted": CrossLossInfluence(made, trained, **options).fit(train_data)}
            behind = {j: component_influence(made, components, j, train_data, test_data, **own) for j in chosen}
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
    from npeff.companions.influence.objective import NAMED
    from npeff.models.targets import load_object

    if target in NAMED:
        return NAMED[target]
    loss: Loss = load_object(target, option)
    return loss


def _solver(name: str, train_loss: str, tolerance: float | None) -> Solver | str:
    from npeff.companions.influence import EKFAC, ConjugateGradients, GaussNewton
    from npeff.companions.influence.objective import NAMED_OUTPUT_LOSSES, model_outputs

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
