"""Puts into the pages what is kept elsewhere, so that it is written once.

A line `<!-- registered: tenfold.formats FORMATS -->` is replaced by the documentation of all entries of it: a
new format or rule is documented by being there. A line that is nothing but a link to a result, such as
`[benchmarks/results/hooi.md](../benchmarks/results/hooi.md)`, is replaced by that result, or by the news that there is
none yet. `<!-- results -->` becomes a table of all results that are committed, and `<!-- other results -->` those that
no line of the page links to: what was measured is on the site by being there.
"""

from __future__ import annotations

import base64
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- registered: (\S+) (\S+) -->$", re.MULTILINE)
RESULT = re.compile(r"^\[[^\]]*\]\(\.\./(benchmarks/results/[^)]+\.md)\)$", re.MULTILINE)
INDEX = re.compile(r"^<!-- results -->$", re.MULTILINE)
OTHERS = re.compile(r"^<!-- other results -->$", re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with every mark expanded."""
    markdown = MARK.sub(lambda match: entries(*match.groups()), markdown)
    markdown = OTHERS.sub(lambda _: others(markdown), markdown)
    markdown = INDEX.sub(lambda _: index(markdown), markdown)
    return RESULT.sub(lambda match: result(ROOT / match[1]), markdown)


def entries(module: str, registry: str) -> str:
    """Return a heading and a reference for every entry of a registry."""
    registered = getattr(import_module(module), registry).items()
    return "\n\n".join(
        f"### {name}\n\n::: {entry.__module__}.{entry.__qualname__}\n    options:\n      heading_level: 4"
        for name, entry in registered
    )


def committed() -> list[Path]:
    """Return all results, by name."""
    return sorted((ROOT / "benchmarks" / "results").glob("*.md"))


def others(markdown: str) -> str:
    """Return a section with a link for every result that the page does not link to."""
    missing = [path for path in committed() if ROOT / "benchmarks" / "results" / path.name not in linked(markdown)]
    links = ((path.stem, path.relative_to(ROOT).as_posix()) for path in missing)
    return "\n\n".join(f"## {name}\n\n[{link}](../{link})" for name, link in links)


def index(markdown: str) -> str:
    """Return a table of all results: what was measured, and the section of the page that has it."""
    found = linked(markdown)
    rows = [f"| [{found[path]}](#{found[path]}) | {title(path)} |" for path in committed() if path in found]
    return "\n".join(["| Section | What was measured |", "| --- | --- |", *rows])


def linked(markdown: str) -> dict[Path, str]:
    """Return the results that a page links to in lines of their own, each with the heading above it."""
    heads = [(match.start(), match[1]) for match in re.finditer(r"^## (.+)$", markdown, re.MULTILINE)]
    return {
        ROOT / match[1]: [name for start, name in heads if start < match.start()][-1]
        for match in RESULT.finditer(markdown)
    }


def title(path: Path) -> str:
    """Return the first line of a result without its marks."""
    return path.read_text(encoding="utf-8").lstrip().split("\n", 1)[0].removeprefix("# ").strip()


def result(path: Path) -> str:
    """Return a committed result without its title, its other headings below those of the page, its pictures inside."""
    if not path.is_file():
        return "No result is committed yet."
    text = path.read_text(encoding="utf-8")
    body = re.sub(r"\A# [^\n]*\n", "", text)
    lowered = re.sub(r"^(#+ )", r"##\1", body, flags=re.MULTILINE)
    return PICTURE.sub(lambda match: f"![{match[1]}]({_inline(path.parent / match[2])})", lowered).strip()


def _inline(picture: Path) -> str:
    kind = {".svg": "svg+xml"}.get(picture.suffix, picture.suffix.removeprefix("."))
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
