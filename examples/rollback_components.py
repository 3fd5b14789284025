"""Where NPEFF and Gradient Rollback meet: the training triples behind a component of a knowledge-graph model.

A component says which predictions share a direction in the entity and relation tables; rollback says which training
triples moved the model there. Summed over a component's top examples, it names the facts that the strategy rests on.

    pip install --no-deps pykeen
    python examples/rollback_components.py
"""

from collections import Counter

import click
import numpy as np
import torch

import npeff
from npeff.companions import rollback
from rollback_nations import bundled


@click.command(help="Components of a knowledge-graph model, and the training triples behind each.")
@click.option("--components", "n_components", default=8, show_default=True)
@click.option("--top", default=12, show_default=True, help="Examples of a component that are explained.")
@click.option("--seed", default=0, show_default=True)
def main(n_components: int, top: int, seed: int) -> None:
    triples = rollback.read_triples(bundled())
    vocabulary = rollback.Vocabulary.of(triples)
    train = vocabulary.encode(triples)
    model = rollback.DistMult(len(vocabulary.entities), len(vocabulary.relations), 10, seed=seed)
    record = rollback.fit(model, train, rollback.Recipe(optimizer="adagrad", seed=seed))
    explainer = rollback.GradientRollback(model, record)

    # A triple is an example: its context (head, relation) goes in, its tail is the class.
    data = [
        (torch.from_numpy(train[i : i + 64]), torch.from_numpy(train[i : i + 64, 2])) for i in range(0, len(train), 64)
    ]
    fishers = npeff.compute_fishers(model.eval(), data, energy=0.9, max_examples=512, seed=seed)
    components = npeff.decompose(fishers, n_components, seed=seed)
    print(f"{components}\n")

    for j in range(n_components):
        examples = components.ids[components.top_examples(j, top)]
        relations = Counter(vocabulary.relations[r] for r in train[examples, 1].tolist())
        total = np.zeros(len(train))
        for example in train[examples]:
            candidates = explainer.candidates(example)
            total[candidates] += explainer.influence(example, candidates)
        total[examples] = 0  # that an example supports itself is no news
        print(f"component {j}: {', '.join(f'{n}× {name}' for name, n in relations.most_common(3))}")
        for d in np.argsort(-total)[:3]:
            print(f"   {total[d] / top:+.4f}  {' '.join(vocabulary.decode(train[d : d + 1])[0])}")


if __name__ == "__main__":
    main()
