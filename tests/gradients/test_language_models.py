"""Places of Hugging Face's language models: small, random, of several architectures, against one backward pass each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from language_cases import VOCABULARY, fishers_of_places, token_batches

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
CONFIGS = {
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Gemma": {**SIZES, "head_dim": 4},
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2},
}


def causal(name: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name], tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def agree(model, data, expected, tolerance, **options):
    fishers = npeff.compute_fishers(model, data, progress=False, **options)
    for i, dense in enumerate(expected):
        rows = fishers.dense(i).astype(np.float64)
        found = rows.ravel() if fishers.kind == "diagonal" else rows.T @ rows
        wanted = dense.diagonal() if fishers.kind == "diagonal" else dense
        assert np.abs(found - wanted).max() <= tolerance * np.abs(dense).max()
    return {line["parameter"]: line["reason"] for line in fishers.coverage if line["rule"] in ("torch.func", "loop")}


@pytest.mark.parametrize(
    ("name", "tied", "side"),
    [
        ("GPT2", True, "right"),
        ("Llama", False, "left"),
        ("Llama", True, "right"),
        ("Qwen2", True, "left"),
        ("Gemma", True, "right"),
        ("Mamba", True, "left"),
    ],
)
def test_places_of_causal_models(name, tied, side):
    model, data = causal(name, tied), token_batches(side, every=2, counts=((5, 3), (4,)))
    expected, _ = fishers_of_places(model, data, logits)
    for kind in ("low_rank", "diagonal"):
        assert not agree(model, data, expected, 2e-6, kind=kind), "every parameter has a rule"


def test_token_labels_of_an_encoder():
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = transformers.BertForTokenClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    data = [{**batch, "labels": batch["labels"].clamp_max(2)} for batch in token_batches(every=2)]
    expected, _ = fishers_of_places(model, data, logits)
    assert not agree(model, data, expected, 2e-6)


def test_adapters():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    torch.manual_seed(0)
    model = peft.get_peft_model(causal("Llama", True), config).eval()
    data = token_batches("left", every=2, counts=((5, 3), (4,)))
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    expected, _ = fishers_of_places(model, data, logits, adapters)
    assert not agree(model, data, expected, 2e-6, parameters="*lora_*")


def test_half_precision():
    model, data = causal("Llama", True), token_batches("left", every=2, counts=((5, 3), (4,)))
    expected, _ = fishers_of_places(model, data, logits)
    assert not agree(model.to(torch.bfloat16), data, expected, 0.1)
