"""Hugging Face models as they come: SDPA and eager attention, padding, gradient checkpointing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import npeff
from oracles import dense_jacobians

transformers = pytest.importorskip("transformers")


def bert(attention: str, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        attn_implementation=attention,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def padded(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (n,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 50, mask.shape, generator=generator) * mask, "attention_mask": mask}


def exact_diagonals(model: nn.Module, batch: dict[str, Tensor]) -> np.ndarray:
    names = [name for name, _ in model.named_parameters()]
    singles = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]
    logits, jacobians = dense_jacobians(model, singles, names, lambda m, x: m(**x).logits)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = jacobians - np.einsum("nc,ncm->nm", p, jacobians)[:, None]
    return np.einsum("nc,ncm->nm", p, scores**2)


@pytest.mark.parametrize(("attention", "checkpointing"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_attention_of_every_kind_has_rules(attention: str, checkpointing: bool) -> None:
    model, batch = bert(attention, checkpointing), padded(4)
    fishers = npeff.compute_fishers(model, [batch], kind="diagonal", progress=False)
    exact = exact_diagonals(model, batch)
    found = np.stack([fishers.dense(i) for i in range(4)])
    np.testing.assert_allclose(found, exact, atol=1e-5 * exact.max())
    slow = [line for line in fishers.coverage if line["rule"] in ("loop", "torch.func")]
    assert not slow, slow


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in every backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_checkpointed_blocks() -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(False).eval(), torch.randn(3, 6)
    fishers = npeff.compute_fishers(model, [x], kind="diagonal", progress=False)
    plain = nn.Sequential(*model.blocks, model.head).eval()
    expected = npeff.compute_fishers(plain, [x], kind="diagonal", progress=False)
    for i in range(3):
        np.testing.assert_allclose(fishers.dense(i), expected.dense(i), rtol=1e-5, atol=1e-8)


def test_reentrant_checkpoints_are_refused() -> None:
    with pytest.raises(npeff.ModelError, match="use_reentrant=False"):
        npeff.compute_fishers(Checkpointed(True).eval(), [torch.randn(3, 6)], progress=False)
