"""A component's vector as a LoRA adapter in the format of ``peft``: ΔW = B A for every linear layer.

The block of a linear layer is ``Σ c δᵀa`` over rows and positions; its best approximation of rank r is an adapter of
rank r. An adapter holds weights of linear layers alone: what a vector has in embeddings, norms and biases is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn

from npeff.components.factored import FactorSlot, slots, truncated
from npeff.components.factorisation import Factorisation
from npeff.errors import ArgumentError, ModelError
from npeff.models.parameters import Parameter
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[np.float32]


def write_adapter(
    components: Factorisation, j: int, path: str | Path, model: nn.Module, rank: int, scale: float
) -> float:
    """Write component j as an adapter; see :meth:`npeff.Components.to_peft`.

    Raises:
        ArgumentError: ``scale`` is no number, ``path`` a file, or no parameter the weight of a linear layer.
        ModelError: The model has other shapes than the components.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
        raise ArgumentError(f"scale: expected a finite number, got {scale!r}")
    folder = path_of(path)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"path: expected a folder to write, or none, but {folder} is a file")
    inner = getattr(model, "_orig_mod", model)
    layers = {f"{name}.weight": module for name, module in inner.named_modules() if _is_linear(module)}
    tensors: dict[str, Tensor] = {}
    names, turned, kept = [], [], 0.0
    for parameter, left, right in _factors(components, j, rank):
        if parameter.name not in layers:
            continue
        found = tuple(layers[parameter.name].weight.shape)
        if found != parameter.shape:
            raise ModelError(
                f"model: {parameter.name} has the shape {found}, and in the components {parameter.shape}; give the "
                "model of the Fishers"
            )
        kept += float(np.square(left.astype(np.float64)).sum())  # the rows of the right factor are orthonormal
        names.append(parameter.name.removesuffix(".weight"))
        turned.append(not isinstance(layers[parameter.name], nn.Linear))
        A, B = (left.T, right.T) if turned[-1] else (right, left)
        missing = rank - len(A)  # a small layer has no more singular values
        for letter, factor in (("A", np.pad(A, ((0, missing), (0, 0)))), ("B", np.pad(B, ((0, 0), (0, missing))))):
            step = np.ascontiguousarray(factor if letter == "A" else factor * np.float32(scale))
            tensors[f"base_model.model.{names[-1]}.lora_{letter}.weight"] = torch.from_numpy(step)
    if not tensors:
        raise ArgumentError(
            "model: none of the components' parameters is the weight of a linear layer of it, so there is nothing that "
            "an adapter could hold; give the model of the Fishers, or take components.state_dict(j)"
        )
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(inner, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(turned),
        "target_modules": names,
        "inference_mode": True,
    }
    about = {"component": j, "scale": float(scale), "share_of_squared_norm": kept, "digest": components.digest}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "adapter_model.safetensors") as scratch:
        scratch.write_bytes(save(tensors, {"format": "pt", "npeff": json.dumps(about)}))
    with atomic(folder / "adapter_config.json") as scratch:
        scratch.write_text(json.dumps(config, indent=2) + "\n")
    return kept


def _is_linear(module: nn.Module) -> bool:
    """Whether an adapter can hold its weight: ``nn.Linear``, or the ``Conv1D`` of GPT-2, whose weight is (in, out)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _factors(components: Factorisation, j: int, rank: int) -> list[tuple[Parameter, Array, Array]]:
    """Give left ``(n, r)`` and right ``(r, k)`` of every matrix of a vector, right with orthonormal rows; r ≤ rank."""
    if components.known_as_factors_alone(j):
        stored = components.factored_vector(j)
        vector, laid = stored[1], slots(components.parameters, stored[0])
    else:
        vector = components.vector(j)
        laid = [FactorSlot(parameter, parameter.offset, None) for parameter in components.parameters]
    found = []
    for slot in laid:
        if len(slot.parameter.shape) != 2:
            continue
        if slot.rank is not None:
            left, right = slot.factors(vector)
            left, right = left[:, :rank], right[:rank]  # by descending singular value
        else:
            block = torch.from_numpy(vector[slot.offset : slot.offset + slot.numel].reshape(slot.size).copy())
            factors = truncated(block[None].double(), rank)
            left, right = (factor[0].float().numpy() for factor in factors)
        found.append((slot.parameter, left, right))
    return found
