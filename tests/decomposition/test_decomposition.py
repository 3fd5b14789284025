"""The solver: what must hold of every decomposition, whatever the data."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import npeff
from decomposition_cases import QUICK, example_fishers
from npeff.cli import run as run_command
from npeff.decomposition.options import DecomposeOptions
from npeff.fishers.rows import DenseRows
from npeff.fishers.scaling import scale
from planted import best_cosines, fishers_of, planted, sparse


def dense_loss(components: npeff.Components, fishers: npeff.Fishers) -> float:
    """L / Σ‖F_i‖² from the dense matrices, float64."""
    scaled = scale(fishers, components.block_weights or "energy")
    G = np.zeros((components.n_components, scaled.rows.n_columns))
    G[:] = components.vectors
    total = left = 0.0
    for i in range(len(fishers)):
        rows = scaled.rows.dense(int(fishers.row_offsets[i]), int(fishers.row_offsets[i + 1])).astype(np.float64)
        w = components.coefficients[i].astype(np.float64)
        if fishers.kind == "diagonal":
            F, model = rows[0], w @ G
        else:
            F, model = rows.T @ rows, (G.T * w) @ G
        total += np.square(F).sum()
        left += np.square(F - model).sum()
    return left / total


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("stored", ["dense", "sparse"])
@pytest.mark.parametrize("space", ["gram", "rows"])
def test_loss_is_that_of_the_dense_matrices_and_never_rises(kind: str, stored: str, space: str) -> None:
    fishers = example_fishers(kind, stored)
    components = npeff.decompose(fishers, 5, space=space, **QUICK)
    assert components.loss == pytest.approx(dense_loss(components, fishers), rel=1e-4)
    assert components.loss_curve[-1] == pytest.approx(components.loss, rel=1e-6)
    assert (np.diff(components.loss_curve) <= 0).all()
    assert (components.coefficients >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(components.vectors, axis=1), 1, rtol=1e-5)


def test_gram_and_sparse_space_walk_the_same_path() -> None:
    fishers = example_fishers(stored="sparse")
    options = {"n_init": 1, "n_replacements": 0, "max_iterations": 20, "progress": False, "dtype": "float64"}
    gram = npeff.decompose(fishers, 4, space="gram", **options)
    rows = npeff.decompose(fishers, 4, space="rows", **options)
    np.testing.assert_allclose(gram.loss_curve, rows.loss_curve, rtol=1e-9)
    np.testing.assert_allclose(gram.coefficients, rows.coefficients, atol=1e-5)
    assert best_cosines(gram.vectors, rows.vectors).min() > 1 - 1e-6


def test_dense_and_sparse_rows_give_the_same() -> None:
    options = {"n_init": 1, "n_replacements": 0, "max_iterations": 20, "progress": False, "dtype": "float64"}
    one = npeff.decompose(example_fishers(stored="dense"), 4, **options)
    two = npeff.decompose(example_fishers(stored="sparse"), 4, **options)
    np.testing.assert_allclose(one.loss_curve, two.loss_curve, rtol=1e-9)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_float32_agrees_with_float64(kind: str) -> None:
    fishers = example_fishers(kind)
    options = {"n_init": 1, "n_replacements": 0, "max_iterations": 15, "progress": False}
    single = npeff.decompose(fishers, 4, dtype="float32", **options)
    double = npeff.decompose(fishers, 4, dtype="float64", **options)
    steps = min(len(single.loss_curve), len(double.loss_curve))
    np.testing.assert_allclose(single.loss_curve[:steps], double.loss_curve[:steps], rtol=2e-4)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_same_seed_same_bits(kind: str) -> None:
    fishers = example_fishers(kind)
    one, two = (npeff.decompose(fishers, 5, seed=3, **QUICK) for _ in range(2))
    np.testing.assert_array_equal(one.coefficients, two.coefficients)
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert one.loss_curve.tolist() == two.loss_curve.tolist()


@pytest.mark.parametrize("r", [8, 32])
def test_planted_components_are_recovered(r: int) -> None:
    fishers, G, _ = planted(n=12 * r + 100, r=r, m=300, noise=0.1, seed=r)
    components = npeff.decompose(fishers, r, seed=1, progress=False)
    assert best_cosines(components.vectors, G).min() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("r", [16, 64])
def test_planted_components_are_recovered_from_every_seed(r: int, seed: int) -> None:
    fishers, G, _ = planted(n=12 * r + 100, r=r, m=300, noise=0.2, seed=100 + seed)
    components = npeff.decompose(fishers, r, seed=seed, progress=False)
    assert best_cosines(components.vectors, G).min() >= 0.99


def test_planted_coefficients_come_back() -> None:
    fishers, G, W = planted(n=150, r=6, m=200, noise=0.0, seed=0)
    components = npeff.decompose(fishers, 6, progress=False)
    assert components.loss < 1e-4
    order = np.abs(components.vectors @ G.T).argmax(0)
    wanted = W / fishers.norms[:, None]
    np.testing.assert_allclose(components.coefficients[:, order], wanted, atol=0.02)


def test_hard_orthogonality() -> None:
    components = npeff.decompose(example_fishers(), 5, orthogonality="hard", **QUICK)
    np.testing.assert_allclose(components.vectors @ components.vectors.T, np.eye(5), atol=1e-5)
    assert (np.diff(components.loss_curve) <= 0).all()


def test_soft_orthogonality_lowers_the_cosines() -> None:
    fishers = example_fishers()

    def overlap(strength: float) -> float:
        cosines = npeff.decompose(fishers, 5, orthogonality=strength, max_iterations=150, **QUICK).cosines()
        return float(np.square(cosines).sum() - 5)

    free, some, much = overlap(0.0), overlap(0.05), overlap(5.0)
    assert much < some < free
    assert much < 0.05 * free


def test_block_weights() -> None:
    fishers = example_fishers(stored="sparse")
    only_b = npeff.decompose(fishers, 3, block_weights={"a.*": 0.0}, **QUICK)
    assert only_b.block_energy(0)["a.weight"] == 0
    assert only_b.block_energy(0)["b.weight"] == pytest.approx(1, abs=1e-5)
    balanced = npeff.decompose(fishers, 3, block_weights="balanced", **QUICK)
    assert balanced.loss == pytest.approx(dense_loss(balanced, fishers), rel=1e-4)
    again = balanced.encode(fishers)
    assert np.abs(again.coefficients - balanced.coefficients).max() < 0.05
    with pytest.raises(npeff.ArgumentError, match=r"block_weights.*'c\.\*'"):
        npeff.decompose(fishers, 3, block_weights={"c.*": 1.0}, **QUICK)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_a_zero_fisher_is_kept_with_coefficient_zero(kind: str) -> None:
    fishers = example_fishers(kind)
    values = fishers.rows.values.copy()
    values[fishers.row_offsets[7] : fishers.row_offsets[8]] = 0
    norms = fishers.norms.copy()
    norms[7] = 0
    fishers = replace(fishers, rows=DenseRows(values), norms=norms)
    components = npeff.decompose(fishers, 4, **QUICK)
    assert not components.coefficients[7].any()
    assert components.zero[7] and components.zero.sum() == 1
    encoded = components.encode(fishers)
    assert not encoded.coefficients[7].any() and encoded.kkt[7] == 0


def test_checkpoint_resumes_to_the_same_bits(tmp_path) -> None:
    fishers = example_fishers(n=60)
    whole = npeff.decompose(fishers, 5, **QUICK)
    path = tmp_path / "search"

    class Killed(Exception):
        pass

    for limit in (15, 40, 70):

        def stop(progress: npeff.Progress, limit: int = limit) -> None:
            if progress.iteration >= limit:
                raise Killed

        try:
            npeff.decompose(fishers, 5, checkpoint=path, callback=stop, **QUICK)
        except Killed:
            continue
    resumed = npeff.decompose(fishers, 5, checkpoint=path, **QUICK)
    np.testing.assert_array_equal(whole.coefficients, resumed.coefficients)
    np.testing.assert_array_equal(whole.vectors, resumed.vectors)
    again = npeff.decompose(fishers, 5, checkpoint=path, callback=stop, **QUICK)  # finished: no iteration is left
    np.testing.assert_array_equal(whole.coefficients, again.coefficients)
    np.testing.assert_array_equal(whole.vectors, again.vectors)
    assert again.provenance == whole.provenance


def test_a_search_that_its_callback_ended_goes_on_from_its_checkpoint(tmp_path) -> None:
    fishers, path = example_fishers(n=60), tmp_path / "search"
    stopped = npeff.decompose(fishers, 5, checkpoint=path, callback=lambda p: p.stage == "replacement", **QUICK)
    whole = npeff.decompose(fishers, 5, checkpoint=path, **QUICK)
    assert whole.loss <= stopped.loss
    np.testing.assert_array_equal(whole.vectors, npeff.decompose(fishers, 5, **QUICK).vectors)


def test_options_are_the_arguments_of_decompose() -> None:
    arguments = list(inspect.signature(npeff.decompose).parameters.values())[1:]
    assert [(one.name, one.default) for one in arguments[1:]] == [
        (one.name, one.default) for one in fields(DecomposeOptions)[1:]
    ]
    assert arguments[0].name == fields(DecomposeOptions)[0].name == "n_components"
    hints = typing.get_type_hints(DecomposeOptions)
    assert {one.name: typing.get_type_hints(npeff.decompose)[one.name] for one in arguments} == hints


def test_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    fishers, path = example_fishers(), tmp_path / "search"

    def stop(progress: npeff.Progress) -> None:
        if progress.stage == "replacement":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npeff.decompose(fishers, 5, checkpoint=path, callback=stop, **QUICK)
    with pytest.raises(npeff.ResumeError, match="seed"):
        npeff.decompose(fishers, 5, seed=1, checkpoint=path, **QUICK)
    with pytest.raises(npeff.ResumeError, match="Fishers themselves"):
        npeff.decompose(example_fishers(seed=1), 5, checkpoint=path, **QUICK)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(npeff.StorageError, match="search"):
        npeff.decompose(fishers, 5, checkpoint=path, **QUICK)


def test_a_callback_can_end_the_search() -> None:
    seen = []

    def stop(progress: npeff.Progress) -> bool:
        seen.append(progress)
        return len(seen) == 7

    components = npeff.decompose(example_fishers(), 4, callback=stop, **QUICK)
    assert len(seen) == 7 == components.provenance["course"]["iterations"]
    assert components.loss == pytest.approx(min(p.loss for p in seen))


def test_init_is_where_the_descent_begins() -> None:
    fishers = example_fishers()
    first = npeff.decompose(fishers, 4, n_init=1, n_replacements=0, max_iterations=3, progress=False)
    init = (first.coefficients, np.stack([first.vector(j) for j in range(4)]))
    second = npeff.decompose(fishers, 4, init=init, n_replacements=0, progress=False)
    assert second.loss_curve[0] == pytest.approx(first.loss, rel=1e-5)
    assert second.loss < first.loss


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_expand_keeps_the_frozen_components(kind: str) -> None:
    fishers = example_fishers(kind, "sparse")
    few = npeff.decompose(fishers, 3, **QUICK)
    for space in ("gram", "rows"):
        more = npeff.expand(few, fishers, 2, space=space, **QUICK)
        for j in range(3):
            np.testing.assert_allclose(np.abs(more.vector(j) @ few.vector(j)), 1, atol=1e-5)
        assert more.loss < few.loss
        assert more.loss == pytest.approx(dense_loss(more, fishers), rel=1e-3)
    kept = npeff.expand(few, fishers, 2, keep_coefficients=True, **QUICK)
    np.testing.assert_allclose(kept.coefficients[:, :3], few.coefficients, atol=1e-6)
    other = npeff.expand(few, example_fishers(kind, "sparse", seed=5), 1, **QUICK)
    assert other.n_components == 4


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_published_algorithm_runs_and_is_not_better(kind: str) -> None:
    fishers = example_fishers(kind)
    options = npeff.PublishedOptions(learning_rate=3e-3, g_only=20, joint=300)
    published = npeff.decompose(fishers, 5, algorithm="published", published=options, progress=False)
    assert published.loss == pytest.approx(dense_loss(published, fishers), rel=1e-3)
    streamed = npeff.decompose(
        fishers, 5, algorithm="published", published=options, space="streamed", memory="100MB", progress=False
    )
    assert streamed.provenance["course"]["space"] == "streamed"
    assert streamed.loss == pytest.approx(published.loss, rel=1e-4)
    assert npeff.decompose(fishers, 5, progress=False).loss <= published.loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components"),
        ({"n_components": 2.5}, "n_components"),
        ({"n_components": 10_000}, "n_components: expected at most"),
        ({"n_components": 3, "seed": -1}, "seed"),
        ({"n_components": 3, "algorithm": "magic"}, "algorithm"),
        ({"n_components": 3, "space": "outer"}, "space"),
        ({"n_components": 3, "orthogonality": -1.0}, "orthogonality"),
        ({"n_components": 3, "orthogonality": float("inf")}, "orthogonality"),
        ({"n_components": 3, "tolerance": float("nan")}, "tolerance"),
        ({"n_components": 3, "seed": 2**70}, "seed"),
        ({"n_components": 3, "min_nonzero_per_column": 0}, "min_nonzero_per_column"),
        ({"n_components": 3, "published": npeff.PublishedOptions()}, "published"),
        ({"n_components": 3, "callback": 3}, "callback"),
        ({"n_components": 3, "device": "meta"}, "device"),
        ({"n_components": 3, "block_weights": {"*": "a"}}, "block_weights"),
        ({"n_components": 3, "init": (-np.ones((40, 3)), np.ones((3, 30)))}, "init"),
        ({"n_components": 3, "normalize": "twice"}, "normalize"),
        ({"n_components": 3, "block_weights": "fair"}, "block_weights"),
        ({"n_components": 3, "init": (np.ones((2, 2)), np.ones((2, 2)))}, "init"),
        ({"n_components": 3, "init": 3}, "init: expected a pair"),
        ({"n_components": 3, "checkpoint": 3}, "checkpoint: expected a path"),
        ({"n_components": 3, "algorithm": "published", "init": (np.ones((40, 3)), np.ones((3, 30)))}, "init: the publ"),
        ({"n_components": 3, "algorithm": "published", "orthogonality": "hard"}, "orthogonality: the published"),
        ({"n_components": 3, "algorithm": "published", "checkpoint": "c"}, "checkpoint: the published"),
        ({"n_components": 3, "algorithm": "published", "space": "gram"}, "space: the published"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(npeff.ArgumentError, match=message):
        npeff.decompose(example_fishers(), progress=False, **options)


def test_a_checkpoint_belongs_to_what_was_given_beside_the_fishers(tmp_path) -> None:
    """Vectors to start from, or to keep, are no options; a search from others must not go on from its state."""
    fishers, state = example_fishers(), tmp_path / "state"
    rng = np.random.default_rng(0)
    one, other = ((rng.random((40, 3)), torch.randn(3, 30)) for _ in range(2))
    first = npeff.decompose(fishers, 3, init=one, checkpoint=state, **QUICK)
    again = npeff.decompose(fishers, 3, init=one, checkpoint=state, **QUICK)
    np.testing.assert_array_equal(again.coefficients, first.coefficients)
    for options in ({"init": other}, {}):
        with pytest.raises(npeff.ResumeError, match="init="):
            npeff.decompose(fishers, 3, checkpoint=state, **options, **QUICK)
    some, others = (npeff.decompose(part, 2, **QUICK) for part in (fishers[:20], fishers[20:]))
    state = tmp_path / "expanded"
    npeff.expand(some, fishers, 1, checkpoint=state, **QUICK)
    with pytest.raises(npeff.ResumeError, match="expanded"):
        npeff.expand(others, fishers, 1, checkpoint=state, **QUICK)
    with pytest.raises(npeff.ResumeError, match="expanded"):
        npeff.decompose(fishers, 3, checkpoint=state, **QUICK)


def test_bad_data_is_named() -> None:
    fishers = example_fishers()
    with pytest.raises(npeff.DataError, match="no examples"):
        npeff.decompose(fishers[[]], 1, progress=False)
    values = fishers.rows.values.copy()
    values[fishers.row_offsets[5]] = np.nan
    with pytest.raises(npeff.DataError, match="example 5"):
        npeff.decompose(replace(fishers, rows=DenseRows(values)), 2, progress=False)
    with pytest.raises(npeff.DataError, match="all 40 are zero"):
        npeff.decompose(replace(fishers, rows=DenseRows(np.zeros_like(values))), 2, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "n, m, seed", [(5, 1, 285), (1, 1, 285), (2, 1, 72901), (1, 2, 48106), (5, 2, 30), (12, 1, 36511)]
)
def test_more_components_than_directions_leave_a_true_loss(n: int, m: int, seed: int, dtype: str) -> None:
    """K is singular and the fit exact: duplicates cancel, and what rounding leaves of them must not be scaled up."""
    fishers = example_fishers(n=n, m=m, seed=seed)
    r = min(3, fishers.rows.n_rows)
    components = npeff.decompose(fishers, r, space="gram", dtype=dtype, n_init=1, n_replacements=2, progress=False)
    assert components.loss == pytest.approx(dense_loss(components, fishers), abs=2e-5)


@settings(max_examples=15, deadline=None)
@example(5, 1, 285, "low_rank")
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["low_rank", "diagonal"]))
def test_any_shape_descends(n: int, m: int, seed: int, kind: str) -> None:
    fishers = example_fishers(kind, n=n, m=m, seed=seed)
    if not fishers.norms.any():
        return
    r = min(3, fishers.rows.n_rows)
    components = npeff.decompose(fishers, r, n_init=1, n_replacements=2, progress=False)
    assert np.isfinite(components.vectors).all() and np.isfinite(components.coefficients).all()
    assert (np.diff(components.loss_curve) <= 0).all()
    assert components.loss <= 1 + 1e-6


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    npeff.decompose(example_fishers(), 2, **QUICK)
    assert torch.get_num_threads() == before


def test_published_that_diverges_says_so() -> None:
    with pytest.raises(npeff.ArgumentError, match="diverged"):
        npeff.decompose(
            example_fishers(),
            2,
            algorithm="published",
            published=npeff.PublishedOptions(learning_rate=1e4),
            progress=False,
        )


@pytest.mark.parametrize("space", ["gram", "rows"])
def test_hard_orthogonality_needs_room(space: str) -> None:
    with pytest.raises(npeff.ArgumentError, match="linearly independent"):
        npeff.decompose(example_fishers()[[0] * 10], 9, orthogonality="hard", space=space, **QUICK)


def test_few_examples_are_enough_for_a_new_component() -> None:
    """Those that are given need no rows of these examples."""
    fishers = example_fishers()
    components = npeff.decompose(fishers, 5, **QUICK)
    few = fishers[[0]]
    assert few.rows.n_rows < 5
    expanded = npeff.expand(components, few, 1, **QUICK)
    np.testing.assert_allclose(expanded.vectors[:5], components.vectors, atol=1e-6)
    assert expanded.encode(few).unexplained < components.encode(few).unexplained
    with pytest.raises(npeff.ArgumentError, match=f"n: expected at most the {few.rows.n_rows} rows of the 1 Fishers"):
        npeff.expand(components, few, few.rows.n_rows + 1, **QUICK)
    with pytest.raises(npeff.ArgumentError, match="min_nonzero_per_column cannot be given to expand"):
        npeff.expand(components, fishers, 1, min_nonzero_per_column=2, **QUICK)


def test_kept_coefficients_need_the_same_examples() -> None:
    fishers = example_fishers()
    components = npeff.decompose(fishers, 3, **QUICK)
    with pytest.raises(npeff.ArgumentError, match="keep_coefficients"):
        npeff.expand(components, fishers[::-1], 1, keep_coefficients=True, **QUICK)


def test_rows_of_any_size_get_unit_norm() -> None:
    """Norms from 1e-9 to 1e9 side by side, empty rows between them."""
    rng = np.random.default_rng(0)
    values = rng.random((60, 40)) * 10.0 ** rng.integers(-9, 10, (60, 1))
    values[::7] = 0
    rows = sparse(values.astype(np.float32))
    expected = np.square(values.astype(np.float32).astype(np.float64)).sum(1)
    np.testing.assert_allclose(rows.squared_norms(), expected, rtol=1e-12)
    scaled = scale(fishers_of(rows, np.arange(61), "diagonal"))
    dense = scaled.rows.dense(0, 60).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1)[expected > 0], 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_fishers_too_small_for_float32_count_as_zero(kind: str) -> None:
    """A network that is certain has rows of 1e-42: their digits are gone, and 1 / norm overflows."""
    fishers = example_fishers(kind)
    values = fishers.rows.values.copy()
    values[fishers.row_offsets[7] : fishers.row_offsets[8]] *= 1e-42 / np.abs(values).max()
    values[fishers.row_offsets[8] : fishers.row_offsets[9]] *= 1e-30
    components = npeff.decompose(replace(fishers, rows=DenseRows(values)), 4, **QUICK)
    assert not components.coefficients[7].any()
    assert components.coefficients[8].any() and np.isfinite(components.coefficients).all()


def held_by_decompose(rank: int, kind: str, memory: int) -> tuple[int, dict]:
    from npeff.fishers.rows import DenseRows, SparseRows
    from npeff.models.devices import Peak, settled_bytes
    from planted import fishers_of

    rng = np.random.default_rng(0)
    n, k, m = {"top-k": (2000, 1000, 40_000), "dense": (1200, 4000, 4000), "long": (40_000, 20, 500)}[kind]
    values = rng.standard_normal((n, k), np.float32)
    indices = (np.arange(k) * (m // k) + rng.integers(0, m // k, (n, k))).astype(np.int32)

    def made(n: int) -> npeff.Fishers:
        dense = kind != "top-k"
        sparse = SparseRows(np.arange(0, n * k + 1, k), indices[:n].reshape(-1), values[:n].reshape(-1), m)
        return fishers_of(DenseRows(values[:n]) if dense else sparse, np.arange(0, n + 1, 2))

    options = {"n_init": 1, "n_replacements": 1, "max_iterations": 3, "progress": False}
    space = "streamed" if kind == "long" else "auto"
    npeff.decompose(made(40), 8, space="rows", **options)  # the libraries' own memory is there before
    fishers = made(n)
    before = settled_bytes()
    with Peak() as peak:
        components = npeff.decompose(fishers, 8, space=space, memory=memory, **options)
    return peak.peak - before, components.provenance["course"]


@pytest.mark.parametrize(
    ("kind", "memory", "subspace"),
    [("top-k", 60_000_000, False), ("dense", 20_000_000, False), ("long", 350_000_000, True)],
)
def test_memory_is_a_ceiling(kind: str, memory: int, subspace: bool) -> None:
    from processes import run

    ((how, found),) = run(1, held_by_decompose, kind, memory)
    assert how == "returned", found
    held, course = found
    # 4 MB: freed pages that the allocator keeps
    assert held <= memory + (4 << 20), f"{held:,} bytes in the space {course['space']}"
    assert ("subspace" in course) == subspace  # a search without one is slow


def test_the_command_keeps_its_checkpoint_until_the_components_are_saved(tmp_path, monkeypatch) -> None:
    fishers, state, out = tmp_path / "f.h5", tmp_path / "c.search", tmp_path / "c.h5"
    example_fishers(n=40).save(fishers)
    command = ["decompose", str(fishers), "--n-components", "3", "--n-init", "1", "--n-replacements", "1", "--quiet"]
    command += ["--checkpoint", str(state), "--out", str(out)]

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(npeff.Components, "save", killed)
        assert run_command(command) != 0
    assert state.exists() and not out.exists()
    assert run_command(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "f.h5"]


def test_more_components_than_examples_give_a_warning(recwarn) -> None:
    fishers, _, _ = planted(6, 3, 30, noise=0.1, seed=0)
    few = {"n_init": 1, "n_replacements": 0, "max_iterations": 2, "progress": False}
    npeff.decompose(fishers, 6, **few)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"n_components: 7 components of 6 Fishers .* rows \(24\) give") as caught:
        npeff.decompose(fishers, 7, **few)
    assert caught[0].filename == __file__
