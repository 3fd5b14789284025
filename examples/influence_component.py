"""The training digits behind a component: what made a strategy of a small network.

    pip install npeff[demo]
    python examples/influence_component.py --out influence_component.html

A small classifier is trained to its optimum, its test digits' Fishers are decomposed, and for the largest components
the training digits are found that raise the component's coefficient on its top examples. The report shows them on the
component's page.
"""

from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

import npeff
from npeff import demo
from npeff.companions.influence import (
    Coefficient,
    ConjugateGradients,
    CrossLossInfluence,
    component_influence,
    cross_entropy,
)
from retraining import leave_out, minimise


@click.command(help=__doc__.splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path), default="influence_component.html", show_default=True)
@click.option("--components", "n_components", default=12, show_default=True)
@click.option("--show", default=4, show_default=True, help="Components that are asked about.")
@click.option(
    "--check", default=0, show_default=True, help="Retrain without the examples found, for so many components."
)
@click.option("--weight-decay", default=1e-2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, n_components: int, show: int, check: int, weight_decay: float, seed: int) -> None:
    data = demo.digits()
    train, test = data.take(slice(0, 600)), data.take(slice(600, 900))
    batches = [(x.flatten(1).double(), y) for x, y in train]
    asked = [(x.flatten(1).double(), y) for x, y in test]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    found = minimise(model, cross_entropy, batches, weight_decay=weight_decay, tolerance=1e-8)
    print(f"gradient norm {found.gradient_norm:.1e}")

    fishers = npeff.compute_fishers(model, asked, progress=False)
    components = npeff.decompose(fishers, n_components, seed=seed, progress=False)
    fitted = CrossLossInfluence(
        model,
        cross_entropy,
        solver=ConjugateGradients(1e-6, 2000),
        weight_decay=weight_decay,
        damping=1e-5,
        progress=False,
    ).fit(batches)
    order = np.argsort(-components.coefficients.sum(0))[:show]
    found = {}
    for number, j in enumerate(order.tolist()):
        behind = found[j] = component_influence(fitted, components, j, batches, asked, k=8)
        made_by = behind.made_by(8)
        shares = behind.scores.values.sum(1)
        tops, makers = test.labels[behind.examples].tolist(), train.labels[made_by].tolist()
        print(f"component {j}: top test digits {tops}, made by {makers}")
        if number < check:
            tops = [(asked_x[None], asked_y[None]) for asked_x, asked_y in _examples(asked, behind.examples)]
            truth = leave_out(
                model, cross_entropy, batches, [made_by.tolist()], Coefficient(components, j), tops,
                weight_decay=weight_decay, progress=False,
            )  # fmt: skip
            predicted = -shares[made_by].sum() / len(train.labels)
            print(
                f"  without those 8 the coefficients change by {truth.changes.sum():+.4f}, predicted {predicted:+.4f}"
            )
    npeff.report(
        components, test, out, class_names=[str(digit) for digit in range(10)], influences=found, influence_data=train
    )
    print(f"wrote {out}")


def _examples(batches: list, which: np.ndarray) -> list:
    x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    return [(x[i], y[i]) for i in which.tolist()]


if __name__ == "__main__":
    main()
