"""Load a model and its tokenizer by their Hugging Face path: ``hf:PATH``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from npeff.errors import ArgumentError, ModelError

PREFIX = "hf:"
"""How MODEL begins where it names a folder, a .gguf file or a model on the hub."""


def load_model(target: str) -> nn.Module:
    """Load a model of the class that its configuration names, in float32 and in evaluation mode.

    Args:
        target: ``hf:PATH``: a folder, a .gguf file, or the name of a model on the hub.

    Raises:
        ArgumentError: transformers is not there.
        ModelError: There is no such model, or its file lacks weights.
    """
    transformers, path, options = _source(target)
    try:
        architectures = transformers.AutoConfig.from_pretrained(path, **options).architectures or [""]
        kind = getattr(transformers, architectures[0], transformers.AutoModelForCausalLM)
        model, found = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"MODEL: {target} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"MODEL: {target} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} of "
            f"{kind.__name__}; these would be random"
        )
    model.config.use_cache = False
    loaded: nn.Module = model.eval()
    return loaded


def load_tokenizer(target: str) -> Any:
    """Load the tokenizer that lies beside a model; its ``name_or_path`` is the target's path.

    Raises:
        ArgumentError: transformers is not there, or there is no tokenizer.
    """
    transformers, path, options = _source(target)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ArgumentError(f"MODEL: no tokenizer can be loaded from {target}: {_first_line(error)}") from error
    tokenizer.name_or_path = target.removeprefix(PREFIX)
    return tokenizer


def _source(target: str) -> tuple[Any, str, dict[str, str]]:
    """The transformers package, and what its ``from_pretrained`` is given.

    Raises:
        ArgumentError: The package is missing.
        ModelError: The target names nothing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(f"MODEL: {target} needs transformers: pip install 'npeff[language]' ({error})") from error
    path = target.removeprefix(PREFIX)
    if not path:
        raise ModelError(f"MODEL: expected {PREFIX}PATH, a folder, a .gguf file or a name on the hub, got {target!r}")
    if path.lower().endswith(".gguf"):
        return transformers, str(Path(path).parent), {"gguf_file": Path(path).name}
    return transformers, path, {}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
