"""Per-example gradients of convolution kernels against autograd, one example and one column at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

import npeff
from npeff import kernels
from npeff.errors import ArgumentError

CASES = {
    "first layer": dict(channels=(1, 16), output=(28, 28), kernel=(5, 5), columns=9),
    "pointwise": dict(channels=(8, 5), output=(3, 3), kernel=(1, 1)),
    "strided": dict(channels=(6, 10), output=(7, 5), kernel=(3, 3), stride=(2, 3)),
    "dilated, grouped": dict(channels=(6, 9), output=(7, 5), kernel=(2, 4), stride=(1, 2), dilation=(2, 1), groups=3),
    "depthwise": dict(channels=(4, 4), output=(9, 9), kernel=(3, 3), groups=4, columns=2),
    "long row": dict(channels=(3, 5), output=(1, 30), kernel=(1, 16), turns=2),
    "one place": dict(channels=(2, 3), output=(1, 1), kernel=(3, 2), columns=1),
    "larger than the cache": dict(channels=(2, 64), output=(60, 120), kernel=(3, 3), columns=9, examples=1),
}


def sample(channels, output, kernel, stride=(1, 1), dilation=(1, 1), groups=1, turns=1, columns=3, examples=2):
    generator = torch.Generator().manual_seed(0)
    size = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(output, stride, kernel, dilation, strict=True)]
    n = examples * turns
    inputs = torch.randn(n, channels[0], size[0] + 1, size[1] + 2, generator=generator)
    delta = [torch.randn(n, channels[1], *output, generator=generator) for _ in range(columns)]
    return inputs, delta, dict(kernel=kernel, stride=stride, dilation=dilation, groups=groups, turns=turns)


def oracle(inputs, delta, kernel, stride, dilation, groups, turns):
    """``(b, R, C, I/groups, *kernel)`` float64."""
    shape = (delta[0].shape[1], inputs.shape[1] // groups, *kernel)
    G = torch.zeros(len(inputs) // turns, len(delta), *shape, dtype=torch.float64)
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for i, r in itertools.product(range(len(inputs)), range(len(delta))):
        out = functional.conv2d(inputs[i : i + 1].double(), weight, stride=stride, dilation=dilation, groups=groups)
        column = delta[r][i].double()
        loss = (out[0, :, : column.shape[1], : column.shape[2]] * column).sum()
        G[i // turns, r] += torch.autograd.grad(loss, weight)[0]
    return G


@pytest.fixture(params=[*kernels.available()])
def implementation(request):
    kernels.use(request.param)
    yield request.param
    kernels.use(None)


@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name, implementation) -> None:
    inputs, delta, geometry = sample(**CASES[name])
    exact = oracle(inputs, delta, **geometry)
    found = kernels.convolution_gradients(inputs, delta, **geometry)
    # float32 sums of thousands of products: rounding grows with the root of their number
    assert found.shape == exact.shape and (found - exact).norm() <= 1e-5 * exact.norm()
    squares = kernels.convolution_gradients(inputs, delta, squared=True, **geometry)
    assert (squares - exact.square().sum(1)).norm() <= 1e-5 * exact.square().sum(1).norm()


def test_some_channels(implementation) -> None:
    inputs, delta, geometry = sample(**CASES["dilated, grouped"])
    every = kernels.convolution_gradients(inputs, delta, **geometry)
    some = kernels.convolution_gradients(inputs, delta, channels=(1, 3), **geometry)
    torch.testing.assert_close(some, every.unflatten(2, (3, 3))[:, :, :, 1:3].flatten(2, 3), rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    inputs, delta, geometry = sample(**{**CASES["strided"], "examples": 7})
    whole = kernels.convolution_gradients(inputs, delta, **geometry)
    kernels.set_num_threads(3)
    try:
        assert torch.equal(kernels.convolution_gradients(inputs, delta, **geometry), whole)
    finally:
        kernels.set_num_threads(None)
    one = kernels.convolution_gradients(inputs[4:5], [column[4:5] for column in delta], **geometry)
    assert torch.equal(one[0], whole[4])


def test_kinds_and_precision() -> None:
    inputs, delta, geometry = sample(**CASES["strided"])
    found = kernels.convolution_gradients(inputs.numpy(), [column.numpy() for column in delta], **geometry)
    assert isinstance(found, np.ndarray)
    torch.testing.assert_close(
        torch.from_numpy(found), kernels.convolution_gradients(inputs, delta, **geometry), rtol=0, atol=0
    )
    wide = kernels.convolution_gradients(inputs.double(), [column.double() for column in delta], **geometry)
    assert (wide - oracle(inputs, delta, **geometry)).norm() <= 1e-13 * wide.norm()
    turned = inputs.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.convolution_gradients(turned, delta, **geometry), torch.from_numpy(found))


def test_into_given_memory(implementation) -> None:
    inputs, delta, geometry = sample(**CASES["strided"])
    for squared in (False, True):
        fresh = kernels.convolution_gradients(inputs, delta, squared=squared, **geometry)
        out = torch.full_like(fresh, 7.0)
        assert kernels.convolution_gradients(inputs, delta, squared=squared, out=out, **geometry) is out
        torch.testing.assert_close(out, fresh, rtol=0, atol=0)
        with pytest.raises(npeff.ArgumentError, match=r"^out"):
            kernels.convolution_gradients(inputs, delta, squared=squared, out=out[:1], **geometry)
    if implementation != "reference":
        with pytest.raises(npeff.ArgumentError, match=r"^out"):
            turned = torch.empty(fresh.shape[::-1]).permute(*reversed(range(fresh.dim())))
            kernels.convolution_gradients(inputs, delta, squared=True, out=turned, **geometry)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(kernel=(0, 3)), "kernel"),
        (dict(kernel=(30, 3)), "inputs"),
        (dict(stride=(2**40, 1)), "stride"),
        (dict(dilation=(-1, 1)), "dilation"),
        (dict(groups=4), "groups"),
        (dict(turns=3), "turns"),
        (dict(channels=(3, 3)), "channels"),
        (dict(channels=(0, 99)), "channels"),
    ],
)
def test_bad_numbers_are_named(change, named) -> None:
    inputs, delta, geometry = sample(**CASES["strided"])
    with pytest.raises(npeff.ArgumentError, match=f"^{named}"):
        kernels.convolution_gradients(inputs, delta, **{**geometry, **change})


def test_bad_arrays_are_named() -> None:
    inputs, delta, geometry = sample(**CASES["strided"])
    for bad, columns, named in (
        (inputs[0], delta, "inputs"),
        (inputs.half(), delta, "inputs"),
        (inputs, [], "delta"),
        (inputs, [delta[0], delta[1][:1]], "delta"),
        (inputs, [column.double() for column in delta], "delta"),
        (inputs, [column[:1] for column in delta], "delta"),
        (inputs[:, :, :4], delta, "inputs"),
    ):
        with pytest.raises(npeff.ArgumentError, match=f"^{named}"):
            kernels.convolution_gradients(bad, columns, **geometry)


@pytest.mark.parametrize(
    ("b", "t", "slots", "r", "n", "k"),
    [(2, 6, 3, 1, 70, 40), (2, 5, 2, 2, 7, 21), (3, 1, 1, 9, 33, 5), (1, 40, 2, 3, 64, 130), (2, 3, 1, 2, 0, 4)],
)
def test_inner_products_of_outer_products(
    implementation: str, b: int, t: int, slots: int, r: int, n: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(t)
    delta, inputs = torch.randn(b, t, slots * r, n, generator=generator), torch.randn(b, t, k, generator=generator)
    delta[0, t // 2 + 1 :, :r] = 0.0
    formed = torch.einsum("btcn,btk->bcnk", delta.double(), inputs.double()).flatten(2).view(b * slots, r, -1)
    gram, size = kernels.outer_gram(delta, inputs, slots)
    expected = formed @ formed.mT
    torch.testing.assert_close(gram.double(), expected, rtol=1e-6, atol=1e-6 * max(1.0, float(expected.abs().max())))
    assert size.shape == (b * slots,)
    assert (size * (1 + 1e-6) >= gram.diagonal(dim1=1, dim2=2).sum(dim=1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_shows_behind_a_place(implementation: str, bad: float) -> None:
    """As in the gradients themselves, where 0 · ∞ is NaN."""
    delta, inputs = torch.ones(2, 4, 2, 5), torch.ones(2, 4, 6)
    delta[:, 2:], inputs[0, 3, 0] = 0.0, bad
    gram, _ = kernels.outer_gram(delta, inputs)
    assert gram[0].isnan().all() and gram[1].isfinite().all()


def test_inner_products_refuse_what_does_not_fit() -> None:
    delta, inputs = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6)
    for change in ({"n_slots": 3}, {"inputs": inputs[:1]}, {"inputs": inputs.double()}, {"delta": delta[0]}):
        with pytest.raises(ArgumentError, match=next(iter(change))):
            kernels.outer_gram(**{"delta": delta, "inputs": inputs, "n_slots": 2, **change})
