"""A tiny tokenizer and tiny language models, made here: no download."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

CORPUS = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "The colour of grass is green. The colour of the sky is blue.",
    "Is it good? yes Is it bad? no The answer is yes. The answer is no.",
]
VOCABULARY = 333


def tokenizer_of(
    folder: Path | None = None, begin: bool = False, end: bool = False, corpus: Sequence[str] = CORPUS
) -> Any:
    """A byte-level tokenizer, written to a folder if there is one.

    Args:
        folder: Where to write it.
        begin: It puts ``<s>`` before every text.
        end: It puts ``</s>`` after every text.
        corpus: The texts that decide its tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*corpus] * 4, trainer)
    if begin or end:
        single = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", mask_token="[MASK]"
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def model_of(kind: str = "llama", folder: Path | None = None, **options: Any) -> nn.Module:
    """A small random language model: ``"gpt2"``, ``"llama"``, ``"qwen2"``, ``"gemma2"``, ``"mamba"``, ``"bert"``."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **options}
    rotary = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**rotary | common)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**rotary | common)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=8, **rotary | common)),
        "mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **common)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                **common,
            )
        ),
    }
    model: nn.Module = made[kind]().eval()
    if folder is not None:
        model.save_pretrained(folder)  # type: ignore[operator]
    return model


@contextmanager
def working_beside_a_model(folder: Path) -> Iterator[Path]:
    """Work in a folder that holds a model with its tokenizer, ``model``; go back at the end."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        model_of("llama", Path("model"))
        tokenizer_of(Path("model"))
        yield folder
    finally:
        os.chdir(before)
