"""Two factors at once: does a method have units of its own for each, which share an example?

As in copying.py: the route (recalled or copied) crosses the relation (capital, opposite, plural), so that every
prompt has a value of both. A method has found both factors if a prompt is held by one unit that tells its route in
every relation, and by another that tells its relation on both routes; a unit of one route of one relation is a
cluster. All methods see all prompts, without labels. Labels choose a method's best unit on half of the prompts, and
its AUC is that on the other half: a sparse autoencoder has many more units to choose from.

    python benchmarks/ground_truth/two_factors.py --draws 3
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import npeff
from copying import MIDDLE, RELATIONS, THIRDS, Relation, chosen, drawn
from language import News, Prompts, smollm2
from measures import crossing_auc, shared_units
from methods import kmeans, nmf, npeff_scores, train_autoencoder
from table import Table, write

LAYERS, LAST = (10, 20, 29), "layers 20 to 29"
PLURALS = dict(
    cat="cats", dog="dogs", child="children", man="men", woman="women", mouse="mice", tooth="teeth", foot="feet",
    goose="geese", house="houses", book="books", city="cities", leaf="leaves", knife="knives", box="boxes",
    baby="babies",
)  # fmt: skip
WORDS = RELATIONS["opposite"][2]
CROSSED: dict[str, Relation] = {
    **{relation: RELATIONS[relation] for relation in ("capital", "opposite")},
    "plural": ("The plural of {} is", PLURALS, WORDS),
}
"""Relations in which SmolLM2 both recalls and copies; months, which copying.py asks too, it only recalls."""
UNITS, ACTIVE = 256, 8
"""Of the sparse autoencoder: its units, and how many of them an activation may use."""


@torch.no_grad()
def states(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """The residual stream after some layers at every token that is no padding, ``(tokens, d)`` each."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        for layer in LAYERS:
            found[layer].append(hidden[layer][batch["attention_mask"].bool()])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def sparse_codes(tokens: Tensor, x: Tensor, seed: int, steps: int = 1500) -> tuple[np.ndarray, float]:
    """Codes of a TopK autoencoder [Gao et al. 2024] that is trained on tokens.

    The first token of a text, whose norm is hundreds of times that of the others, takes no part.

    Args:
        tokens: ``(N, d)`` activations to train on.
        x: ``(n, d)`` activations to encode.
        seed: Decides the initial weights and the batches.
        steps: Of Adam.

    Returns:
        ``(n, 256)`` codes ≥ 0, at most 8 of each row above 0, and the share of the tokens' variance that is explained.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens[tokens.norm(dim=1) < 5 * tokens.norm(dim=1).median()]
    mean, scale = tokens.mean(0), (tokens - tokens.mean(0)).norm(dim=1).mean()
    tokens, x = (tokens - mean) / scale, (x - mean) / scale
    start = torch.randn(UNITS, tokens.shape[1], generator=generator)
    decoder = (start / start.norm(dim=1, keepdim=True)).requires_grad_()
    encoder = decoder.detach().T.clone().requires_grad_()
    offset = torch.zeros(UNITS, requires_grad=True)

    def code(h: Tensor) -> Tensor:
        found = (h @ encoder + offset).relu()
        least = found.topk(ACTIVE, 1).values[:, -1:]
        return torch.where(found >= least, found, 0.0)

    def loss(batch: Tensor) -> Tensor:
        return (code(batch) @ decoder - batch).square().sum(1).mean()

    train_autoencoder(tokens, loss, decoder, [encoder, offset], 2e-3, steps, generator)
    with torch.no_grad():
        left = (code(tokens) @ decoder - tokens).square().sum() / tokens.square().sum()
        return code(x).numpy(), float(1 - left)


def judged(values: np.ndarray, factors: dict[str, np.ndarray], seed: int) -> dict[str, float]:
    """What units say of each factor, and how many prompts share one unit of each.

    Args:
        values: ``(n, r)`` scores.
        factors: Two factors, ``(n,)`` each.
        seed: Divides the prompts: on one half the best unit is chosen, on the other it is judged, and vice versa.
    """
    half = np.random.default_rng(seed).permutation(len(values)) % 2 == 0
    (one, first), (two, second) = factors.items()
    found = {}
    for name, factor, crossed, other in ((one, first, two, second), (two, second, one, first)):
        for measure, beside in ((f"{name}: AUC", np.zeros(len(factor))), (f"in the worst {crossed}", other)):
            areas = []
            for value in np.unique(factor):
                for here in (half, ~half):
                    best = max(values.T, key=lambda c: crossing_auc(c[here], factor[here], value, beside[here]))
                    areas.append(crossing_auc(best[~here], factor[~here], value, beside[~here]))
            found[measure] = float(np.mean(areas))
    return found | shared_units(values, first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--most", type=int, default=12, help="prompts of each route and relation")
    parser.add_argument("--components", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--out", default="ground_truth_two_factors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    news = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in News(model, tokenizer, 16).ids]
    elsewhere, table = states(model, news), Table()
    for seed in range(args.first_draw, args.first_draw + args.draws):
        found = chosen(Prompts(model, tokenizer, drawn(seed, CROSSED, known_as=CROSSED)), args.most)
        prompts = Prompts(model, tokenizer, found)
        factors = {
            "route": prompts.factor("copied"),
            "relation": np.unique(prompts.factor("relation"), return_inverse=True)[1],
        }
        sizes = np.unique(np.stack(list(factors.values())), axis=1, return_counts=True)[1]
        print(f"draw {seed}: {len(prompts)} prompts; of each route and relation: {sizes}", flush=True)

        def add(name: str, values: np.ndarray, factors: Any = factors, seed: int = seed) -> None:
            table.add(name, judged(values, factors, seed))

        parts: dict[Any, list[np.ndarray]] = defaultdict(list)  # of two thirds, which are then taken together
        for where in ("all layers", MIDDLE, LAST):
            fishers = prompts.fishers(energy=0.9, rank=2, parameters=THIRDS[where])
            gradients = prompts.gradients(parameters=THIRDS[where])
            for r in args.components:
                components = npeff.decompose(fishers, r, seed=seed, progress=False)
                scores = npeff_scores(components, fishers, seed)
                add(f"**NPEFF**, {where}, {r} components", scores.values)
                add(f"**NPEFF**, {where}, strategies of {r}", scores.cuts[scores.chosen])
                clusters = kmeans(gradients, r)(seed).values
                add(f"gradients, k-means, {where}, {r}", clusters)
                if where != "all layers":
                    parts["**NPEFF**, strategies of", r].append(scores.cuts[scores.chosen])
                    parts["gradients, k-means,", r].append(clusters)
        for (name, r), both in parts.items():
            add(f"{name} {r}, of both thirds together", np.concatenate(both, 1))
        hidden, own = prompts.hidden(LAYERS), states(model, prompts.batches)
        for layer in LAYERS:
            h = hidden[f"layer {layer}"]
            for r in args.components:
                add(f"layer {layer}, k-means, {r}", kmeans(h, r)(seed).values)
                add(f"layer {layer}, NMF, {r}", nmf(h - h.min(0), r)(seed).values)
            code, share = sparse_codes(torch.cat([own[layer], elsewhere[layer]]), torch.from_numpy(h), seed)
            print(f"sparse autoencoder, layer {layer}: {share:.0%} explained", flush=True)
            add(f"layer {layer}, sparse autoencoder", code)
        write(args.out, "Two factors at once: the route and the relation", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed - args.first_draw + 1} draws of "
            f"{len(prompts)} prompts of the relations {', '.join(CROSSED)}, recalled and copied; sketches of 2,048 "
            "numbers, 90 % of the energy in at most two rows, the linear layers of the blocks. The sparse autoencoder: "
            f"{UNITS} units, {ACTIVE} of them active, trained on the prompts' and on 16 news articles' tokens. AUC: of "
            "the unit that is best on half of the prompts, on the other half, mean over values; then the same in the "
            "worst relation, and on the worse route: a unit of a factor alone is as good there. The last columns: the "
            "share of prompts held by a unit of their route in every relation and by another of their relation on both "
            "routes (AUC of 0.9 and more), and by a unit of one route of one relation. Of both thirds together: the "
            "units of the middle and of the last third of the layers.",
        ], {"What the units tell": table})  # fmt: skip


if __name__ == "__main__":
    main()
