"""Mislabelled training data: do components, and a score made of them, find the training examples with a wrong label?

One in five training images of class 7 (sneakers) is labelled 9 (ankle boots). Looked at are training images that are
labelled 7 or 9, and as many others. Fishers are of the expected kind, or of the given labels (one row, ∇ log p(y)).

*Suspicion* of an example, by components: Σ_j w_ij s_j / Σ_j w_ij, where s_j is the share of component j's coefficients
that lies on *other* examples whose label the network does not predict. No clean label is used. Beside it: the loss, the
norm of ∇ log p(y), and the norm of the Fisher. Then the network is mended on 500 clean test images through the most
suspicious components, and judged on the others.

    python benchmarks/ground_truth/mislabelled.py --seeds 3       # needs Debian's dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import npeff
from measures import auc, best_auc, purity
from npeff import TopK
from shortcut import fit, network
from table import Table, write

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import fashion_data

TRUE, GIVEN = 7, 9


def flipped_data(seed: int, train_on: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images, labels as given, and which of them are wrong."""
    train = fashion_data.fashion_mnist("train").first(train_on)
    y = train.labels.clone()
    sneakers = (y == TRUE).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    chosen = sneakers[torch.rand(len(sneakers), generator=generator) < 0.2]
    y[chosen] = GIVEN
    wrong = np.zeros(len(y), bool)
    wrong[chosen.numpy()] = True
    return train.inputs, y, wrong


def suspicion(W: np.ndarray, doubted: np.ndarray) -> np.ndarray:
    """``(n,)`` how much an example's components lie on *other* doubted examples."""
    W = W.astype(np.float64)
    own = W * doubted[:, None]
    shares = (own.sum(0) - own) / np.maximum(W.sum(0) - W, 1e-30)
    return np.asarray((W * shares).sum(1) / np.maximum(W.sum(1), 1e-30))


def scores(net: nn.Module, x: torch.Tensor, y: torch.Tensor, wrong: np.ndarray, r: int, seed: int) -> dict:
    """AUC of every score for "the label is wrong", among the examples that carry the wrong label."""
    batches = list(zip(x.split(200), y.split(200), strict=True))
    within = (y == GIVEN).numpy()
    with torch.no_grad():
        log_p = net(x).log_softmax(1)
    loss = -log_p.gather(1, y[:, None])[:, 0].numpy()
    doubted = (log_p.argmax(1) != y).numpy()
    found = {"loss": {"AUC": auc(wrong[within], loss[within])}}
    for name, options in (
        ("Fishers of the given labels", {"labels": "true"}),
        ("expected Fishers", {"rank": 3}),
    ):
        fishers = npeff.compute_fishers(net, batches, compress=TopK(8192), progress=False, **options)
        norm = "norm of ∇ log p(y)" if "labels" in options else "norm of the Fisher"
        found[norm] = {"AUC": auc(wrong[within], fishers.norms[within])}
        components = npeff.decompose(fishers, r, seed=seed, progress=False, n_init=2, n_replacements=20)
        W = components.coefficients
        score = suspicion(W, doubted)
        found[f"suspicion, {name}"] = {"AUC": auc(wrong[within], score[within])}
        found[f"suspicion × loss, {name}"] = {"AUC": auc(wrong[within], (score * loss)[within])}
        found[f"best component, {name}"] = {
            "AUC": best_auc(W, wrong, within),
            "most of a component's top 20 that are mislabelled": float(
                max(wrong[np.argsort(-w, kind="stable")[:20]].mean() for w in W.T)
            ),
            "purity, mean": float(np.nanmean(purity(W, wrong.astype(int)))),
        }
    return found


def mending(net: nn.Module, r: int, seed: int, k: int = 4) -> dict[str, float]:
    """Components of clean test images, the k most suspicious ones, and what mending through them does to others."""
    test = fashion_data.fashion_mnist("test")
    seen, unseen = test.first(500), test.take(slice(500, 4500))
    batches = list(zip(seen.inputs.split(250), seen.labels.split(250), strict=True))
    fishers = npeff.compute_fishers(net, batches, rank=3, compress=TopK(8192), progress=False)
    components = npeff.decompose(fishers, r, seed=seed, progress=False, n_init=2, n_replacements=20)
    W = components.coefficients.astype(np.float64)
    taken = (components.predictions == GIVEN) & (components.labels != GIVEN)
    found = np.argsort(-W[taken].sum(0) / np.maximum(W.sum(0), 1e-30))[:k]

    def look() -> tuple[float, float]:
        with torch.no_grad():
            right = (net(unseen.inputs).argmax(1) == unseen.labels).float()
        return float(right.mean()), float(right[unseen.labels == TRUE].mean())

    before = look()
    repair = np.flatnonzero(taken)
    if len(repair) < 2:
        return {"accuracy before": before[0], "sneakers right before": before[1]}
    result = npeff.mend(
        net, batches, components, found.tolist(), repair=repair, seed=seed, iterations=10, progress=False
    )
    with npeff.applied(net, result.change):
        after = look()
    return {
        "accuracy before": before[0],
        "after": after[0],
        "sneakers right before": before[1],
        "right after": after[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=300, help="of each kind: labelled 7 or 9, and others")
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--train-on", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    table, repairs = Table(), Table()
    for seed in range(args.seeds):
        x, y, wrong = flipped_data(seed, args.train_on)
        torch.manual_seed(seed)
        net = fit(network(), x, y, args.epochs)
        pair = ((y == TRUE) | (y == GIVEN)).nonzero()[:, 0][: args.examples]
        others = ((y != TRUE) & (y != GIVEN)).nonzero()[:, 0][: args.examples]
        some = torch.cat([pair, others])
        print(f"network {seed}: {wrong[some].sum()} of {len(some)} mislabelled", flush=True)
        for name, values in scores(net, x[some], y[some], wrong[some.numpy()], args.components, seed).items():
            table.add(name, values)
        repairs.add("4 components", mending(net, args.components, seed))
        write("ground_truth_mislabelled", "Mislabelled training data", [
            f"{seed + 1} networks, trained on {args.train_on} images for {args.epochs} epochs; {args.components} "
            f"components of {2 * args.examples} training images. AUC: among the images labelled {GIVEN}, for the label "
            "being wrong.",
        ], {"Which labels are wrong": table, "Mended on clean images": repairs})  # fmt: skip


if __name__ == "__main__":
    main()
