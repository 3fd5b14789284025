"""Where NPEFF and Gradient Rollback meet: the training triples behind a component of a knowledge-graph model.

A component says which predictions share a direction in the entity and relation tables; rollback says which training
triples moved the model there. Summed over a component's top examples, it names the facts that the strategy rests on.

    pip install --no-deps pykeen
    python examples/rollback_components.py --out nations_components.html

The report shows them on each component's page.
"""

from collections import Counter
from pathlib import Path

import click
import torch

import npeff
from npeff.companions import rollback
from rollback_nations import bundled


@click.command(help="Components of a knowledge-graph model, and the training triples behind each.")
@click.option("--out", type=click.Path(path_type=Path), default="nations_components.html", show_default=True)
@click.option("--components", "n_components", default=8, show_default=True)
@click.option("--top", default=12, show_default=True, help="Examples of a component that are explained.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, n_components: int, top: int, seed: int) -> None:
    triples = rollback.read_triples(bundled())
    vocabulary = rollback.Vocabulary.of(triples)
    train = vocabulary.encode(triples)
    model = rollback.DistMult(len(vocabulary.entities), len(vocabulary.relations), 10, seed=seed)
    names = {"entities": vocabulary.entities, "relations": vocabulary.relations}
    record = rollback.fit(model, train, rollback.Recipe(optimizer="adagrad", seed=seed), names=names)
    explainer = rollback.GradientRollback(model, record)

    # A triple is an example: its context (head, relation) goes in, its tail is the class.
    data = [
        (torch.from_numpy(train[i : i + 64]), torch.from_numpy(train[i : i + 64, 2])) for i in range(0, len(train), 64)
    ]
    fishers = npeff.compute_fishers(model.eval(), data, energy=0.9, max_examples=512, seed=seed)
    components = npeff.decompose(fishers, n_components, seed=seed)
    print(f"{components}\n")

    behind = {j: rollback.component_rollback(explainer, components, j, train, k=top) for j in range(n_components)}
    for j, found in behind.items():
        relations = Counter(vocabulary.relations[r] for r in train[components.ids[found.examples], 1].tolist())
        print(f"component {j}: {', '.join(f'{n}× {name}' for name, n in relations.most_common(3))}")
        for d, influence in found.pairs(3):
            print(f"   {influence:+.4f}  {found.text(d)}")
    printed = [
        {"text": [" · ".join(row) for row in triples[i : i + 64]], "labels": data[i // 64][1]}
        for i in range(0, len(train), 64)
    ]
    npeff.report(components, printed, out, class_names=vocabulary.entities, influences=behind)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
