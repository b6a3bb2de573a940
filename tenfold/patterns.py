"""Names of layers by exact path, glob or ``re:`` expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tenfold.errors import PlanError, UnknownNameError
from tenfold.registry import did_you_mean, split_texts

_ONE = re.compile(r"\s*re:.*|(?:\[[^\]]*\]|[^,])+", re.DOTALL)  # commas in brackets and in expressions part nothing


def as_patterns(given: Any) -> Any:
    """Return patterns that were given in one text, with commas between them, or one by one; anything else unchanged.

    An expression after ``re:`` reaches to the end of its text, as it may have commas of its own.

    Example:
        >>> as_patterns("stem, layer1.*"), as_patterns("head,re:layer[12].{1,3}"), as_patterns(["stem", "layer[1,2]"])
        (('stem', 'layer1.*'), ('head', 're:layer[12].{1,3}'), ('stem', 'layer[1,2]'))
    """
    return split_texts(given, _ONE.findall)


def matches(pattern: str, path: str) -> bool:
    """Whether ``path`` is meant by ``pattern``: equal, matched as a glob, or fully matched after ``re:``.

    Example:
        >>> matches("layer?.*.conv1", "layer1.0.conv1"), matches("re:layer[12].*", "layer3.0")
        (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            msg = f"{pattern!r} is not a regular expression: {error}"
            raise PlanError(msg) from error
    return pattern == path or fnmatch.fnmatchcase(path, pattern)


def first_match(patterns: Iterable[str], path: str, aliases: Sequence[str] = ()) -> str | None:
    """Return the first of the patterns that means the layer at ``path`` (or one of its aliases), or None."""
    return next((p for p in patterns if any(matches(p, name) for name in (path, *aliases))), None)


def check_patterns(patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Raise UnknownNameError for the first pattern that means none of the ``paths``; the message names near ones."""
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            msg = f"no layer matches {pattern!r}. {did_you_mean(pattern, paths)}"
            raise UnknownNameError(msg)
