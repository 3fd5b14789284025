"""Write pages in which people read components; collages and LaTeX documents; extras that other commands wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.models.devices import parse_bytes
from npeff.perturbation.options import among
from npeff.reports.data import ReportOptions, collect_report_data
from npeff.reports.evidence import EffectSummary, InfluenceSummary, TraceSummary, TrustSummary
from npeff.reports.export import collage, latex
from npeff.reports.extras import describe_extras, load_extras, save_extras
from npeff.reports.html import write_report
from npeff.reports.layout import Heads
from npeff.reports.writer import ReportWriter, check_page, refuse_foreign
from npeff.storage.files import path_of

FILE_SUFFIXES = (
    *(
        ".csv",
        ".gguf",
        ".h5",
        ".hdf5",
        ".jpg",
        ".json",
        ".jsonl",
        ".md",
        ".npy",
        ".npz",
        ".parquet",
        ".pdf",
        ".png",
        ".pt",
    ),
    *(".pth", ".py", ".safetensors", ".svg", ".tex", ".txt", ".xhtml", ".xml", ".yaml", ".zip"),
)
"""What names of files end in: a folder of such a name is likely a mistake."""
FILE_LIMIT = 24_000_000
FOLDER_LIMIT = 2_000_000_000


def report(
    components: Components,
    data: Iterable[Any] | None = None,
    out: str | Path = "report/",
    *,
    class_names: Sequence[str] | None = None,
    k: int = 16,
    title: str | None = None,
    tokenizer: Any = None,
    strategies: Strategy | int | None = None,
    effects: Any = None,
    traces: Any = None,
    trust: Any = None,
    attributions: Any = None,
    influences: Any = None,
    influence_data: Iterable[Any] | None = None,
    heads: Heads = None,
    size_limit: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write pages that show what each component responds to: one HTML file, or a folder.

    An overview with a map and a table; a page per component, per example, and per node of the tree of strategies.
    Opened from disk, without a server or a network. A folder loads what is looked at; a file holds what its size limit
    allows, and says what it does not.

    Args:
        components: A decomposition.
        data: The data given to ``compute_fishers``, in the same order; iterated once. The order is checked by the
            labels alone: another order (a loader that shuffles) cannot be noticed within a class, nor in data without
            labels, and the pages would show the wrong examples. The overview says what was checked.
            Inputs that look like images ``(C, H, W)`` or ``(H, W)``, C in {1, 3}, are drawn;
            strings, dicts with ``"text"``, and ``"input_ids"`` with a ``tokenizer``, are printed; other
            tensors become strips of colours. None: numbers only.
        out: A file ending in ``.html``, or a folder for ``index.html`` and its parts. An earlier report there is
            replaced, another page is not.
        class_names: One name per class, in the order of the model's outputs; by default ``data.class_names`` or
            ``data.dataset.classes`` where they exist.
        k: Top examples per component; half as many from the middle, and half as many at random.
        title: Heading of the overview.
        tokenizer: Anything with ``decode(ids)``, for data that holds only token ids.
        strategies: How many strategies to colour, or what ``components.strategies()`` gave; by default the number
            that ``trust`` speaks for, else the one with the best silhouette.
        effects: What moving along components does: what :func:`npeff.perturb` or ``npeff.perturb_all`` returned, or
            per component a mapping with ``kl_ratio``, ``magnitudes``, ``kl_top``, ``kl_baseline`` (see
            :class:`npeff.reports.EffectSummary`). The effect of several components stands with the strategies.
        traces: Where components act: what :func:`npeff.trace` returned, one or several.
        trust: Stability of the components, the null model, held-out losses, explained shares; see
            :meth:`npeff.reports.TrustSummary.of`.
        attributions: ``(component, index of an example)`` → array of the shape of the input, or a number per token:
            what :func:`npeff.companions.linearize.attribute_top_examples` returns.
        influences: Component → pairs (position in ``influence_data``, score), or what
            :func:`npeff.companions.influence.component_influence` or
            :func:`npeff.companions.rollback.component_rollback` returned.
        influence_data: The training data, to show what is influential.
        heads: Attention heads per layer, to show which carry a component; or a mapping from patterns of parameter
            names to numbers of heads.
        size_limit: What the report may take on the disk, in bytes or as in ``"24MB"``; by default 24 MB for a file,
            2 GB for a folder.
        seed: Decides the examples at random.
        progress: Show progress bars for what takes more than a few seconds.

    Returns:
        The file written: the page, or the folder's ``index.html``.

    Raises:
        ArgumentError: An argument is not as documented.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
        StorageError: The report cannot be written (an earlier one there is kept), or a page that npeff did not write
            is there.
    """
    options = ReportOptions.checked(components, data, among(ReportOptions, locals()))
    path = path_of(out, "out")
    folder = path.suffix.lower() not in (".html", ".htm")
    if folder and path.suffix.lower() in FILE_SUFFIXES and not path.is_dir():
        raise ArgumentError(f"out: expected a name ending in .html, or that of a folder, got {path}")
    path = path / "index.html" if folder else path
    check_page(path)
    refuse_foreign(path)
    limit = FOLDER_LIMIT if folder else FILE_LIMIT
    limit = limit if size_limit is None else parse_bytes(size_limit, "size_limit")
    every = folder or len(components.coefficients) * 200 < limit
    with (
        collect_report_data(components, data, options, every) as found,
        ReportWriter(path, folder, limit) as writer,
    ):
        write_report(found, writer)
    return path


__all__ = [
    "EffectSummary",
    "InfluenceSummary",
    "TraceSummary",
    "TrustSummary",
    "collage",
    "describe_extras",
    "latex",
    "load_extras",
    "report",
    "save_extras",
]
