"""The pixels behind components, on their pages of the report.

    npeff demo --out npeff-demo --no-open
    python examples/linearize_components.py --demo npeff-demo --out components_pixels.html

Takes the digits network and the components that ``npeff demo`` left. What in a component's top examples makes the
outputs change along its direction is drawn over them; the maps and the biases sum to the change exactly.
"""

from pathlib import Path

import click
import torch

import npeff
from npeff.companions.linearize import attribute_component, attribute_top_examples
from npeff.demo import digits, digits_cnn


@click.command(help="Attribute components' effects to the pixels of their top examples.")
@click.option("--demo", type=click.Path(path_type=Path), default="npeff-demo", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="components_pixels.html", show_default=True)
@click.option("--examples", default=6, show_default=True, help="Of each component.")
def main(demo: Path, out: Path, examples: int) -> None:
    try:
        components, data = npeff.load(demo / "components.h5"), digits()
    except npeff.errors.NpeffError as error:
        raise click.ClickException(f"{error}; run npeff demo --out {demo} first") from error
    model = digits_cnn()
    model.load_state_dict(torch.load(demo / "model.pt", weights_only=True))
    model.eval()
    largest = components.coefficients.sum(0).argsort()[::-1][:5].tolist()
    for j in largest:
        found = attribute_component(
            model, components, j, data.inputs[components.ids[components.top_examples(j, examples)]]
        )
        print(
            f"component {j}: moved by {found.magnitude:.3g}; left over {found.residual():.1e}; "
            f"pixels {float(found.maps.sum() / found.change.sum()):.0%} of it"
        )
    maps = attribute_top_examples(model, components, data, k=examples)
    npeff.report(components, data, out, class_names=[str(digit) for digit in range(10)], attributions=maps)
    print(f"wrote {out}: {len(maps)} examples with their pixels")


if __name__ == "__main__":
    main()
