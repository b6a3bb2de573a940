"""Makes `Example:` a section of examples, as `Examples:` is.

Griffe knows the plural alone; to it, doctests under the singular are Markdown, in which `[x]` above `[y]` is a link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

HEAD = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Rewrites the heads of examples before the docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = HEAD.sub(r"\1Examples:", obj.docstring.value)
