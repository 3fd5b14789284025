"""Compiled transformers: do components follow the branches of the program that a network was compiled from?

Programs in RASP (Weiss et al. 2021), compiled by tracr (Lindner et al. 2023) to transformer weights: at every place the
token decides which branch gives the output: copy the token to the left; name the next letter; keep the token; count
the token. An example is a sequence and a place in it; the branch is its route. The compiled output is 0 or 1 per
value; times 3 it gives the logits.

    tracr/bin/python benchmarks/ground_truth/compile_programs.py programs.npz     # see there
    python benchmarks/ground_truth/compiled.py programs.npz --seeds 5
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

import npeff
from measures import Scores, purity
from methods import Subject, baselines, npeff_methods
from table import GROUPS, Table, evaluate, write

SHARPNESS = 3.0
MOST_BYTES = 4 << 30
"""Exact rows of the Fishers up to which nothing is left out."""

BRANCHES = {
    "left or next letter": lambda token: int(token not in "abc"),
    "left, next letter or itself": lambda token: 0 if token in "ab" else 1 if token in "cd" else 2,
    "left or count": lambda token: int(token not in "abc"),
}


class Attention(nn.Module):
    """Multi-head attention with the compiled weights."""

    def __init__(self, weights: dict[str, np.ndarray], heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value", "linear"):
            setattr(self, name, linear(weights[f"{name}|w"], weights[f"{name}|b"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(3)
        return self.linear((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Compiled(nn.Module):
    """A compiled program in torch: ``(b, 1 + tokens)`` integers, the first the place asked for → logits there."""

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict) -> None:
        super().__init__()
        self.tokens = nn.Embedding.from_pretrained(torch.from_numpy(arrays["token_embed|embeddings"]), freeze=False)
        self.places = nn.Embedding.from_pretrained(torch.from_numpy(arrays["pos_embed|embeddings"]), freeze=False)
        self.attention, self.mlp_in, self.mlp_out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in range(meta["layers"]):
            own = {
                key.removeprefix(f"transformer/layer_{layer}/"): value
                for key, value in arrays.items()
                if key.startswith(f"transformer/layer_{layer}/")
            }
            attention = {key.removeprefix("attn/"): value for key, value in own.items() if key.startswith("attn/")}
            self.attention.append(Attention(attention, meta["heads"]))
            self.mlp_in.append(linear(own["mlp/linear_1|w"], own["mlp/linear_1|b"]))
            self.mlp_out.append(linear(own["mlp/linear_2|w"], own["mlp/linear_2|b"]))
        self.here = nn.ModuleList(nn.Identity() for _ in range(meta["layers"]))  # hidden units at the place asked for
        self.values = [meta["own"].index(label) for label in meta["own"]]
        self.output = [meta["residual"].index(label) for label in meta["own"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place, tokens = x[:, 0], x[:, 1:]
        h = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        rows = torch.arange(len(x))
        for attention, mlp_in, mlp_out, here in zip(self.attention, self.mlp_in, self.mlp_out, self.here, strict=True):
            h = h + attention(h)
            hidden = mlp_in(h).relu()
            here(hidden[rows, place])
            h = h + mlp_out(hidden)
        return SHARPNESS * h[rows, place][:, self.output]


def linear(w: np.ndarray, b: np.ndarray) -> nn.Linear:
    layer = nn.Linear(*w.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w.T))
        layer.bias.copy_(torch.from_numpy(b))
    return layer


def load(path: Path) -> dict[str, tuple[Compiled, dict]]:
    """Program → network and what is known about it."""
    found = {}
    with np.load(path) as file:
        for name in BRANCHES:
            arrays = {key.split("|", 1)[1]: file[key] for key in file.files if key.startswith(f"{name}|")}
            meta = json.loads(str(arrays.pop("meta")))
            found[name] = Compiled(arrays, meta).eval(), meta
    return found


def examples(meta: dict, name: str, n: int, seed: int, length: int = 6) -> tuple[torch.Tensor, np.ndarray]:
    """Random sequences with a place each (never the first, which has nothing to its left), and their branches."""
    letters = [token for token in meta["tokens"] if len(token) == 1]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(letters), size=(n, length))
    place = rng.integers(1, length, n)
    number = np.array([meta["tokens"][letter] for letter in letters])
    begin = np.full((n, 1), meta["tokens"]["BOS"])
    x = np.concatenate([place[:, None] + 1, begin, number[drawn]], 1)
    branch = np.array([BRANCHES[name](letters[drawn[i, place[i]]]) for i in range(n)])
    return torch.from_numpy(x), branch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--components", type=int, default=24)
    parser.add_argument("--names", nargs="+", default=list(BRANCHES), choices=list(BRANCHES))
    parser.add_argument("--out", default="ground_truth_compiled")
    args = parser.parse_args()
    tables = {}
    networks = load(args.programs)
    for name in args.names:
        net, meta = networks[name]
        table = tables[name] = Table()
        for seed in range(args.seeds):
            x, branch = examples(meta, name, args.examples, seed)
            layers = {f"units {i + 1}": probe for i, probe in enumerate(net.here)}
            exact = 4 * args.examples * len(meta["outputs"]) * sum(p.numel() for p in net.parameters()) < MOST_BYTES
            subject = Subject(net, x, layers, compress=None if exact else npeff.TopK(16_384))

            def recalls(scores: Scores, branch: np.ndarray = branch) -> dict[str, float]:
                pure = purity(scores.values, branch) >= 0.9
                mine = scores.values.argmax(1)
                claimed = pure[mine]
                return {"recall, worst branch": float(min(claimed[branch == b].mean() for b in np.unique(branch)))}

            methods = {
                **npeff_methods(
                    subject,
                    args.components,
                    **{
                        "**NPEFF**": {"choose": True},
                        "NPEFF, layers balanced": {"block_weights": "balanced"},
                        "NPEFF, diagonal": {"fishers": {"kind": "diagonal"}},
                    },
                ),
                **baselines(subject, args.components),
            }
            for method, fit in methods.items():
                table.add(method, evaluate(fit, branch, seed, recalls))
            write(args.out, "Compiled transformers: components against the branches of the program", [
                f"{args.examples} places in random sequences of six letters, {args.components} components, {seed + 1} "
                "draws of sequences per program (the networks are compiled, so there is one of each). Fishers are "
                "exact; those of *left or count*, 758 550 parameters, keep the 16 384 largest entries. " + GROUPS,
            ], tables)  # fmt: skip


if __name__ == "__main__":
    main()
