"""Vectors in parameter space whose matrices are kept as factors of low rank, found without forming the matrices.

A component's block of a matrix G ``(n, k)`` is a sum of outer products over rows and positions. While it is summed,
only random projections of it are kept (Tropp, Yurtsever, Udell & Cevher 2017, *Practical sketching algorithms for
low-rank matrix approximation*), with Ω, Ψ, Φ of independent normal entries:

    Y = G Ω (n, w),   Z = Ψᵀ G (w', k),   E = G Φ (n, 8).

Afterwards, with Q an orthonormal basis of Y, ``G ≈ Q X`` for the least-squares solution X of ``(ΨᵀQ) X = Z``, cut to
rank r by the singular values of X. As Φ is independent of the factors, ``‖E − Ĝ Φ‖² / 8`` has the expectation
``‖G − Ĝ‖²``: what the factors lose is measured, not bounded.

Matrices for which projections would be no smaller are summed whole and cut by their singular values; what is no matrix,
or would not be smaller as factors, is kept whole.

Factors are adapters: ΔW = B A of rank r. An adapter holds weights of linear layers alone; what a vector has in
embeddings, norms and biases is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn

from npeff.errors import ArgumentError, ModelError
from npeff.models.parameters import Parameter, Parameters
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[np.float32]
MatrixFactors = tuple[Parameter, Array, Array]
"""A matrix's parameter, left ``(n, r)`` and right ``(r, k)`` with orthonormal rows."""

TESTS = 8
"""Columns of Φ: the estimate of a loss has a standard deviation of at most √(2/8) = 50 % of it."""

OVERSAMPLING = 4
"""w / rank, and w' = 2 w + 1."""


@dataclass(frozen=True)
class FactorSlot:
    """The place of one parameter's block in a factored vector.

    Attributes:
        parameter: The parameter, as a matrix of ``shape[0]`` rows.
        offset: Of the first number.
        rank: r: the block is ``left (n, r) @ right (r, k)``, one after the other; None: the block is kept whole.
    """

    parameter: Parameter
    offset: int
    rank: int | None

    @property
    def size(self) -> tuple[int, int]:
        """``(n, k)`` of the parameter as a matrix."""
        n = self.parameter.shape[0] if self.parameter.shape else 1
        return n, self.parameter.numel // max(1, n)

    @property
    def numel(self) -> int:
        """Numbers kept."""
        return self.parameter.numel if self.rank is None else self.rank * sum(self.size)

    def factors(self, stored: Array) -> tuple[Array, Array]:
        """Return left ``(n, r)`` and right ``(r, k)`` of a factored vector; for factors alone."""
        assert self.rank is not None
        (n, k), own = self.size, stored[self.offset : self.offset + self.numel]
        return own[: n * self.rank].reshape(n, self.rank), own[n * self.rank :].reshape(self.rank, k)


def slots(parameters: Parameters, rank: int | None) -> list[FactorSlot]:
    """Lay the blocks of a factored vector, or with ``rank`` None of a whole one, end to end."""
    found, offset = [], 0
    for parameter in parameters:
        n, k = FactorSlot(parameter, 0, None).size
        fits = rank is not None and len(parameter.shape) >= 2 and rank < min(n, k) and rank * (n + k) < n * k
        slot = FactorSlot(parameter, offset, rank if fits else None)
        found.append(slot)
        offset += slot.numel
    return found


def assemble(parameters: Parameters, rank: int, stored: Array, entries: slice = slice(None)) -> Array:
    """Multiply the factors of a factored vector ``(p,)`` into the float32 vector that they stand for.

    Args:
        parameters: Of the vector.
        rank: Of the factors.
        stored: The factored vector.
        entries: Those wanted, neighbours; by default all ``(n_parameters,)``. Nothing else is multiplied out but the
            rest of the first and the last row.
    """
    first, last, _ = entries.indices(parameters.n_parameters)
    vector = np.zeros(max(0, last - first), np.float32)
    for slot in slots(parameters, rank):
        offset, k = slot.parameter.offset, slot.size[1]
        start, stop = max(first, offset) - offset, min(last, offset + slot.parameter.numel) - offset
        if start >= stop:
            continue
        own = vector[offset + start - first : offset + stop - first]
        if slot.rank is None:
            own[:] = stored[slot.offset + start : slot.offset + stop]
            continue
        left, right = slot.factors(stored)
        above = start // k
        rows = left[above : -(-stop // k)] @ right
        own[:] = rows.reshape(-1)[start - above * k : stop - above * k]
    return vector


def squared_norm(parameters: Parameters, rank: int | None, stored: Array) -> float:
    """Compute the squared norm of a vector that is stored in factors, or whole where ``rank`` is None."""
    if rank is None:
        blocks = [stored[parameter.slice] for parameter in parameters]
    else:  # the rows of right factors are orthonormal
        laid = slots(parameters, rank)
        wholes = (stored[slot.offset : slot.offset + slot.numel] for slot in laid if slot.rank is None)
        blocks = [*wholes, *(slot.factors(stored)[0].reshape(-1) for slot in laid if slot.rank is not None)]
    return sum(float(np.dot(block, block)) for block in blocks)


def scale_factored(parameters: Parameters, rank: int | None, stored: Array, factor: float) -> None:
    """Multiply a vector that is stored in factors, or whole where ``rank`` is None, by a number, in place."""
    if rank is None:
        stored *= np.float32(factor)
        return
    for slot in slots(parameters, rank):
        own = stored[slot.offset : slot.offset + slot.numel]
        (own if slot.rank is None else slot.factors(stored)[0])[:] *= np.float32(factor)


@dataclass(frozen=True)
class RangeSketch:
    """The projections that are kept of one matrix.

    Attributes:
        size: ``(n, k)``.
        rank: r.
    """

    size: tuple[int, int]
    rank: int

    @property
    def widths(self) -> tuple[int, int]:
        """Widths w of Y and w' of Z."""
        width = OVERSAMPLING * self.rank
        return width, 2 * width + 1

    @property
    def numel(self) -> int:
        """Numbers in Y, E and Z."""
        (n, k), (w, v) = self.size, self.widths
        return n * (w + TESTS) + v * k

    @property
    def smaller(self) -> bool:
        """Whether they are fewer than the matrix has."""
        return self.numel < math.prod(self.size)

    @cached_property
    def right(self) -> Tensor:
        """[Ω, Φ] ``(k, w + 8)`` float32, the same for every matrix of that size."""
        return torch.randn(self.size[1], self.widths[0] + TESTS, generator=torch.Generator().manual_seed(1))

    @cached_property
    def left(self) -> Tensor:
        """Ψ ``(n, w')`` float32."""
        return torch.randn(self.size[0], self.widths[1], generator=torch.Generator().manual_seed(2))

    def factors(self, Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the factors of several matrices.

        Args:
            Y: ``(c, n, w + 8)``: [Y, E].
            Z: ``(c, w', k)``.

        Returns:
            left ``(c, n, r)``, right ``(c, r, k)`` with orthonormal rows, and ``(c,)`` the squared norm of what is
            lost; float64.
        """
        Y, Z, width = Y.double(), Z.double(), self.widths[0]
        Q, _ = torch.linalg.qr(Y[:, :, :width])
        basis, triangle = torch.linalg.qr(self.left.double().mT.to(Q.device) @ Q)
        X = torch.linalg.solve_triangular(triangle, basis.mT @ Z, upper=True)
        left, right = truncated(X, self.rank)
        left, tested = Q @ left, self.right[:, width:].double().to(Q.device)
        lost = (Y[:, :, width:] - left @ (right @ tested)).square().sum(dim=(1, 2)) / TESTS
        return left, right, lost


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cut wide or tall matrices ``(c, n, k)`` to their largest singular values.

    Returns:
        left ``(c, n, r)``, singular values in it, and right ``(c, r, k)`` with orthonormal rows.
    """
    if matrices.shape[1] <= matrices.shape[2]:  # the singular vectors of the smaller side, from a square triangle
        basis, triangle = torch.linalg.qr(matrices.mT)
        U, S, Vh = torch.linalg.svd(triangle.mT, full_matrices=False)
        right = Vh[:, :rank] @ basis.mT
    else:
        basis, triangle = torch.linalg.qr(matrices)
        U, S, right = torch.linalg.svd(triangle, full_matrices=False)
        U, right = basis @ U, right[:, :rank]
    return U[:, :, :rank] * S[:, None, :rank], right


# ---- adapters ------------------------------------------------------------------------------------------------------


def write_adapter(
    factors: Iterable[MatrixFactors],
    about: Mapping[str, Any],
    path: str | Path,
    model: nn.Module,
    rank: int,
    scale: float,
    held: float = 1.0,
) -> float:
    """Write a vector as a LoRA adapter in the format of ``peft``, ΔW = B A for every linear layer.

    Args:
        factors: Of the vector's matrices.
        about: What the file says of the vector; JSON-able.
        path: The folder.
        model: The model that the adapter is for.
        rank: Rank of the adapter.
        scale: What ΔW is multiplied by.
        held: Norm of what is known of the vector, by which ΔW is divided.

    Returns:
        The squared norm of what the adapter holds.

    Raises:
        ArgumentError: ``scale`` is no number, ``path`` a file, or no parameter the weight of a linear layer.
        ModelError: The model has other shapes than the vector.
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
    for parameter, left, right in factors:
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
            step = np.ascontiguousarray(factor if letter == "A" else factor * np.float32(scale / held))
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
    about = {**about, "scale": float(scale), "share_of_squared_norm": kept}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "adapter_model.safetensors") as scratch:
        scratch.write_bytes(save(tensors, {"format": "pt", "npeff": json.dumps(about)}))
    with atomic(folder / "adapter_config.json") as scratch:
        scratch.write_text(json.dumps(config, indent=2) + "\n")
    return kept


def _is_linear(module: nn.Module) -> bool:
    """Whether an adapter can hold its weight: ``nn.Linear``, or the ``Conv1D`` of GPT-2, whose weight is (in, out)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
