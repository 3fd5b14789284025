"""Inputs as pictures: images of every form and scale, strips of values, data URIs."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from npeff.batches.reading import looks_like_image
from npeff.reports.figures import Scale, data_uri, strip
from npeff.reports.summary import summarise
from report_cases import batches, components_of, page_of


def images_of(page):
    """All pictures on the components' pages, decoded."""
    uris = [img["src"] for img in page.all("img") if img["alt"]]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))) for uri in uris]


SHAPES = [(1, 8, 8), (8, 8), (3, 9, 11), (9, 11, 3), (1, 28, 28), (3, 96, 96), (3, 300, 200)]
KINDS = [(kind, shape) for kind in ("standardised", "bytes", "bool") for shape in ((8, 8), (3, 9, 11), (3, 96, 96))]


@pytest.mark.parametrize(("kind", "shape"), [*(("unit", shape) for shape in SHAPES), *KINDS])
def test_images(tmp_path, shape, kind):
    n = 12
    components = components_of(n=n, r=2)
    raw = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    made = {"unit": raw, "standardised": (raw - 0.45) / 0.22, "bytes": (raw * 255).byte(), "bool": raw > 0.5}
    page = page_of(tmp_path, components, batches(made[kind], components.labels), k=4)
    drawn = images_of(page)
    assert len(drawn) == sum(min(4 + 2 + 2, int((components.coefficients[:, j] > 0).sum())) for j in range(2))
    first = summarise(components, 4)[0].top[0]
    expected = made["bool"].float() if kind == "bool" else raw
    expected = expected[first.position].numpy()
    expected = np.moveaxis(expected, 0, -1).squeeze() if expected.ndim == 3 and shape[0] in (1, 3) else expected
    assert drawn[0].ndim == expected.ndim
    if max(shape) < 64:
        assert drawn[0].shape == expected.shape
        tolerance = 8 if kind == "standardised" else 1
        np.testing.assert_allclose(drawn[0].astype(float), expected * 255, atol=tolerance)
    else:
        assert max(drawn[0].shape) <= 160
        ratio = (shape[1] / shape[2]) / (drawn[0].shape[0] / drawn[0].shape[1])
        assert 0.95 < ratio < 1.05


def test_scale_of_difficult_images():
    sparse = np.zeros((28, 28), np.float32)
    sparse[3, 3] = -7.0
    scale = Scale.of([sparse])
    assert scale.bytes(sparse)[3, 3] == 0 and scale.bytes(sparse)[0, 0] == 255
    constant = np.full((4, 4), 3.0)
    assert np.isfinite(Scale.of([constant]).bytes(constant)).all()
    broken = np.array([[np.nan, np.inf], [-np.inf, 1.0]])
    assert Scale.of([broken]).bytes(broken).tolist() == [[0, 255], [0, 255]]
    spread = np.random.default_rng(0).normal(size=(100, 100))
    spread[0, 0] = 1e6
    assert Scale.of([spread]).bytes(spread).std() > 30, "one outlier does not grey out the rest"


@pytest.mark.parametrize(
    ("shape", "image"),
    [((28, 28), True), ((1, 28, 28), True), ((3, 32, 32), True), ((32, 32, 3), True), ((784,), False),
     ((2, 500), False), ((5, 128), False), ((2, 28, 28), False), ((1, 1, 1), False), ((3, 3, 2), False)],
)  # fmt: skip
def test_looks_like_image(shape, image):
    assert looks_like_image(shape) is image


def test_values(tmp_path):
    components = components_of(n=12, r=2)
    inputs = torch.randn(12, 13)
    page = page_of(tmp_path, components, batches(inputs, components.labels))
    assert all(picture.shape == (1, 13, 3) for picture in images_of(page))
    first = summarise(components, 4)[0].top[0].position
    assert f"values {inputs[first][0]:.3g}, {inputs[first][1]:.3g}" in page.html
    sequence = page_of(tmp_path, components, batches(torch.randn(12, 5, 300), components.labels))
    assert images_of(sequence)[0].shape == (5, 256, 3)


def test_strip_colours():
    red, white, blue = strip(np.array([1.0, 0.0, -1.0]), 1.0)[0].astype(int)
    assert red[0] > red[2] and blue[2] > blue[0] and white.min() > 240


def test_data_uri_of_photographs_is_small():
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
    assert len(data_uri(noise)) < 20_000
