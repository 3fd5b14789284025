"""DATA of the commands: what a function makes, or texts for a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npeff.cli.command import misused
from npeff.cli.options import Arguments

if TYPE_CHECKING:
    from npeff.components.components import Components

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = ("answers", "context", "text_column", "label_column")
PLACES = Arguments("npeff.language:Places", only=OPTIONS)
"""Options of texts that follow from the arguments; :func:`where` states another."""

where = click.option(
    "--where",
    metavar="last|every|REGEX",
    help="Texts: the tokens whose predictions are examples: the last of each text, every one, or the one with the last "
    "character of each match.  [default: last]",
)


def is_text(data: str) -> bool:
    """Whether DATA is a file of texts, or a folder with a dataset."""
    from npeff.language.sources import FILES

    return data.lower().endswith(FILES) or (":" not in data and Path(data).is_dir())


def data_of_model(data: str, model: str, options: dict[str, Any]) -> Iterable[Any]:
    """Load DATA; the options of texts are taken out of ``options``.

    Raises:
        UsageError: They are given for other data, or MODEL is a function, which tells of no tokenizer.
    """
    from npeff.language import Places
    from npeff.language.hugging_face import PREFIX, load_tokenizer
    from npeff.models.targets import load_data

    given = {name: options.pop(name, None) for name in ("where", *OPTIONS)}
    about = {name: value for name, value in given.items() if value is not None}
    if not is_text(data):
        if about:
            misused(f"--{next(iter(about)).replace('_', '-')} belongs to DATA that is a file of texts, got {data}")
        return load_data(data)
    if not model.startswith(PREFIX):
        misused(
            f"DATA: {data} is a file of texts, and MODEL tells of no tokenizer; give MODEL as hf:PATH, or for DATA a "
            "function that returns npeff.language.Places(tokenizer, texts)"
        )
    return Places(load_tokenizer(model), data, **about)


def data_of_components(data: str, components: Components) -> Iterable[Any]:
    """Load DATA; texts are read as those that the components' Fishers were computed from.

    Raises:
        UsageError: The Fishers were computed from something else.
    """
    from npeff.language import Places
    from npeff.models.targets import load_data

    if not is_text(data):
        return load_data(data)
    described = (components.provenance.get("fishers") or {}).get("places")
    if described is None:
        misused(
            f"DATA: {data} is a file of texts, and these components were not made from one; give module:callable for "
            "the data of their Fishers"
        )
    return Places.described(described, data)
