"""Makes the kept files. Run once per released format version, never over an older one.

python tests/formats/make_formats.py v1
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from npeff.fishers.shards import FisherWriter  # noqa: E402
from stored_samples import (  # noqa: E402
    blocks_of,
    components_of,
    equal_entries,
    fishers_of,
    header_of,
    placed_components,
    placed_fishers,
    write_by_hand,
)

PUBLISHED = {
    "low_rank_fishers": (2, 2, 2, 2),
    "low_rank_fishers:first_generation": (3, 3, 3, 3),
    "low_rank_fishers_variable": (2, 1, 3, 1),
    "diagonal_fishers": (1, 1, 1),
    "diagonal_fishers:predicted": (1, 1, 1),
    "low_rank_decomposition": (),
    "diagonal_decomposition": (),
    "diagonal_decomposition:array": (),
    "diagonal_decomposition:sparse": (),
}


def main(version: str) -> None:
    folder = HERE / version
    folder.mkdir()
    if not (HERE / "v1").exists():  # only unfinished work has changed since
        for kind in ("low_rank", "diagonal"):
            for sparse in (True, False):
                fishers_of(kind, sparse=sparse).save(folder / f"{kind}_fishers_{'sparse' if sparse else 'dense'}.h5")
            components_of(kind).save(folder / f"{kind}_components.h5")
    placed_fishers().save(folder / "placed_fishers.h5")
    placed_components().save(folder / "placed_components.h5")
    fishers = fishers_of()
    with FisherWriter(folder / "unfinished.h5", header_of(fishers), shard_bytes=1) as writer:
        for index, block in enumerate(blocks_of(fishers, 2)[:2]):
            writer.append(block, f"batch {index}")
    published = HERE / "published"
    if not published.exists():
        published.mkdir()
        for layout, ranks in PUBLISHED.items():
            kind = "diagonal" if layout.startswith("diagonal") else "low_rank"
            sample = equal_entries(ranks, kind) if ranks else None
            write_by_hand(published / f"{layout.replace(':', '.')}.h5", layout, sample)


if __name__ == "__main__":
    main(sys.argv[1])
