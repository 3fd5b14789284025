"""Networks in which the route to the answer is known: do components keep to one route?

*Context*: x = (2 context numbers, a ∈ R⁸, b ∈ R⁸); the label is argmax(a) mod 4 when the context numbers agree in sign
and argmax(b) mod 4 when they do not. The route is which rule applied.

*Conjunction*: two factors u, v ∈ {0, 1}, each the sign of a sum of four inputs; the label is u XOR v, so that every
label is reached in two ways, and only the two factors together tell which. The route is (u, v).

    python benchmarks/ground_truth/routes.py --seeds 5
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from methods import Subject, baselines, npeff_methods
from npeff import GramOnly
from table import GROUPS, Table, evaluate, write


def context(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    c, a, b = (torch.randn(n, d, generator=generator) for d in (2, 8, 8))
    route = (c.prod(1) > 0).long()
    return torch.cat([2 * c, a, b], 1), torch.where(route == 0, a.argmax(1) % 4, b.argmax(1) % 4), route


def conjunction(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 12, generator=generator)
    u, v = (x[:, :4].sum(1) > 0).long(), (x[:, 4:8].sum(1) > 0).long()
    return x, u ^ v, 2 * u + v


CASES = {"context": context, "conjunction": conjunction}

EXACT = {"compress": GramOnly()}
VARIANTS = {
    "**NPEFF**": {"choose": True},
    "NPEFF, without the last layer": {"fishers": {"parameters": ["0.*", "2.*"], **EXACT}},
    "NPEFF, last layer alone": {"fishers": {"parameters": "4.*", **EXACT}},
    "NPEFF, diagonal": {"fishers": {"kind": "diagonal"}},
}


def trained(case: str, seed: int, epochs: int = 12, examples: int = 60_000) -> tuple[nn.Sequential, torch.Generator]:
    """A network of two hidden layers of 128 units that has learnt the case."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, _ = CASES[case](examples, generator)
    net = nn.Sequential(
        nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, int(y.max()) + 1)
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval(), generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", default="ground_truth_routes")
    args = parser.parse_args()
    tables = {case: Table() for case in CASES if case in args.cases}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for case, table in tables.items():
            net, generator = trained(case, seed)
            x, y, route = CASES[case](args.examples, generator)
            subject = Subject(net, x, {"layer 1": net[1], "layer 2": net[3]})
            print(
                f"{case}, network {seed}: accuracy {(subject.logits().argmax(1) == y).float().mean():.3f}", flush=True
            )
            methods = {
                **npeff_methods(subject, args.components, **VARIANTS),
                **{
                    f"NPEFF, {r} components": npeff_methods(subject, r, fewer={"fishers": EXACT})["fewer"]
                    for r in (args.components // 4, args.components // 2)
                },
                **baselines(subject, args.components),
            }
            for name, fit in methods.items():
                table.add(name, evaluate(fit, route.numpy(), seed))
            done = seed - args.first_seed + 1
            write(args.out, "Routes: components of networks whose route to each answer is known", [
                f"{args.examples} examples, {args.components} components, {done} networks per case (seeds from "
                f"{args.first_seed}); each cell is the mean over the networks (and the range). Purity: share of the "
                "top 20 examples of a component that follow one route. Coverage: share of examples whose strongest "
                "component is at least 0.9 pure and of their own route. AUC of the best component: for every route the "
                "component that tells it best from the others. " + GROUPS,
            ], {f"Route: {c}": t for c, t in tables.items() if t.values})  # fmt: skip


if __name__ == "__main__":
    main()
