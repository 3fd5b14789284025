"""Moving the weights along a component: which outputs change, beside random directions of equal norm and Fisher norm.

Every component is perturbed on examples that were not decomposed: their Fishers are encoded, the 32 with the largest
coefficients are its top examples, the others the baseline. Figures are medians over components; the interval is that of
the component in the middle, a bootstrap over examples. Then, how often a component's interval for the KL ratio lies
wholly above every random draw of a control. Writes ``results/perturbation.md``.

    python benchmarks/perturbation.py            # needs Debian's dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import npeff
from npeff import demo

sys.path.insert(0, str(Path(__file__).parent / "ground_truth"))
from table import processor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data

RESULTS = Path(__file__).parent / "results" / "perturbation.md"
FIGURES = {
    "ratio": "KL ratio, published",
    "disjoint_ratio": "KL ratio, disjoint baseline",
    "normalised_ratio": "KL ratio of KL / ‖F‖",
    "normalised_rank_correlation": "rank correlation of KL / ‖F‖ and coefficient",
    "flipped_top": "predictions flipped, top",
    "flipped_baseline": "predictions flipped, baseline",
}
CONTROLS = {"equal_norm": "random, equal norm", "equal_fisher_norm": "random, equal Fisher norm"}


def subject(name: str, seed: int):
    """A trained network, and its data in a random order."""
    torch.manual_seed(seed)
    if name == "digits":
        everything = demo.digits()
        order = torch.randperm(len(everything.labels))
        model = demo.train(demo.digits_cnn(), everything.take(order[:700]), epochs=8, learning_rate=3e-3, seed=seed)
        return model, everything.take(order[700:])
    train = fashion_data.fashion_mnist("train").first(10_000)
    return demo.train(fashion_data.fashion_cnn(), train, epochs=2, seed=seed), fashion_data.fashion_mnist("test")


def effects(name: str, kind: str, n: int, r: int, seed: int, which: range, draws: int) -> list:
    """Effects of some components on n examples that were not decomposed."""
    model, data = subject(name, seed)
    compress = npeff.TopK(8192) if kind == "low_rank" else npeff.TopK(4096)
    options = {"kind": kind, "compress": compress, "progress": False}
    if kind == "low_rank":
        options["rank"] = 3
    seen, unseen = data.take(slice(0, n)), data.take(slice(n, 2 * n))
    components = npeff.decompose(npeff.compute_fishers(model, seen, **options), r, seed=seed, progress=False)
    fishers = npeff.compute_fishers(model, unseen, **options)
    W = components.encode(fishers).coefficients.astype(np.float32)
    others = replace(
        components,
        coefficients=W,
        labels=fishers.labels,
        logits=fishers.logits,
        ids=fishers.ids,
        norms=fishers.norms,
    )
    used = [j for j in which if (W[:, j] > 0).sum() >= 32]
    return npeff.perturb_all(
        model, unseen, others, used, n_random=draws, curve=0, baseline=n, n_resamples=200, seed=seed, progress=False
    )


def middle(found: list, figure: str) -> str:
    """Median over components, with the interval of the component in the middle."""
    chosen = sorted((e.figures[figure] for e in found), key=lambda i: i.value)[len(found) // 2]
    return f"{np.median([e.figures[figure].value for e in found]):.2f} [{chosen.low:.2f}, {chosen.high:.2f}]"


def control(found: list, name: str, figure: str) -> str:
    """Median over components and draws, and the range of all draws."""
    values = np.concatenate([e.controls[name].values[figure] for e in found])
    return f"{np.nanmedian(values):.2f} ({np.nanmin(values):.2f}–{np.nanmax(values):.2f})"


def lines(title: str, found: list, networks: int) -> list[str]:
    out = [f"## {title}", "", f"{len(found)} components of {networks} networks; "
           f"{sum(e.reached for e in found)} reach a mean KL of 0.1 nats on their top examples.", ""]  # fmt: skip
    out += ["| | component | " + " | ".join(CONTROLS.values()) + " |", "|---|---|---|---|"]
    for figure, what in FIGURES.items():
        beside = [control(found, name, figure) if figure in found[0].controls[name].values else "" for name in CONTROLS]
        out.append(f"| {what} | {middle(found, figure)} | " + " | ".join(beside) + " |")
    for figure in ("ratio", "normalised_ratio"):
        for name, what in CONTROLS.items():
            above = sum(e.figures[figure].low > np.nanmax(e.controls[name].values[figure]) for e in found)
            out += [
                "",
                f"{FIGURES[figure]}: the whole interval above every draw of *{what}* for {above} of {len(found)}.",
            ]
    return [*out, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--every", type=int, default=4, help="perturb every so many-th component")
    parser.add_argument("--draws", type=int, default=4)
    args = parser.parse_args()
    found: dict[str, tuple[list, int]] = {}
    for seed in range(args.seeds):
        for name in ("digits", "fashion"):
            for kind in ("low_rank", "diagonal"):
                title = f"{'Digits' if name == 'digits' else 'Fashion-MNIST'}, {kind.replace('_', '-')}"
                which = range(0, args.components, args.every)
                now = effects(name, kind, args.examples, args.components, seed, which, args.draws)
                found[title] = found.get(title, ([], 0))[0] + now, seed + 1
                print(f"{title}, network {seed}: KL ratios {[round(e.ratio, 1) for e in now]}", flush=True)
                text = [
                    "# Perturbation: components beside random directions",
                    "",
                    f"`python benchmarks/perturbation.py {' '.join(sys.argv[1:])}`".rstrip() + "  ",
                    f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
                    f"Python {platform.python_version()}",
                    "",
                    f"{args.components} components of {args.examples} examples, every {args.every}th perturbed, on "
                    f"{args.examples} *other* examples. Component: median over components [bootstrap interval of the "
                    "component in the middle]. Random: median over components and draws (range over all draws), "
                    f"{args.draws} draws each.",
                    "",
                ]
                RESULTS.write_text("\n".join(text + [x for t, (e, k) in found.items() for x in lines(t, e, k)]))


if __name__ == "__main__":
    main()
