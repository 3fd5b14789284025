"""The pixels behind components: what in their top examples makes the outputs change along each direction.

    npeff demo --out npeff-demo --no-open
    python examples/linearize_components.py --demo npeff-demo --out components_pixels.png

Takes the digits network and the components that ``npeff demo`` left.
"""

from pathlib import Path

import click
import torch

import npeff
from npeff import datasets, models
from npeff.companions.linearize import attribute_component, save_figure
from npeff.companions.linearize.pictures import contribution_grid


@click.command(help="Attribute components' effects to the pixels of their top examples.")
@click.option("--demo", type=click.Path(path_type=Path), default="npeff-demo", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="components_pixels.png", show_default=True)
@click.option("--components", "n_components", default=4, show_default=True, help="The first so many.")
@click.option("--examples", default=3, show_default=True)
def main(demo: Path, out: Path, n_components: int, examples: int) -> None:
    try:
        components, data = npeff.load(demo / "components.h5"), datasets.digits()
    except npeff.errors.NpeffError as error:
        raise click.ClickException(f"{error}; run npeff demo --out {demo} first") from error
    model = models.digits_cnn()
    model.load_state_dict(torch.load(demo / "model.pt", weights_only=True))
    inputs, maps, rows = [], [], []
    for j in range(n_components):
        x = data.inputs[components.ids[components.top_examples(j, examples)]]
        found = attribute_component(model.eval(), components, j, x)
        print(
            f"component {j}: moved by {found.magnitude:.3g}; left over {found.residual():.1e}; "
            f"pixels {float(found.maps.sum() / found.change.sum()):.0%} of it"
        )
        inputs.append(x)
        maps.append(found.maps)
        rows += [f"component {j}"] + [""] * (examples - 1)
    figure = contribution_grid(torch.cat(inputs), [torch.cat(maps)], ["change"], rows)
    print(f"wrote {save_figure(figure, out)}")


if __name__ == "__main__":
    main()
