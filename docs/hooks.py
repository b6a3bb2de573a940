"""Puts into the pages what is kept elsewhere, so that it is written once.

A line `<!-- registered: tenfold.formats FORMATS -->` is replaced by the documentation of all entries of it: a
new format or rule is documented by being there. A line that is nothing but a link to a result, such as
`[benchmarks/results/hooi.md](../benchmarks/results/hooi.md)`, is replaced by that result, or by the news that there is
none yet. `<!-- results -->` becomes a table of the questions that results answer, each with the claim in bold that its
section begins with, and `<!-- other results -->` the results that no line of the page links to: what was measured is on
the site by being there.
"""

from __future__ import annotations

import base64
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- registered: (\S+) (\S+) -->$", re.MULTILINE)
RESULT = re.compile(r"^\[[^\]]*\]\(\.\./(benchmarks/results/[^)]+\.md)\)$", re.MULTILINE)
INDEX = re.compile(r"^<!-- results -->$", re.MULTILINE)
OTHERS = re.compile(r"^<!-- other results -->$", re.MULTILINE)
SECTION = re.compile(
    r'(?:^<a id="(?P<id>[\w-]+)"></a>\n\n)?^## (?P<question>[^\n]+)\n(?P<text>.*?)(?=^<a id=|^## |\Z)',
    re.MULTILINE | re.DOTALL,
)
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)")


def on_config(config: Any) -> Any:
    """Put the version into the name of the site, and the repository's address where pyproject.toml has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (version,) = VERSION.findall((ROOT / "tenfold" / "__init__.py").read_text(encoding="utf-8"))
    config.site_name = f"tenfold {version}"
    config.repo_url = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"] or None
    return config


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
    named = {match[1] for match in RESULT.finditer(markdown)}
    missing = [path for path in committed() if path.relative_to(ROOT).as_posix() not in named]
    links = [f"benchmarks/results/{path.name}" for path in missing]
    heads = [f'<a id="{path.stem}"></a>\n\n## {title(path)}' for path in missing]
    return "\n\n".join(f"{head}\n\n[{link}](../{link})" for head, link in zip(heads, links, strict=True))


def index(markdown: str) -> str:
    """Return a table of all sections: the question, linked, and the claim that answers it."""
    found = [(match["question"], match["id"], match["text"]) for match in SECTION.finditer(markdown)]
    rows = [f"| [{question}](#{name or slugify(question, '-')}) | {claim(text)} |" for question, name, text in found]
    return "\n".join(["| Question | In short |", "| --- | --- |", *rows])


def claim(section: str) -> str:
    """Return what a section begins with in bold, on one line; nothing where it claims nothing."""
    found = re.match(r"\s*\*\*(.+?)\*\*", section, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


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
