"""Typesets formulas when the site is built: `$$` blocks become MathML, which browsers show without any script.

GitHub typesets the same blocks by itself. MathML needs neither fonts nor scripts of others: the site works offline.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with every block between lines of `$$` as MathML."""
    return FORMULA.sub(lambda match: f'<div class="formula">{typeset(match[1])}</div>', markdown)


def typeset(latex: str) -> str:
    """Return one formula as MathML, on one line: Markdown leaves that alone."""
    found = convert(latex, display="block").replace("\n", " ")
    return found.replace("\\_", "_")  # LaTeX wants underscores of text escaped; the converter leaves the escape
