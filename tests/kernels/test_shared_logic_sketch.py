"""The blocks of the CUDA sketch, emulated on the processor, against the processor's own kernel."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import blocks
from npeff.kernels import reference

_native = pytest.importorskip("npeff._native", reason="the native module was not built")
SEEDS = [0, 1, 2]
"""Orders of threads and blocks; 0: ascending."""
MAP_SEED = 2**62 + 12345


def expected(x: np.ndarray, bases: np.ndarray, targets: np.ndarray, d: int, nonzeros: int, n: int) -> np.ndarray:
    sums = np.zeros((n, d))
    x = np.ascontiguousarray(x, np.float32)
    _native.sketch_rows(block=x, **rows(bases, targets, n), seed=MAP_SEED, copies=nonzeros, sums=sums, threads=1)
    return sums


def rows(bases: np.ndarray, targets: np.ndarray, n: int, name: str = "bases") -> dict[str, np.ndarray]:
    return {name: bases, **blocks.by_target(targets, bases, n)}


# Tiles are of 4096 entries, blocks of the map of 16; 64 KiB of shared memory hold some 10 000 buckets.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("d", "nonzeros"), [(16, 1), (64, 2), (1024, 1), (192, 4), (40_000, 1)])
@pytest.mark.parametrize("width", [1, 17, 4095, 4113, 20_000])
def test_rows(seed: int, d: int, nonzeros: int, width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3, width + 5)).astype(np.float32)[:, 2:-3]
    bases, targets = np.array([7, 10**12, 0]), np.array([1, 0, 1])
    sums = np.zeros((3, d))
    blocks.sketch_rows(
        block=x, **rows(bases, targets, len(sums)), seed=MAP_SEED, copies=nonzeros, sums=sums, stream=seed
    )
    want = expected(x, bases, targets, d, nonzeros, 3)
    np.testing.assert_allclose(sums, want, rtol=1e-6, atol=2e-6 * np.sqrt(width))
    assert (sums[2] == 0).all()
    again = np.zeros((3, d))
    blocks.sketch_rows(
        block=x, **rows(bases, targets, len(again)), seed=MAP_SEED, copies=nonzeros, sums=again, stream=seed + 10
    )
    np.testing.assert_array_equal(sums, again)  # the same bits in any order of threads and blocks


@pytest.mark.parametrize("seed", SEEDS)
def test_16_bits_and_adding_up(seed: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3000)).astype(np.float16)
    bases, targets = np.array([0, 0]), np.array([0, 1])
    want = expected(x, bases, targets, 256, 1, 2)
    sums = np.zeros((2, 256))
    for a, b in ((0, 1001), (1001, 3000)):
        blocks.sketch_rows(
            block=x[:, a:b], **rows(bases + a, targets, len(sums)), seed=MAP_SEED, copies=1, sums=sums, stream=seed
        )
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    t = torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
    sums = np.zeros((2, 256))
    blocks.sketch_rows(block=t, **rows(bases, targets, len(sums)), seed=MAP_SEED, copies=1, sums=sums, stream=seed)
    np.testing.assert_allclose(sums, expected(t.float().numpy(), bases, targets, 256, 1, 2), rtol=1e-5, atol=1e-5)


# Stretches are of max(4096, 8·d) entries, or a share of all of them; 64 KiB of shared memory hold some 8000 buckets.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("d", [16, 256, 16_384])
@pytest.mark.parametrize(("shape", "cuts"), [((3, 5), [1]), ((40, 300), [7, 33]), ((3, 9000), [2]), ((4200, 1), [9])])
def test_two_sided(seed: int, d: int, shape: tuple[int, int], cuts: list[int]) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((3, *shape)).astype(np.float32)
    down, across = (reference.sketch_places(MAP_SEED, 77, side, d, n) for side, n in enumerate(shape))
    targets, sums, want = np.array([1, 0, 1]), np.zeros((3, d)), np.zeros((3, d))
    for a, b in pairwise([0, *cuts, shape[0]]):
        block, first = np.ascontiguousarray(x[:, a:b].reshape(3, -1)), np.full(3, a)
        matrix = {"block": block, "row_places": down, "column_places": across, "weight": 1.5}
        matrix |= rows(first, targets, 3, "first")
        blocks.sketch_matrix(**matrix, sums=sums, stream=seed)
        _native.sketch_matrix(**matrix, sums=want, threads=1)
    np.testing.assert_allclose(sums, want, rtol=1e-6, atol=2e-6 * np.sqrt(x[0].size))
    block[2, -1] = np.inf
    blocks.sketch_matrix(**matrix, sums=sums, stream=seed)
    assert np.isnan(sums[1]).any() and np.isfinite(sums[[0, 2]]).all()
