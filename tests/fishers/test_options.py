"""Every option of stage 1 is stated once: the signature of compute_fishers, and the dataclass that carries it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from npeff.errors import ArgumentError
from npeff.fishers.options import FisherOptions

INTEGERS: list[dict[str, Any]] = [
    {"compress": lambda n: npeff.Sketch(n(16), seed=n(1), nonzeros=n(1)), "rank": 2, "seed": 3, "max_examples": 5},
    {"compress": lambda n: npeff.TopK(n(7)), "labels": "sampled", "n_samples": 2, "memory": 10**9, "share": (0, 2)},
    {"compress": lambda n: npeff.GramOnly(n(10**9)), "basis": "class", "max_classes": 2},
]


def test_the_dataclass_has_the_options_of_the_signature() -> None:
    signature = inspect.signature(npeff.compute_fishers).parameters.values()
    given = [(option.name, option.default) for option in signature if option.kind is option.KEYWORD_ONLY]
    assert [(field.name, field.default) for field in fields(FisherOptions)] == given


def test_every_option_is_documented() -> None:
    documented = inspect.getdoc(npeff.compute_fishers) or ""
    assert [field.name for field in fields(FisherOptions) if f"\n    {field.name}: " not in documented] == []


@pytest.mark.parametrize("options", INTEGERS)
def test_integers_of_numpy_are_integers(options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    def fishers(integer: Any, path: Path) -> npeff.Fishers:
        def converted(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(converted, value))
            return integer(value) if isinstance(value, int) else value(integer) if callable(value) else value

        given = {name: converted(value) for name, value in options.items()}
        torch.manual_seed(0)
        return npeff.compute_fishers(torch.nn.Linear(8, 4), [x[:3], x[3:]], out=path, progress=False, **given)

    own, numpys = (fishers(kind, tmp_path / f"{kind.__name__}.h5") for kind in (int, np.int64))
    assert own.provenance == numpys.provenance
    components = npeff.decompose(numpys, np.int64(2), n_init=np.int32(1), seed=np.uint8(1), progress=False)
    components.save(tmp_path / "components.h5")
    for name, wrong in (("rank", np.float64(2)), ("seed", True), ("max_examples", np.int64(0)), ("seed", 2**63)):
        with pytest.raises(ArgumentError, match=f"^{name}: expected an integer"):
            npeff.compute_fishers(torch.nn.Linear(8, 4), [x], **{name: wrong})  # type: ignore[arg-type]
