"""Why does the model believe that? Training triples behind predictions about nations.

    pip install --no-deps pykeen          # carries the triples; it is not imported
    python examples/rollback_nations.py

Trains in seconds. --triples FILE takes any head⇥relation⇥tail file of yours.
"""

import importlib.util
from pathlib import Path

import click
import numpy as np

from npeff.companions import rollback
from npeff.companions.rollback import DistMult, Explainer, GradientRollback, Recipe


class RandomNeighbours(Explainer):
    """Candidates in random order, to compare with."""

    def support(self, target, candidates):
        return np.random.default_rng([0, *target]).random(len(candidates))


def bundled() -> Path:
    spec = importlib.util.find_spec("pykeen")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("pykeen is not installed: pip install --no-deps pykeen, or give --triples")
    return Path(next(iter(spec.submodule_search_locations))) / "datasets" / "nations" / "train.txt"


@click.command(help="Train a knowledge-graph model, explain predictions, check by training again.")
@click.option("--triples", type=click.Path(path_type=Path, exists=True), help="Default: Nations.")
@click.option("--out", type=click.Path(path_type=Path), default="nations.h5", show_default=True, help="The record.")
@click.option("--seed", default=0, show_default=True)
def main(triples: Path | None, out: Path, seed: int) -> None:
    names_of = rollback.read_triples(triples or bundled())
    vocabulary = rollback.Vocabulary.of(names_of)
    examples = vocabulary.encode(names_of)
    held = np.random.default_rng(seed).permutation(len(examples))
    train, test = examples[held[200:]], examples[held[:200]]

    model = DistMult(len(vocabulary.entities), len(vocabulary.relations), 10, seed=seed)
    record = rollback.fit(model, train, Recipe(optimizer="adagrad", seed=seed), out=out)
    print(record)

    # What does the model predict beyond its training triples, and which of them made it so?
    explainer = GradientRollback(model, record)
    targets = explainer.predictions(test)
    for target in targets[:5]:
        found = explainer.explain(target, 3)
        print(f"\n{' '.join(vocabulary.decode(target[None])[0])}   P = {found.probability:.2f}")
        for triple, influence in zip(vocabulary.decode(train[found.positions]), found.influences, strict=True):
            print(f"   {influence:+.3f}  {' '.join(triple)}")

    # Are these the reasons? Leave them out, train again with everything else the same.
    for name, method in (("rollback", explainer), ("random neighbours", RandomNeighbours(model, record))):
        for k in (1, 10):
            pd, tc = rollback.faithfulness(method, k, targets, progress=False)
            print(f"{name}, {k} left out: {pd:.0f} % less probable, {tc:.0f} % of the predictions changed")


if __name__ == "__main__":
    main()
