"""JSON caches on disk that several processes extend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.files import locked, read_text, write_text
from tenfold.records.parsing import CHANGED, parse_json, seal, unseal


@dataclass(frozen=True)
class JsonCache:
    """A JSON object on disk to which several processes add entries, each keeping what the others wrote.

    Attributes:
        path: of the file; it need not exist.
        header: further entries of the file, such as its version and the conditions of a measurement.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "errors.json"
        >>> one, other = JsonCache(file, {"version": 1}), JsonCache(file, {"version": 1})
        >>> _ = one.add({"conv": {"4": 0.5}})
        >>> other.add({"conv": {"8": 0.25}, "fc": {}})
        {'conv': {'4': 0.5, '8': 0.25}, 'fc': {}}
        >>> JsonCache(file, {"version": 2}).load()
        Traceback (most recent call last):
        ValueError: its header is {'version': 1}, not {'version': 2}
    """

    path: Path
    header: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any]:
        """Return all entries; none where there is no file.

        Raises:
            FileError: the file cannot be read.
            ValueError: it is not such a file, was damaged, or its header differs.
        """
        if not self.path.exists():
            return {}
        text, intact = unseal(read_text(self.path, "a cache"))
        stored = parse_json(text)
        if not intact:
            msg = f"it {CHANGED}"
            raise ValueError(msg)
        match stored:
            case {"entries": dict() as entries, **header} if header == dict(self.header):
                return entries
            case {"entries": dict(), **header}:
                msg = f"its header is {header}, not {dict(self.header)}"
            case _:
                msg = "it has no entries"
        raise ValueError(msg)

    def add(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Store entries under a lock, merged with those on disk, and return them all.

        A new value replaces the old one, except that two objects are united.

        Raises:
            OSError: the file cannot be written.
            ValueError: see ``load``.
        """
        with locked(self.path):
            merged = self.load()
            for key, value in entries.items():
                old = merged.get(key)
                merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            write_text(self.path, seal(json.dumps({**self.header, "entries": merged}, indent=1)))
        return merged
