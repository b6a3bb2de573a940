"""One HTML file that holds all it needs: text, tables, style, scripts and the data of its charts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SCRIPTS = ("table.js", "chart.js", "page.js")
STYLES = ("style.css",)


def page(
    template: str,
    *,
    title: str,
    data: dict[str, Any],
    scripts: Sequence[str] = SCRIPTS,
    styles: Sequence[str] = STYLES,
    **values: Any,
) -> str:
    """Return a page as HTML: it asks the network for nothing, and runs no script but its own.

    Everything in ``values`` is text and is escaped. The policy in the head of the page names the hashes of the style
    and the scripts in it, so that a browser refuses all others.

    Args:
        template: its name in the folder ``page``.
        title: of the page.
        data: what the scripts read; see ``page/chart.js`` for the charts in it.
        scripts: their names, in the order in which they run.
        styles: their names.
        values: what else the template wants.

    Example:
        >>> html = page("page.html", title="<Net>", data={"charts": {}})
        >>> "&lt;Net&gt;" in html, "<Net>" in html
        (True, False)
    """
    from tenfold import __version__

    style, texts = "".join(map(part, styles)), [part(name) for name in scripts]
    return (
        _templates()
        .get_template(template)
        .render(
            title=title,
            version=__version__,
            style=Markup(style),  # noqa: S704 - a file of this package
            style_hash=Markup(_hash(style)),  # noqa: S704
            scripts=[Markup(text) for text in texts],  # noqa: S704
            script_hashes=Markup(" ".join(map(_hash, texts))),  # noqa: S704
            data=Markup(_json(data)),  # noqa: S704 - escaped below
            **values,
        )
    )


@cache
def part(name: str) -> str:
    """Return a file of the folder ``page``: styles and scripts that other pages may use as well."""
    return files("tenfold.reporting").joinpath("page", name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("tenfold.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: dict[str, Any]) -> str:
    """Return JSON that cannot end the script element that it stands in; what is not finite is null."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
