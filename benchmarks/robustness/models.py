"""Models of public bug reports: is every Fisher right, or refused with a reason?

    python benchmarks/robustness/models.py [--only WORDS] [--influence] [--verbose]

Each situation of :mod:`situations` is computed in batches by ``npeff.compute_fishers`` and compared, example by
example, with the Fisher that autograd gives for that example alone, in float64 where the model can be. Prints one
Markdown section. Exit status 1 if a Fisher is wrong, or anything but an error of npeff's own is raised.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from situations import SITUATIONS, Case
from torch import Tensor, nn

import npeff
from npeff.companions.influence import CrossLossInfluence, EmpiricalFisher


@dataclass
class Outcome:
    """What happened."""

    title: str
    verdict: str
    told: str = ""
    rules: str = ""

    @property
    def sound(self) -> bool:
        """Nothing is wrong, and nothing crashed."""
        return self.verdict in ("right", "refused")


def in_float64(tree: Any) -> Any:
    """Floating tensors of nested structures as float64."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(in_float64(item) for item in tree)
    return tree


def oracle(case: Case, names: list[str]) -> list[np.ndarray]:
    """Square roots ``(C, m)`` of every example's Fisher, ``√p_y (e_y − p)ᵀ J``, each example alone."""
    assert case.alone is not None
    model = case.model.double() if case.double else case.model  # it is not used again
    named = dict(model.named_parameters())
    tensors = [named[name].requires_grad_() for name in names]
    found = []
    for example in case.examples:
        logits = case.alone(model, in_float64(example) if case.double else example)
        jacobian = []
        for value in logits:
            parts = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(parts, tensors, strict=True)]
            jacobian.append(torch.cat([part.reshape(-1).double() for part in flat]))
        J = torch.stack(jacobian).detach()
        p = torch.softmax(logits.detach().double(), 0)
        found.append((p.sqrt()[:, None] * (J - p @ J)).numpy())
    return found


def distance(A: np.ndarray, B: np.ndarray) -> float:
    """``‖AᵀA − BᵀB‖ / ‖BᵀB‖``, without forming either."""
    gram = np.linalg.norm(A @ A.T) ** 2 + np.linalg.norm(B @ B.T) ** 2 - 2 * np.linalg.norm(A @ B.T) ** 2
    size = np.linalg.norm(B @ B.T)
    if size == 0:
        return float(np.linalg.norm(A @ A.T))
    if gram > 1e-8 * size**2 or A.shape[1] > 2000:
        return float(np.sqrt(max(gram, 0.0)) / size)
    return float(np.linalg.norm(A.T @ A - B.T @ B) / size)  # small: the difference above is rounding


def try_fishers(title: str, case: Case) -> Outcome:
    """Compute and compare."""
    before = (
        [batch.clone() for batch in case.data if isinstance(batch, Tensor) and not batch.is_nested]
        if isinstance(case.data, list)
        else []
    )
    try:
        fishers = npeff.compute_fishers(case.model, case.data, forward=case.forward, progress=False, **case.options)
    except npeff.NpeffError as error:
        return Outcome(title, "refused" if case.refusal else "refused (could be served)", str(error))
    except Exception as error:
        return Outcome(title, "CRASH", f"{type(error).__name__}: {error}")
    if case.alone is None:
        return Outcome(title, "WRONG", "not refused")
    after = (
        [batch for batch in case.data if isinstance(batch, Tensor) and not batch.is_nested]
        if isinstance(case.data, list)
        else []
    )
    if not all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
        return Outcome(title, "WRONG", "the user's inputs were changed")
    expected = oracle(case, list(fishers.parameters.names))
    if len(expected) != len(fishers):
        return Outcome(title, "WRONG", f"{len(fishers)} examples, expected {len(expected)}")
    gaps = [distance(fishers.dense(i).astype(np.float64), B) for i, B in enumerate(expected)]
    rules = sorted({line["rule"] for line in fishers.coverage})
    worst = max(gaps)
    told = f"{worst:.1e}"
    return Outcome(title, "right" if worst <= case.tolerance else "WRONG", told, ", ".join(rules))


def try_influence(title: str, case: Case) -> Outcome:
    """Influence in batches against influence with every example in a batch of its own."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(*batch) if isinstance(batch, tuple) else model(batch)
        return torch.logsumexp(logits, 1) - logits[:, 0]

    data = [batch[0] if isinstance(batch, tuple) else batch for batch in case.data]
    try:
        found = []
        for train in (data, case.examples):
            made = CrossLossInfluence(case.model, loss, damping=0.1, progress=False, solver=EmpiricalFisher())
            found.append(made.scores(train, case.examples[:2]).values)
    except npeff.NpeffError as error:
        return Outcome(title, "refused (could be served)", str(error))
    except Exception as error:
        return Outcome(title, "CRASH", f"{type(error).__name__}: {error}")
    gap = float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))
    return Outcome(title, "right" if gap <= 1e-2 else "WRONG", f"{gap:.1e}")


INFLUENCE = [
    "sorts its batch by a column and back; first batch sorted",
    "sorts its batch by a column and back; no batch sorted",
    "ends and middle alike: a permutation that keeps the first and the last example",
    "unpadded tokens; no padding in the first batch",
    "mixture of experts, one each",
    "a branch that is switched off in the first batch",
    "an input changed in place",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="situations whose title holds these words")
    parser.add_argument("--influence", action="store_true", help="influence alone")
    parser.add_argument("--verbose", action="store_true", help="whole messages")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    outcomes = []
    for title, build in SITUATIONS.items():
        if given.only not in title:
            continue
        if not given.influence:
            torch.manual_seed(0)
            outcomes.append(try_fishers(title, build()))
        if title in INFLUENCE:
            torch.manual_seed(0)
            outcomes.append(try_influence(f"influence: {title}", build()))
    counts = {
        verdict: sum(o.verdict == verdict for o in outcomes) for verdict in dict.fromkeys(o.verdict for o in outcomes)
    }
    print("## Models of public reports\n")
    print(f"{len(outcomes)} situations: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".")
    print("Right: every example's Fisher is that of the example alone (largest relative error in the table).\n")
    print("| situation | result | error, or what was said | rules |\n|---|---|---|---|")
    for o in outcomes:
        told = o.told if given.verbose else o.told[:160] + (" …" if len(o.told) > 160 else "")
        print(f"| {o.title} | {o.verdict} | {told.replace('|', '/').replace(chr(10), ' ')} | {o.rules} |")
    return 0 if all(o.sound for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
