"""What a network that sorts clothes responds to: Fashion-MNIST, 5000 examples, 64 components, one page.

    apt-get install dataset-fashion-mnist        # 30 MB, on Debian and Ubuntu; or --root with the four files
    python examples/fashion_mnist.py --out fashion

Takes a few minutes on two cores; where others use them too, OMP_NUM_THREADS=1 is much faster. Interrupted
while computing Fishers, it goes on where it was.
"""

from pathlib import Path

import click
import torch

import fashion_data
import npeff
from npeff import demo


@click.command(help="Train, compute Fishers, decompose, write a page: Fashion-MNIST.")
@click.option("--out", type=click.Path(path_type=Path), default="fashion", show_default=True, help="Folder.")
@click.option("--root", type=click.Path(path_type=Path), default=fashion_data.FASHION_MNIST, show_default=True)
@click.option("--examples", default=5000, show_default=True, help="Of the test images, which training has not seen.")
@click.option("--components", "n_components", default=64, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, root: Path, examples: int, n_components: int, epochs: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    try:
        train, test = (fashion_data.fashion_mnist(split, root=root) for split in ("train", "test"))
    except npeff.errors.NpeffError as error:
        raise click.ClickException(str(error)) from error

    torch.manual_seed(seed)
    model = fashion_data.fashion_cnn()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    weights = out / f"model-{epochs}-{seed}.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        model.eval()
    else:
        tell = lambda epoch, loss: print(f"epoch {epoch}: loss {loss:.3f}")  # noqa: E731
        demo.train(model, train, epochs=epochs, seed=seed, after_epoch=tell)
        torch.save(model.state_dict(), weights)
    print(f"accuracy on the test images: {demo.accuracy(model, test):.1%}")

    # The Fisher of every example: its most energetic directions, of which the 8192 largest values.
    data = test.first(examples)
    fishers = npeff.compute_fishers(
        model, data, energy=0.9, compress=npeff.TopK(8192), seed=seed, out=out / "fishers.h5"
    )
    print(f"{len(fishers):,} Fishers, {fishers.rows.n_rows:,} rows")

    # Components: directions that many examples share.
    components = npeff.decompose(fishers, n_components, seed=seed)
    components.save(out / "components.h5")
    print(f"relative loss {components.loss:.4f} after {len(components.loss_curve)} iterations")

    page = npeff.report(components, data, out / "report", title="How a small network sorts clothes")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
