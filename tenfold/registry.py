"""Names to classes: the one mechanism by which formats, algorithms, rules and tasks are found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from tenfold.errors import TenfoldError, UnknownNameError

T = TypeVar("T")

PLUGIN_GROUP = "tenfold.plugins"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest of the ``known`` names, or lists them all.

    Example:
        >>> did_you_mean("tuker2", ["low_rank", "tucker2"])
        'Did you mean tucker2?'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    return f"Known: {shown or 'none'}."


def as_names(given: Any) -> Any:
    """Return names that were given in one text, with commas between them, or one by one; anything else unchanged.

    Example:
        >>> as_names("tucker2"), as_names("low_rank, tucker2"), as_names(["low_rank,tucker2", "cp3"])
        (('tucker2',), ('low_rank', 'tucker2'), ('low_rank', 'tucker2', 'cp3'))
    """
    return split_texts(given, lambda text: text.split(","))


def split_texts(given: Any, split: Callable[[str], Iterable[str]]) -> Any:
    """Return the parts of a text, or of each text of a list; values that hold anything else are returned unchanged."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given
    return tuple(part.strip() for text in texts for part in split(text) if part.strip())


class Registry(Generic[T]):
    """A mapping from names to classes that refuses duplicates and helps on a miss.

    Example:
        >>> formats = Registry("format")
        >>> @formats.register("toy")
        ... class Toy:
        ...     "A toy."
        >>> formats.get("toy").__name__
        'Toy'
    """

    def __init__(self, kind: str, hint: Callable[[str], str] = lambda _: "") -> None:
        self.kind = kind
        self._hint = hint  # what else is to be said of a name that is not there
        self._entries: dict[str, type[T]] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that stores the class under ``name``."""

        def store(entry: type[T]) -> type[T]:
            held = self._entries.get(name)
            if held is not None and held is not entry:
                msg = f"{self.kind} {name!r} is registered already, by {held.__module__}.{held.__qualname__}"
                raise TenfoldError(msg)
            self._entries[name] = entry
            return entry

        return store

    def get(self, name: str) -> type[T]:
        """Return the class stored under ``name``.

        Raises:
            UnknownNameError: nothing is stored under that name; the message names the nearest ones.
        """
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            msg = f"unknown {self.kind} {name!r}. {self._hint(name) or did_you_mean(name, self.names())}"
            raise UnknownNameError(msg)
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names in alphabetical order, plugins included."""
        self._load_plugins()
        return tuple(sorted(self._entries))

    def items(self) -> Iterator[tuple[str, type[T]]]:
        """Iterate over (name, class) in alphabetical order."""
        for name in self.names():
            yield name, self._entries[name]

    def loaded(self) -> Iterator[tuple[str, type[T]]]:
        """Iterate over (name, class) of what is registered so far, plugins not looked for."""
        yield from self._entries.items()

    def summary(self, name: str) -> str:
        """Return the first line of the docstring of the class stored under ``name``."""
        doc = self.get(name).__doc__ or ""
        return doc.strip().split("\n", 1)[0]

    def _load_plugins(self) -> None:
        """Import third-party modules of the entry point group once, so that they register themselves."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for plugin in entry_points(group=PLUGIN_GROUP):
            plugin.load()
