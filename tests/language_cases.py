"""A small causal model of tokens, batches with places for it, and the Fisher of each place by plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npeff.batches.reading import read_batches

VOCABULARY = 11


class SmallLanguageModel(nn.Module):
    """Embedding, one block of causal attention and a multilayer perceptron, head; logits ``(b, T, C)``."""

    def __init__(self, tied: bool = False, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute logits; a padded position is seen by none."""
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        t = input_ids.shape[1]
        seen = torch.ones(t, t, dtype=torch.bool).tril()[None]
        if attention_mask is not None:
            seen = (seen & attention_mask[:, None, :].bool()) | torch.eye(t, dtype=torch.bool)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def token_batches(
    side: str = "right", every: int = 1, seed: int = 0, counts: Any = ((5, 3, 4), (6, 6))
) -> list[dict[str, Tensor]]:
    """Batches of padded sequences with shifted labels, −100 where there is no place.

    Args:
        side: Where the padding is.
        every: Only each so-manieth position is a place.
        seed: Decides the tokens.
        counts: Lengths of the sequences of each batch.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for lengths in counts:
        t = max(lengths)
        ids, mask = torch.zeros(len(lengths), t, dtype=torch.int64), torch.zeros(len(lengths), t, dtype=torch.int64)
        labels = torch.full((len(lengths), t), -100)
        for row, length in enumerate(lengths):
            where = slice(0, length) if side == "right" else slice(t - length, t)
            tokens = torch.randint(1, VOCABULARY, (length + 1,), generator=generator)
            ids[row, where], mask[row, where] = tokens[:-1], 1
            labels[row, where] = torch.where(torch.arange(length) % every == row % every, tokens[1:], -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def fishers_of_places(
    model: nn.Module, data: Any, call: Any = None, names: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the dense Fisher of each place by one backward pass per class, in float64.

    Returns:
        ``(n, m, m)`` Fishers and ``(n, C)`` logits.
    """
    model = copy.deepcopy(model).double()
    tensors = [p.requires_grad_() for name, p in model.named_parameters() if names is None or name in names]
    fishers, all_logits = [], []
    for batch in data:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(**inputs) if call is None else call(model, batch)
        logits = output if isinstance(output, Tensor) else output.logits
        for sequence, position in (batch["labels"] != -100).nonzero().tolist():
            z = logits[sequence, position].double()
            rows = []
            for y in range(len(z)):
                found = torch.autograd.grad(z[y], tensors, retain_graph=True, allow_unused=True)
                parts = zip(tensors, found, strict=True)
                rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in parts]))
            jacobian, p = torch.stack(rows).double(), z.detach().softmax(0)
            fishers.append((jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian).numpy())
            all_logits.append(z.detach().numpy())
    return np.stack(fishers), np.stack(all_logits)


def n_places(data: Any) -> int:
    """Count the places of data."""
    return sum(batch.n_examples for batch in read_batches(data, torch.device("cpu"), False, True))
