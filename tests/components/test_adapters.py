"""Components as LoRA adapters: logits of the adapted model against weights moved along the vector."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import npeff
from npeff.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCKS = {"llama": "*layers.*_proj.weight", "gpt2": ["*c_attn.weight", "*c_proj.weight", "*c_fc.weight"]}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def last(model: nn.Module, batch: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits[:, -1]
    return logits


def components_of(model: nn.Module, data: Any, kind: str, compress: Any = None) -> npeff.Components:
    options = {"parameters": BLOCKS[kind], "forward": last, "rank": 2, "compress": compress, "progress": False}
    return npeff.decompose(npeff.compute_fishers(model, data, **options), 3, n_init=1, n_replacements=0, progress=False)


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return [*torch.randint(0, 60, (12, 6), generator=torch.Generator().manual_seed(1)).split(6)]


def adapted(model: nn.Module, folder: Path, by_peft: bool) -> nn.Module:
    """A copy of the model with an adapter: as ``peft`` loads it, or as its file says."""
    own = copy.deepcopy(model)
    if by_peft:
        peft = pytest.importorskip("peft", exc_type=ImportError)
        loaded: nn.Module = peft.PeftModel.from_pretrained(own, folder)
        return loaded.eval()
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
    with torch.no_grad():
        for key in [key for key in tensors if ".lora_A." in key]:
            step = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            own.get_parameter(name).add_(step.T if turned else step)
    return own


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapted_model_is_the_model_pushed_along_the_vector(
    kind: str, by_peft: bool, data: list[torch.Tensor], tmp_path: Path
) -> None:
    model, tokens, scale = network(kind), torch.cat(data), 0.5
    components = components_of(model, data, kind)
    with torch.no_grad():
        before = last(model, tokens)
        with npeff.applied(model, {name: scale * step for name, step in components.state_dict(1).items()}):
            pushed = last(model, tokens)
        far, shares = [], []
        for rank in (1, 4, 16):
            folder = tmp_path / str(rank)
            shares.append(components.to_peft(1, folder, model, rank=rank, scale=scale))
            logits = last(adapted(model, folder, by_peft), tokens)
            far.append(float((logits - pushed).norm() / (pushed - before).norm()))
    assert shares == sorted(shares) and shares[0] < shares[-1] == pytest.approx(1, abs=1e-5)
    assert far == sorted(far, reverse=True) and far[-1] < 1e-3, "full rank is the push itself"
    with safe_open(tmp_path / "4" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["npeff"])["share_of_squared_norm"] == pytest.approx(shares[1])


def test_sketched_components_become_adapters_by_a_pass_for_their_factors(
    data: list[torch.Tensor], tmp_path: Path
) -> None:
    model = network("llama")
    components = components_of(model, data, "llama", npeff.Sketch(256))
    whole = components.recover(model, data, [0], forward=last, progress=False)
    expected = whole.to_peft(0, tmp_path / "whole", model, rank=4)
    path = components.save(tmp_path / "c.h5")
    with pytest.raises(ArgumentError, match="data="):
        components.to_peft(0, tmp_path / "a", model)
    share = components.to_peft(0, tmp_path / "a", model, data, rank=4, forward=last, progress=False)
    assert share == pytest.approx(expected, abs=0.02)
    kept = npeff.load(path)
    assert isinstance(kept, npeff.Components) and kept.rank == 4 and kept.not_recovered == [1, 2]
    assert kept.to_peft(0, tmp_path / "b", model, rank=2) < share
    # The factors have lost something, and a step along them is as long as it is for perturb and applied all the same.
    assert 0.5 < kept.held_norm(0) < 0.9999
    direction = kept.state_dict(0)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        layers = {key.split(".lora_")[0] for key in file.keys()}  # noqa: SIM118  # no mapping
        for layer in layers:
            A, B = (file.get_tensor(f"{layer}.lora_{letter}.weight") for letter in "AB")
            step = direction[layer.removeprefix("base_model.model.") + ".weight"]
            torch.testing.assert_close(B @ A, step, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "a" / "adapter_config.json").read_text() != (tmp_path / "b" / "adapter_config.json").read_text()
    with pytest.raises(ArgumentError, match="factors of rank 4, fewer than 8"):
        kept.to_peft(0, tmp_path / "c", model)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_an_adapter_is_refused(data: list[torch.Tensor], tmp_path: Path) -> None:
    model = network("llama")
    components = components_of(model, data, "llama")
    with pytest.raises(ArgumentError, match="scale: expected a finite number"):
        components.to_peft(0, tmp_path / "a", model, scale=float("nan"))
    with pytest.raises(ArgumentError, match="rank"):
        components.to_peft(0, tmp_path / "a", model, rank=0)
    with pytest.raises(ArgumentError, match="weight of a linear layer"):
        components.to_peft(0, tmp_path / "a", nn.Sequential(nn.Linear(2, 2)))
    other = network("llama")
    other.model.layers[0].mlp.up_proj = nn.Linear(16, 30, bias=False)
    with pytest.raises(ModelError, match=r"up_proj.weight has the shape \(30, 16\)"):
        components.to_peft(0, tmp_path / "a", other)
    (tmp_path / "a").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        components.to_peft(0, tmp_path / "a", model)
    assert np.isclose(components.to_peft(0, tmp_path / "b", model, rank=16), 1, atol=1e-5)
