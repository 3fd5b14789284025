"""No public object floods a terminal: its text says what it is, in at most 20 lines."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from npeff.companions.rollback import Record
from npeff.components.strategies import Strategy
from npeff.fishers.fishers import FisherBlock
from npeff.fishers.rows import DenseRows, GramRows, SparseRows
from npeff.trust import NullModel, Selection, Stability

LINES, CHARACTERS = 20, 2000
PUBLIC = (
    "npeff",
    "npeff.trust",
    "npeff.perturbation",
    "npeff.reports",
    "npeff.kernels",
    "npeff.companions.linearize",
    "npeff.companions.influence",
    "npeff.companions.rollback",
    "npeff.companions.safr",
)
N, R = 5000, 64
BLOCK = np.ones((300, 300))


def public_classes() -> list[type]:
    found: dict[type, None] = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            item = getattr(module, attribute)
            if isinstance(item, type) and item.__module__.startswith("npeff") and not issubclass(item, Exception):
                found[item] = None
    return [*found, DenseRows, GramRows, SparseRows, FisherBlock]


def large(hint: Any, depth: int = 0) -> Any:
    """A value as large as any that the field could hold."""
    if isinstance(hint, str):
        return large_by_text(hint, depth)
    text = str(hint)
    if dataclasses.is_dataclass(hint):
        return filled(hint, depth + 1)  # type: ignore[arg-type]
    return large_by_text(text.replace("typing.", ""), depth)


def large_by_text(text: str, depth: int) -> Any:
    start = text.split("[")[0].split("|")[0].split(".")[-1].strip()
    if "Tensor" in start:
        return torch.ones(1000, 300)
    if start in ("Array", "ndarray", "NDArray", "Any", "A"):
        return np.linspace(0, 1, 12_000).reshape(-1, 60)
    if start in ("dict", "Mapping"):
        return dict.fromkeys((f"layer.{i}.weight" for i in range(400)), BLOCK)
    if start in ("list", "tuple", "Sequence", "Iterable"):
        return [BLOCK] * 400
    return {"int": 123_456_789, "float": 0.25, "bool": True, "str": "long text " * 400}.get(start, "other")


def filled(kind: type, depth: int = 0) -> Any:
    """An object of a dataclass whose every field is large; its checks are left out."""
    item = object.__new__(kind)
    if depth < 3:
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            object.__setattr__(item, field.name, large(field.type, depth))
    return item


def by_hand() -> list[Any]:
    rng = np.random.default_rng(0)
    W = rng.random((N, R), np.float32)
    leaves = [Strategy((j,), W[:, j]) for j in range(R)]
    tree = leaves[0]
    for leaf in leaves[1:]:
        tree = Strategy((*tree.components, *leaf.components), tree.coefficient + leaf.coefficient, 0.5, (tree, leaf))
    wide = Strategy(tuple(range(R)), W.sum(1), 0.5, tuple(leaves))
    mending = npeff.Mending(
        tuple(range(R)),
        tuple(f"layer{i}" for i in range(300)),
        np.ones((R, 300)),
        {f"layer{i}.weight": torch.ones(300, 300) for i in range(300)},
        (0.1, 0.8),
        (0.95, 0.949),
        100,
        4000,
        True,
    )
    interval = npeff.perturbation.Interval(2.0, 1.0, 3.0)
    few = {"ratio": interval}
    effect = npeff.Effect(
        tuple(range(R)),
        "low_rank",
        "each",
        1.0,
        0,
        None,
        True,
        few,
        1.5,
        {},
        (np.nan, np.nan),
        {},
        (),
        None,
        *[np.arange(N)] * 9,
    )
    trace = npeff.Trace(
        tuple(range(R)),
        tuple(f"layer{i}" for i in range(900)),
        np.ones(900),
        (interval,) * 900,
        (interval,) * 900,
        1.0,
        *[np.ones(32)] * 4,
    )
    return [
        tree,
        wide,
        leaves[3],
        mending,
        effect,
        trace,
        npeff.Encoded(W, np.zeros(N), W[:, 0]),
        Stability(W[:4].astype(float), {2: 0.9, 3: 0.5}, 0.5),
        NullModel(0.5, np.ones(3), np.ones(R), W[:3].astype(float)),
        Selection(tuple(range(1, 400)), np.ones(399), np.ones((3, 399)), 7),
    ]


@pytest.mark.parametrize("item", by_hand(), ids=lambda item: type(item).__name__)
def test_what_it_says(item: Any) -> None:
    text = repr(item)
    assert len(text.splitlines()) == 1 and len(text) <= CHARACTERS
    assert len(str(item).splitlines()) <= LINES
    assert text.startswith(type(item).__name__ + "(")
    assert any(number in text for number in ("64", "399", "900", "1 component")), "its size"


def test_the_tree_says_its_parts() -> None:
    tree = by_hand()[1]
    assert "64 components: 0, 1, 2, 3, 4, 5, … (64); 5,000 examples; 64 parts" in str(tree)
    assert "2% of the coefficients: " in str(tree) and "and 48 smaller parts" in str(tree)
    assert len(str(tree).splitlines()) == 18 and len(repr(tree).splitlines()) == 1
    assert len(repr(tree.children).splitlines()) == 1, "many of them in a list"


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: kind.__name__)
def test_every_public_class(kind: type) -> None:
    if not dataclasses.is_dataclass(kind):
        own = any("__repr__" in vars(base) for base in kind.__mro__[:-1] if base.__module__.startswith("npeff"))
        assert own or kind.__repr__ is object.__repr__ or issubclass(kind, torch.nn.Module)
        return
    if getattr(kind, "__abstractmethods__", None):
        return
    if kind in {type(item) for item in by_hand()} or kind in (npeff.Components, npeff.Fishers, Record):
        return  # with numbers that go together
    try:
        text = repr(filled(kind))
    except (TypeError, AttributeError, ValueError) as error:
        pytest.fail(f"{kind.__name__}: {error}")
    assert len(text.splitlines()) <= LINES and len(text) <= CHARACTERS, text[:300]
    assert kind.__name__ in text
