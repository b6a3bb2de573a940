"""Puts whatever is registered into the reference, so that a new format or rule is documented by being there.

A line `<!-- registered: tenfold.formats FORMATS -->` is replaced by the documentation of every entry of that registry.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

MARK = re.compile(r"^<!-- registered: (\S+) (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with every mark expanded."""
    return MARK.sub(lambda match: entries(*match.groups()), markdown)


def entries(module: str, registry: str) -> str:
    """Return a heading and a reference for every entry of a registry."""
    registered = getattr(import_module(module), registry).items()
    return "\n\n".join(
        f"### {name}\n\n::: {entry.__module__}.{entry.__qualname__}\n    options:\n      heading_level: 4"
        for name, entry in registered
    )
