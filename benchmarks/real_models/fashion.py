"""All 60 000 training images of Fashion-MNIST through a small CNN, in a process that may not hold more than 4 GB.

The limit is the system's (``RLIMIT_DATA``: memory that the process allocates, of which mapped files are no part), set
before anything is computed: what exceeds it fails. Three rows per image, sketched to 4 096 numbers each, make a file of
3 GB, which the decomposition streams from disk under a ceiling of its own. Writes ``results/real_fashion.md``.

    apt-get install dataset-fashion-mnist
    python benchmarks/real_models/fashion.py
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Measured, arguments, decomposed, energy_kept, fishers_of, summary
from torch import nn

import npeff
from npeff import demo

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import fashion_data


def network(args: Any, data: demo.Images) -> nn.Module:
    torch.manual_seed(0)
    model, path = fashion_data.fashion_cnn(), args.work / "fashion.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    demo.train(model, data, epochs=2)
    torch.save(model.state_dict(), path)
    return model


def main() -> None:
    args = arguments(
        __doc__, examples=60_000, held_out=1000, sketch=4096, components=32, rank=3, megabytes=2000, recovered=3
    )
    ceiling = 4_000_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))
    train, test = fashion_data.fashion_mnist(), fashion_data.fashion_mnist("test").first(args.held_out)
    model, data = network(args, train), train.first(args.examples)
    name = f"fashion_{args.examples}_{args.sketch}"
    measured = Measured(args.work / f"{name}.json")
    options: dict[str, Any] = {"model": model, "compress": npeff.Sketch(args.sketch), "rank": args.rank}
    memory = f"{args.megabytes}MB"
    fishers = fishers_of(measured, args.work / f"{name}.h5", data=data, **options)
    held = fishers_of(measured, args.work / f"{name}_held_out.h5", data=test, **options)
    path = args.work / f"{name}_components.h5"
    found = decomposed(measured, fishers, path, args, memory=memory)
    shown = np.linspace(0, args.components - 1, 10).astype(int).tolist()
    first = measured.stage("recover", lambda: found[0].recover(model, data, shown[: args.recovered], progress=False))
    right = f"{demo.accuracy(model, test):.1%} right on {len(held):,} test images"
    what = [
        ("model", f"a CNN of two convolutions and two dense layers, two epochs, {right}"),
        ("data", f"the first {args.examples:,} training images of Fashion-MNIST"),
        ("factor", f"{args.rank} of 9 rows: {energy_kept(fishers[: min(2000, len(fishers))])}"),
        ("kept", f"a sketch of {args.sketch:,} numbers per row"),
        ("memory allowed", f"{ceiling / 1e9:.0f} GB for the process (RLIMIT_DATA), {memory} for the decomposition"),
    ]
    title = f"Fashion-MNIST, {args.examples:,} examples under 4 GB"
    lines = summary(title, what, measured, fishers, args.work / f"{name}.h5", found, held)
    lines.insert(-1, f"| vectors of {args.recovered} components recovered | {measured.said('recover')} |")
    lines += ["## Some components", "", "| component | predicted classes of its coefficients | where its energy sits |"]
    lines += ["|---|---|---|"]
    for j in shown:
        classes = first.class_distribution(j)
        most = ", ".join(f"{train.class_names[c]} {classes[c]:.0%}" for c in np.argsort(-classes)[:3])
        where = "not recovered"
        if j in shown[: args.recovered]:
            blocks = sorted(first.block_energy(j).items(), key=lambda item: -item[1])[:2]
            where = ", ".join(f"{block} {share:.0%}" for block, share in blocks)
        lines.append(f"| {j} | {most} | {where} |")
    (args.out / "real_fashion.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
