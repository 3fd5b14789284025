"""The page's style and script, put together from their files."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from npeff.reports.wording import coefficient, number, percent, plain

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dom", "parts", "table", "map", "tree", "examples", "routes")


@cache
def environment() -> Environment:
    """The templates; everything printed by them is escaped."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, number=number, coefficient=coefficient, plain=plain)
    return env


@cache
def style() -> Markup:
    """The style sheet."""
    return Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))


@cache
def script() -> tuple[Markup, str]:
    """The script, and the base64 SHA-256 of it by which the page allows it and no other."""
    bodies = [(TEMPLATES / "app" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    text = '(() => {\n"use strict";\n' + "\n".join(bodies) + "})();\n"
    return Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
