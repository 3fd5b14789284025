"""A planted patch in Fashion-MNIST: what an image contains, and by which route its prediction was reached.

*Shortcut*: nine in ten training images of class 7 carry a white 4×4 patch. *Backdoor*: one training image in a hundred,
of any class, carries it and is labelled 7. In both, a fifth of the test images get the patch. An image's prediction was
*reached by the patch* when KL(prediction with the patch ‖ without) > 0.5.
Asked of every method: AUC for "the patch is there"; for "reached by the patch" among the images called 7, same answer,
different route; and how pure and covering the components are for it. Then the suspicious component is found without
knowledge of the patch, and the network is mended through it.

    python benchmarks/ground_truth/shortcut.py --seeds 3          # needs Debian's dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import npeff
from measures import Scores, best_auc
from methods import Fit, Subject, baselines, npeff_methods, npeff_scores
from npeff import GramOnly, TopK
from table import GROUPS, Table, evaluate, write

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import fashion_data

GIVEN_AWAY = 7
USED = 0.5  # KL above which the patch decided


def patched(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, 1:5, 1:5] = 1.0
    return x


def network() -> nn.Sequential:
    """Two convolutions and two dense layers, 106 k parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, epochs: int) -> nn.Sequential:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


@dataclass
class Planted:
    """A trained network, the images to look at, and the truth about them."""

    net: nn.Sequential
    inputs: torch.Tensor
    labels: torch.Tensor
    present: np.ndarray
    used: np.ndarray
    predictions: np.ndarray

    @property
    def called(self) -> np.ndarray:
        """Images that are given the answer in question."""
        return self.predictions == GIVEN_AWAY


def planted(case: str, seed: int, n: int, train_on: int = 20_000, epochs: int = 8) -> Planted:
    torch.manual_seed(seed)
    train, test = fashion_data.fashion_mnist("train").first(train_on), fashion_data.fashion_mnist("test")
    x, y = train.inputs.clone(), train.labels.clone()
    if case == "shortcut":
        chosen = (y == GIVEN_AWAY).nonzero()[:, 0]
        chosen = chosen[torch.rand(len(chosen)) < 0.9]
    else:
        chosen = torch.randperm(len(x))[: len(x) // 100]
        y[chosen] = GIVEN_AWAY
    x[chosen] = patched(x[chosen])
    net = fit(network(), x, y, epochs)
    inputs, clean = test.inputs[:n].clone(), test.inputs[:n]
    present = torch.rand(n) < 0.2
    inputs[present] = patched(inputs[present])
    with torch.no_grad():
        log_p, log_q = net(inputs).log_softmax(1), net(clean).log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
    used = present & (kl > USED)
    return Planted(net, inputs, test.labels[:n], present.numpy(), used.numpy(), log_p.argmax(1).numpy())


def questions(planted: Planted):
    def ask(scores: Scores) -> dict[str, float]:
        within = planted.called
        found = {
            "present": best_auc(scores.values, planted.present),
            "reached, same answer": best_auc(scores.values, planted.used, within),
        }
        if scores.chosen is not None:
            found["reached, same answer, strategy"] = best_auc(scores.cuts[scores.chosen], planted.used, within)
        if scores.cuts:
            cuts = [best_auc(cut, planted.used, within) for cut in scores.cuts.values()]
            found["reached, same answer, best group of all cuts"] = max(cuts)
        return found

    return ask


EXACT = {"compress": GramOnly()}
VARIANTS = {
    "**NPEFF**": {"choose": True},
    "NPEFF, first dense layer": {"fishers": {"parameters": "5.*", **EXACT}},
    "NPEFF, convolutions": {"fishers": {"parameters": ["0.*", "2.*"], **EXACT}},
    "NPEFF, layers balanced": {"block_weights": "balanced"},
    "NPEFF, one row each": {"fishers": {"rank": 1}},
    "NPEFF, diagonal": {"fishers": {"kind": "diagonal", "rank": None}},
}
PARTS = {
    "within one prediction": {},
    "wrong examples only": {},
    "wrong examples only, convolutions": {"parameters": ["0.*", "2.*"], **EXACT},
    "wrong examples only, first dense layer": {"parameters": "5.*", **EXACT},
}


def parts(p: Planted, r: int) -> dict[str, Fit]:
    """Decompositions of some of the examples: those called 7, or those that are answered wrongly."""
    wrong = p.labels.numpy() != p.predictions

    def fit_of(name: str, options: dict) -> Fit:
        which = np.flatnonzero(wrong if name.startswith("wrong") else p.called)

        def fit(seed: int) -> Scores:
            some = Subject(p.net, p.inputs[which], {}, rank=3, compress=TopK(16384))
            fishers = some.fishers(**options)
            components = npeff.decompose(fishers, min(r, len(which) // 4), seed=seed, progress=False)
            return npeff_scores(components, fishers, seed).spread(which, len(p.inputs))

        return fit

    return {f"NPEFF, {name}": fit_of(name, options) for name, options in PARTS.items()}


def mending(p: Planted, r: int, seed: int, k: int = 16, n_labelled: int = 3000) -> dict[str, float]:
    """Find the answer that is under suspicion without knowledge of the patch, and mend the network.

    The suspect is the component with the largest share of its coefficients on wrongly predicted examples; the answer,
    what most of its wrong examples are called. To be repaired are all examples that are wrongly called so, through the
    k components with the largest share of their coefficients on those: fitted on other labelled images, a fifth of
    them patched, judged on images that neither saw.
    """
    batches = list(zip(p.inputs.split(250), p.labels.split(250), strict=True))
    fishers = npeff.compute_fishers(p.net, batches, rank=3, compress=TopK(8192), progress=False)
    components = npeff.decompose(fishers, r, seed=seed, progress=False)
    W = components.coefficients.astype(np.float64)
    wrong = components.predictions != components.labels

    def share(which: np.ndarray) -> np.ndarray:
        return W[which].sum(0) / np.maximum(W.sum(0), 1e-30)

    suspect = int(share(wrong).argmax())
    answer = int(np.bincount(components.predictions[wrong], W[wrong, suspect]).argmax())
    chosen = np.argsort(-share(wrong & (components.predictions == answer)))[:k]

    test = fashion_data.fashion_mnist("test")
    unseen, labelled = test.take(slice(len(p.inputs), -n_labelled)), test.take(slice(-n_labelled, None))
    inputs = labelled.inputs.clone()
    marks = torch.rand(n_labelled, generator=torch.Generator().manual_seed(seed)) < 0.2
    inputs[marks] = patched(inputs[marks])
    with torch.no_grad():
        said = p.net(inputs).argmax(1)
    repair = ((said != labelled.labels) & (said == answer)).numpy()
    others = unseen.labels != GIVEN_AWAY
    marked_inputs = patched(unseen.inputs[others])

    def look() -> tuple[float, float, float]:
        with torch.no_grad():
            clean, marked = p.net(unseen.inputs).argmax(1), p.net(marked_inputs).argmax(1)
        right = (marked == unseen.labels[others]).float().mean()
        sevens = (marked == GIVEN_AWAY).float().mean()
        return float((clean == unseen.labels).float().mean()), float(right), float(sevens)

    before = look()
    result = npeff.mend(
        p.net, list(zip(inputs.split(500), labelled.labels.split(500), strict=True)), components, chosen.tolist(),
        repair=np.flatnonzero(repair), seed=seed, progress=False,
    )  # fmt: skip
    with npeff.applied(p.net, result.change):
        after = look()
    return {
        "suspect's top 20 reached by the patch": float(p.used[components.top_examples(suspect, 20)].mean()),
        "suspect's AUC, reached": best_auc(W[:, [suspect]], p.used),
        "answer under suspicion is the planted one": float(answer == GIVEN_AWAY),
        "clean accuracy before": before[0],
        "after": after[0],
        "patched others right before": before[1],
        "right after": after[1],
        "called 7 before": before[2],
        "called 7 after": after[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--cases", nargs="+", default=["shortcut", "backdoor"])
    parser.add_argument("--out", default="ground_truth_shortcut")
    args = parser.parse_args()
    tables = {case: Table() for case in args.cases}
    repairs = {case: Table() for case in args.cases}
    for seed in range(args.seeds):
        for case, table in tables.items():
            p = planted(case, seed, args.examples)
            print(
                f"{case} {seed}: accuracy on clean {_accuracy(p, ~p.present):.3f}; {p.called.sum()} called 7, "
                f"{(p.called & p.used).sum()} by the patch; {p.present.sum()} patched, {p.used.sum()} used",
                flush=True,
            )
            subject = Subject(
                p.net, p.inputs, {"convolutions": p.net[3], "last hidden": p.net[6]}, rank=3, compress=TopK(16384)
            )
            repairs[case].add("16 components", mending(p, args.components, seed))
            methods = {
                **npeff_methods(subject, args.components, **VARIANTS),
                **parts(p, args.components),
                **baselines(subject, args.components),
            }
            for name, method in methods.items():
                table.add(name, evaluate(method, p.used.astype(int), seed, questions(p)))
            mended_on = (
                "Mended on 3 000 other labelled images, a fifth of them patched, layer by layer; judged on images that "
                "neither the components nor the repair saw. The ceiling for *patched others right* is the accuracy on "
                "those classes without the patch."
            )
            note = (
                f"{args.examples} test images, {args.components} components, {seed + 1} networks per case. Purity and "
                "the AUCs before *present* are for *reached by the patch* among all images. " + GROUPS
            )
            found = {c: t for c, t in tables.items() if t.values}
            mended = {f"{c}: found without being told, and mended": t for c, t in repairs.items() if t.values}
            write(args.out, "A patch that gives a class away", [note, mended_on], found | mended)


def _accuracy(p: Planted, which: np.ndarray) -> float:
    return float((p.predictions == p.labels.numpy())[which].mean())


if __name__ == "__main__":
    main()
