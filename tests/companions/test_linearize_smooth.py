"""What is not piecewise linear: refused by name, or held and said so; exact at the point either way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linearize_cases import Call
from npeff.companions.linearize import linearize
from npeff.errors import ModelError


class First(nn.Module):
    """The first output of a module that has several."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        return self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]


def sequences():
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def images():
    return torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


SMOOTH = {
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True)), sequences, "attention pattern"),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences, "standard deviation"),
    "lstm": (lambda: First(nn.LSTM(8, 6, batch_first=True)), sequences, "gate"),
    "gru": (lambda: First(nn.GRU(8, 6, batch_first=True)), sequences, "gate"),
    "layer norm": (lambda: nn.LayerNorm(8), sequences, "standard deviation"),
    "group norm": (lambda: nn.GroupNorm(2, 4), images, "standard deviation"),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), images, "standard deviation"),
    "local response": (lambda: nn.LocalResponseNorm(2), images, "value"),
    "rms by hand": (lambda: Call(lambda x: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt()), sequences, "value"),
    "unit length": (lambda: Call(lambda x: F.normalize(x, dim=1)), images, "value"),
    "gelu": (nn.GELU, images, "gate"),
    "tanh gelu": (lambda: nn.GELU("tanh"), images, "gate"),
    "silu": (nn.SiLU, images, "gate"),
    "mish": (nn.Mish, images, "gate"),
    "hardswish": (nn.Hardswish, images, "gate"),
    "tanh": (nn.Tanh, images, "gate"),
    "elu": (nn.ELU, images, "gate"),
    "selu": (nn.SELU, images, "gate"),
    "celu": (nn.CELU, images, "gate"),
    "softsign": (nn.Softsign, images, "denominator"),
    "glu": (lambda: nn.GLU(1), images, "gate"),
    "log softmax": (lambda: nn.LogSoftmax(1), images, "normaliser"),
    "squeeze and excite": (lambda: Call(lambda x: x * x.mean((2, 3), True).sigmoid()), images, "value"),
    "square": (lambda: Call(lambda x: x * x.relu()), images, "each factor in turn, half each,"),
    "a number read out": (lambda: Call(lambda x: x * float(x.sum())), images, "number"),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_held_where_it_is_asked_for(name):
    torch.manual_seed(0)
    make, inputs, held = SMOOTH[name]
    model, x = make().double().eval(), inputs()
    with pytest.raises(ModelError, match=r"not piecewise linear, so no exact linear map exists.*smooth='freeze'"):
        linearize(model, x)
    linear = linearize(model, x, smooth="freeze")
    assert not linear.exact and held in {item.held for item in linear.frozen}
    assert f"{len(linear.frozen)} operations held" in repr(linear)
    with torch.no_grad():
        truth = model(x).reshape(2, -1)
    assert torch.allclose(linear.output, truth, atol=1e-13) and linear.residual() <= 1e-13
    biases = sum(linear.bias_contributions().values(), torch.zeros_like(linear.b))
    assert torch.allclose(biases, linear.b, atol=1e-13)


def test_modules_are_named():
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("norm", nn.LayerNorm(4))
    model.add_module("act", nn.GELU())
    with pytest.raises(ModelError) as caught:
        linearize(model, torch.rand(2, 4))
    assert "norm (LayerNorm): native_layer_norm, standard deviation held; act (GELU): gelu, gate held" in str(
        caught.value
    )
    assert linearize(model[:1], torch.rand(2, 4)).exact
    assert linearize(nn.Sequential(*model, nn.Linear(4, 2)), torch.rand(2, 4), at="2").exact


def test_the_mean_of_a_normalisation_stays_linear():
    """A shift of all entries changes nothing, before and after."""
    x = sequences()
    linear = linearize(nn.LayerNorm(8).double(), x, smooth="freeze")
    assert float(linear.matvec(torch.ones_like(x)).abs().max()) <= 1e-14
    groups = linearize(nn.GroupNorm(2, 4).double(), images(), smooth="freeze")
    assert float(groups.matvec(torch.ones_like(images())).abs().max()) <= 1e-14


def test_the_pattern_of_attention_is_held():
    """With the pattern held, the map is what the values give: independent of queries and keys but for the pattern."""
    x = sequences()
    weights = [torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def attention(x, given=None):
        q, k, v = (x @ w for w in weights)
        if given is None:
            return F.scaled_dot_product_attention(q, k, v)
        return given @ v

    q, k, _ = (x @ w for w in weights)
    pattern = (q @ k.mT / 8**0.5).softmax(-1)
    linear = linearize(Call(attention), x, smooth="freeze")
    exact = linearize(Call(lambda x: attention(x, pattern)), x)
    assert torch.allclose(linear.W, exact.W, atol=1e-13)
    assert [item.held for item in linear.frozen] == ["attention pattern"]


def test_only_what_leads_to_the_output_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.GELU(), nn.ReLU()

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    assert linearize(Net(), torch.rand(2, 4) - 0.5).exact


def test_a_gate_at_zero_is_its_limit():
    linear = linearize(nn.GELU(), torch.zeros(1, 3, dtype=torch.float64), smooth="freeze")
    assert torch.allclose(linear.W[0], torch.eye(3, dtype=torch.float64) / 2, atol=1e-4)


def test_outputs_that_are_held_altogether():
    with pytest.raises(ModelError, match=r"does not depend on the input once these are held: .*final sigmoid or softm"):
        linearize(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), torch.rand(2, 3), smooth="freeze")


@pytest.mark.slow
def test_transformers_of_the_library():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **small))
    with pytest.raises(ModelError, match=r"layernorm_before \(LayerNorm\).*attention pattern held.*gate held"):
        linearize(vit.double().eval(), torch.randn(2, 3, 16, 16).double())
    assert linearize(vit, torch.randn(2, 3, 16, 16).double(), smooth="freeze").residual() <= 1e-13
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **small)).double().eval()
    x = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    assert linearize(bert, x, at="bert.embeddings", smooth="freeze").residual() <= 1e-13
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **small)).double().eval()
    linear = linearize(llama, torch.randint(50, (2, 5)), [200, 201], "model.embed_tokens", smooth="freeze")
    # its normalisation computes in single precision, whatever the weights are
    assert linear.residual() <= 1e-6 and linear.W.shape == (2, 2, 5, 16)
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    )
    assert linearize(resnet.double().eval(), torch.randn(2, 3, 32, 32).double()).residual() <= 1e-13
