"""The networks of benchmarks/fishers.py, their batches, and the dense float64 answer."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import npeff
from npeff import demo
from npeff.fishers.factors import factorise
from npeff.fishers.options import FisherOptions

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data


@dataclass
class Case:
    """A network and a batch.

    Attributes:
        name: On the command line and in the tables.
        model: In evaluation mode.
        inputs: ``(b, …)``, or a mapping of such tensors.
        k: Entries kept of each example.
        modules: Whether it is made of layers that BackPACK and nngeometry know.
    """

    name: str
    model: nn.Module
    inputs: Tensor | dict[str, Tensor]
    k: int
    modules: bool = True

    def logits(self, inputs: Tensor | dict[str, Tensor] | None = None) -> Tensor:
        """The model's logits ``(b, C)``."""
        inputs = self.inputs if inputs is None else inputs
        return self.model(**inputs).logits if isinstance(inputs, dict) else self.model(inputs)

    def example(self, i: int) -> Tensor | dict[str, Tensor]:
        """A batch of one example."""
        if isinstance(self.inputs, dict):
            return {name: tensor[i : i + 1] for name, tensor in self.inputs.items()}
        return self.inputs[i : i + 1]

    @property
    def n(self) -> int:
        """Examples in the batch."""
        return len(next(iter(self.inputs.values()))) if isinstance(self.inputs, dict) else len(self.inputs)

    @property
    def m(self) -> int:
        """Parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def columns(self, basis: str) -> Tensor:
        """Cotangents ``(b, C, R)`` float64 whose rows are the Fisher factor, as npeff makes them."""
        with torch.no_grad():
            logits = self.logits()
        found = factorise(logits, FisherOptions(basis=basis), None, np.arange(self.n))  # type: ignore[arg-type]
        return found.columns * found.scale[:, None, None]

    def oracle(self, i: int, columns: Tensor) -> Tensor:
        """Rows of example i, ``(R, m)`` float64: one backward pass per logit of a float64 twin, then Sᵀ J."""
        twin = copy.deepcopy(self.model).double()
        inputs = self.example(i)
        inputs = (
            {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            if isinstance(inputs, dict)
            else inputs.double()
        )
        logits = Case(self.name, twin, inputs, self.k).logits()[0]
        jacobian = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(logit, list(twin.parameters()), retain_graph=True)])
            for logit in logits
        ]
        return columns[i].T @ torch.stack(jacobian)


def _trained(model: nn.Module, examples: int) -> nn.Module:
    images = fashion_data.fashion_mnist()
    some = demo.Images(images.inputs[:examples], images.labels[:examples], images.class_names, 64)
    return demo.train(model, some, epochs=1).eval()


def mlp(n: int, width: int = 1024, examples: int = 6000) -> Case:
    """784–width–width–10 with ReLU, on Fashion-MNIST."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    model = _trained(layers, examples) if examples else layers.eval()
    return Case("mlp", model, fashion_data.fashion_mnist().inputs[-n:], 65_536)


def cnn(n: int, examples: int = 6000) -> Case:
    """Two 5×5 convolutions and two dense layers on Fashion-MNIST, 114 314 parameters."""
    torch.manual_seed(0)
    model = _trained(fashion_data.fashion_cnn(), examples) if examples else fashion_data.fashion_cnn().eval()
    return Case("cnn", model, fashion_data.fashion_mnist().inputs[-n:], 8_192)


def wide_cnn(n: int, width: int = 64, examples: int = 2000) -> Case:
    """Four 3×3 convolutions of width, width, 2·width, 2·width channels, average pooling, one dense layer."""
    torch.manual_seed(0)
    channels = [1, width, width, 2 * width, 2 * width]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        if i < 2:
            layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(channels[-1], 10))
    model = _trained(model, examples) if examples else model.eval()
    return Case("wide_cnn", model, fashion_data.fashion_mnist().inputs[-n:], 16_384)


def transformer(n: int, hidden: int = 256, classes: int = 4) -> Case:
    """BERT with 4 layers and random weights; 64 tokens at most, padded to the longest of the batch."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
        num_labels=classes,
    )
    model = BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (n,), generator=generator)
    lengths[0] = 64
    mask = (torch.arange(64) < lengths[:, None]).long()
    tokens = torch.randint(1, 8192, (n, 64), generator=generator) * mask
    positions = torch.arange(64).expand(n, -1).contiguous()  # opacus wants the examples in every input
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return Case("transformer", model, inputs, 65_536, modules=False)


CASES: dict[str, Callable[[int], Case]] = {"mlp": mlp, "cnn": cnn, "wide_cnn": wide_cnn, "transformer": transformer}
UNTRAINED: dict[str, Callable[[int], Case]] = {
    "mlp": lambda n: mlp(n, examples=0),
    "cnn": lambda n: cnn(n, examples=0),
    "wide_cnn": lambda n: wide_cnn(n, examples=0),
    "transformer": transformer,
}
"""The same with random weights, where time is all that training would cost."""


def compute(case: Case, kind: str, batches: int = 1) -> npeff.Fishers:
    """npeff's side: the batch, so many times."""
    options = {"kind": kind, "compress": npeff.TopK(case.k), "progress": False}
    return npeff.compute_fishers(case.model, [case.inputs] * batches, **options)  # type: ignore[arg-type]
