"""``parameters="blocks"``: the linear layers of the transformer blocks, in every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npeff.errors import ArgumentError
from npeff.gradients.eligibility import linear_in_blocks, select_parameters
from tiny_language import model_of

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PERCEPTRON = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LAYERS = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "llama": ("model.layers", [*ATTENTION, *PERCEPTRON]),
    "qwen2": ("model.layers", [*ATTENTION, *PERCEPTRON]),
    "gemma2": ("model.layers", [*ATTENTION, *PERCEPTRON]),
    "mamba": ("backbone.layers", [f"mixer.{name}_proj" for name in ("in", "x", "dt", "out")]),
    "bert": (
        "bert.encoder.layer",
        [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
        + ["intermediate.dense", "output.dense"],
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_linear_layers_of_the_blocks(kind: str) -> None:
    pytest.importorskip("transformers")
    blocks, layers = LAYERS[kind]
    wanted = {f"{blocks}.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert linear_in_blocks(model_of(kind)) == wanted
    assert {p.name for p in select_parameters(model_of(kind), "blocks")} == wanted


def test_experts_and_torch_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    names = {p.name for p in select_parameters(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "blocks")}
    own = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == {f"layers.{i}.{name}" for i in range(2) for name in own}
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    mixtral = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    names = linear_in_blocks(transformers.MixtralForCausalLM(mixtral))
    assert sum("experts" in name for name in names) == 2 and not any("norm" in name for name in names)


def test_with_other_patterns() -> None:
    pytest.importorskip("transformers")
    model = model_of("llama")
    few = {p.name for p in select_parameters(model, ["blocks", "!*mlp*", "*embed*"])}
    assert "model.embed_tokens.weight" in few and "model.layers.0.self_attn.q_proj.weight" in few
    assert not any("mlp" in name for name in few)
    rest = {p.name for p in select_parameters(model, "!blocks")}
    assert rest == {name for name, _ in model.named_parameters()} - linear_in_blocks(model)


def test_a_model_without_blocks() -> None:
    with pytest.raises(ArgumentError, match=r"parameters: 'blocks' stands for .* and Linear has none within an nn.Mod"):
        select_parameters(nn.Linear(2, 3), "blocks")
