"""Which pixels put a digit where it is: parametric t-SNE, each coordinate explained by its row of W.

    python examples/linearize_tsne.py --out docs/images/parametric_tsne.png

The network embeds 1437 digits; of the 360 others the examples are explained. W·x + b is its embedding exactly, so
the pixels' contributions and the biases add up to each coordinate. Minutes on one core.
"""

from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure

import npeff
from npeff import demo
from parametric_tsne import ParametricTSNE  # beside this file

TRAINED_ON = 1437


@click.command(help="Embed digits with a network, explain the coordinates.")
@click.option("--out", type=click.Path(path_type=Path), default="parametric_tsne.png", show_default=True)
@click.option("--perplexity", default=30.0, show_default=True)
@click.option("--epochs", default=300, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, perplexity: float, epochs: int, seed: int) -> None:
    try:
        digits = demo.digits()
    except npeff.errors.NpeffError as error:
        raise click.ClickException(str(error)) from error
    train, unseen = digits.take(slice(TRAINED_ON)), digits.take(slice(TRAINED_ON, None))
    tsne = ParametricTSNE(perplexity=perplexity, epochs=epochs, batch_size=TRAINED_ON // 3, seed=seed)
    tell = lambda epoch, kl: epoch % 25 or print(f"epoch {epoch}: KL divergence {kl:.3f}")  # noqa: E731
    tsne.fit(train.inputs, after_epoch=tell)
    placed = tsne.transform(unseen.inputs)
    nearest = ((placed[:, None] - tsne.embedding_) ** 2).sum(-1).argsort(1)[:, :5]
    votes = [np.bincount(train.labels[row].numpy(), minlength=10).argmax() for row in nearest]
    print(f"five nearest neighbours name {np.mean(votes == unseen.labels.numpy()):.1%} of {len(placed)} unseen digits")

    # One unseen digit of each of five classes: the one nearest to its class's middle.
    chosen = []
    for digit in (0, 1, 4, 6, 7):
        here = np.flatnonzero(unseen.labels.numpy() == digit)
        middle = np.median(tsne.embedding_[train.labels.numpy() == digit], axis=0)
        chosen.append(here[((placed[here] - middle) ** 2).sum(1).argmin()])
    linear = tsne.explain(unseen.inputs[chosen])
    print(f"W·x + b is the embedding but for {linear.residual():.1e} of it")
    picture(tsne, train.labels, placed, unseen, chosen, linear.contributions(), linear.b).savefig(out)
    print(f"wrote {out}")


def picture(tsne, labels, placed, unseen, chosen, contributions, b) -> Figure:
    figure = Figure((9.6, 4.6), layout="constrained", dpi=80)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots()
    Y = tsne.embedding_
    axes.scatter(Y[:, 0], Y[:, 1], c=labels, cmap="tab10", s=4, linewidths=0)
    for digit in range(10):
        axes.text(*np.median(Y[labels == digit], axis=0), str(digit), fontsize=13, weight="bold", ha="center")
    axes.plot(placed[chosen, 0], placed[chosen, 1], "o", mfc="none", mec="black", markersize=9)
    axes.set_xlabel("coordinate 1")
    axes.set_ylabel("coordinate 2")
    grid = right.subplots(len(chosen), 3)
    limit = float(contributions.abs().max())
    for row, i, parts, biases in zip(grid, chosen, contributions, b, strict=True):
        row[0].imshow(unseen.inputs[i, 0], cmap="gray_r")
        for k in (0, 1):
            row[k + 1].imshow(parts[k, 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
            row[k + 1].set_xlabel(f"{parts[k].sum():+.0f} pixels {biases[k]:+.0f} biases", fontsize=7)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(grid[0], ("unseen digit", "coordinate 1", "coordinate 2"), strict=True):
        axes.set_title(title, fontsize=9)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
