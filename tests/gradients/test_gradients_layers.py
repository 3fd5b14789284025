"""Every layer type against the dense float64 oracle: rows, norms, diagonals, any batch size, any order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layer_cases import CASES, N
from npeff.fishers.computation import compute_fishers
from oracles import dense_fishers, dense_jacobians

FALLBACK = {
    "transposed conv",
    "instance norm",
    "embedding bag",
    "bilinear",
    "no rule",
    "control flow",
    "experts",
    "spectral norm",
}


@pytest.fixture(scope="module")
def oracle() -> Callable[[str], tuple[nn.Module, Tensor, np.ndarray]]:
    made: dict[str, tuple[nn.Module, Tensor, np.ndarray]] = {}

    def get(name: str) -> tuple[nn.Module, Tensor, np.ndarray]:
        if name not in made:
            model, x = CASES[name]()
            names = [n for n, _ in model.named_parameters()]
            made[name] = (
                model,
                x,
                dense_fishers(*dense_jacobians(model, [x[i : i + 1] for i in range(N)], names)),
            )
        return made[name]

    return get


pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[N], [2, 4, 1], [1, 3, 3]], ids=str)
def test_low_rank_agrees_with_dense_oracle(name: str, sizes: list[int], oracle: Any) -> None:
    model, x, exact = oracle(name)
    before = copy.deepcopy(model.state_dict())
    fishers = compute_fishers(model, x.split(sizes), progress=False)
    for i in range(N):
        rows = fishers.dense(i).astype(np.float64)
        assert np.linalg.norm(rows.T @ rows - exact[i]) <= 1e-5 * np.linalg.norm(exact[i])
        assert fishers.norms[i] == pytest.approx(np.linalg.norm(exact[i]), rel=1e-5)
    fell_back = [line for line in fishers.coverage if line["rule"] in ("torch.func", "loop")]
    if name not in FALLBACK:
        assert not fell_back, fell_back
    elif name != "experts" or max(sizes) > 1:
        assert fell_back
    assert all(line["reason"] for line in fishers.coverage)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_diagonal_agrees_with_dense_oracle_in_any_order(name: str, oracle: Any) -> None:
    model, x, exact = oracle(name)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    fishers = compute_fishers(model, x[order].split(3), kind="diagonal", progress=False)
    for position, i in enumerate(order.tolist()):
        diagonal = np.diag(exact[i])
        assert (fishers.dense(position) >= 0).all()
        assert np.linalg.norm(fishers.dense(position) - diagonal) <= 1e-5 * np.linalg.norm(diagonal)
        assert fishers.norms[position] == pytest.approx(np.linalg.norm(diagonal), rel=1e-5)


@pytest.mark.parametrize("name", ["conv2d", "transformer", "repeated module", "no rule"])
def test_float64_is_exact_and_half_precisions_are_close(name: str, oracle: Any) -> None:
    model, x, exact = oracle(name)
    for dtype, tolerance in ((torch.float64, 3e-7), (torch.bfloat16, 0.2), (torch.float16, 0.05)):
        twin = copy.deepcopy(model).to(dtype)
        inputs = x.to(dtype) if x.is_floating_point() else x
        fishers = compute_fishers(twin, [inputs], progress=False)
        assert fishers.dense(0).dtype == np.float32
        for i in range(N):
            rows = fishers.dense(i).astype(np.float64)
            assert np.linalg.norm(rows.T @ rows - exact[i]) <= tolerance * np.linalg.norm(exact[i])


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_transformers_models_unmodified(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind.startswith("Bert"):
        config = transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            num_labels=3,
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, num_labels=3, pad_token_id=0
        )
    model = getattr(transformers, kind)(config).eval()
    batch = transformers.BatchEncoding(
        {"input_ids": torch.randint(1, 11, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    )
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    fishers = compute_fishers(model, [batch], progress=False)
    rules = {line["parameter"]: line["rule"] for line in fishers.coverage}
    assert not {"torch.func", "loop"} & set(rules.values())
    assert fishers.labels.tolist() == [0, 1, 2, 0]
    examples = [{key: value[i : i + 1] for key, value in batch.items() if key != "labels"} for i in range(4)]
    logits, jacobians = dense_jacobians(model, examples, fishers.parameters.names, lambda m, e: m(**e).logits)
    np.testing.assert_allclose(fishers.logits, logits, atol=1e-5)
    for i, exact in enumerate(zip(logits, jacobians, strict=True)):
        output = np.diag(p := np.exp(exact[0]) / np.exp(exact[0]).sum()) - np.outer(p, p)
        rows = fishers.dense(i).astype(np.float64)
        # ‖AᵀA − JᵀSJ‖ through Gram matrices: m is too large for m × m.
        gram, cross = exact[1] @ exact[1].T, rows @ exact[1].T
        gap = (
            np.sum((rows @ rows.T) ** 2)
            - 2 * np.sum((cross.T @ cross) * output)
            + np.trace(output @ gram @ output @ gram)
        )
        assert max(gap, 0.0) ** 0.5 <= 1e-5 * np.trace(output @ gram @ output @ gram) ** 0.5
