"""Files that several processes read and replace: atomic writes, locks, and JSON caches that grow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in a temporary folder beside ``path``; on success the file replaces ``path``.

    The file has the name of ``path`` and does not exist yet; writers may leave other files beside it, which go with the
    folder. A process that is killed leaves the folder, ``.NAME.*.partial``.

    Raises:
        OSError: the folder of ``path`` cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:  # it names the temporary folder, which the caller never heard of
        raise OSError(error.errno, error.strerror, str(path)) from error
    with folder as name:
        partial = Path(name) / path.name
        yield partial
        partial.chmod(0o644)
        partial.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that several processes read, extend and replace; the others wait.

    The lock is a file beside it, ``.NAME.lock``, which stays: if it were removed, two processes could hold two files of
    that name. It is released when its process dies.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "count.json"
        >>> with locked(file):
        ...     write_text(file, json.dumps((read_json(file) if file.exists() else 0) + 1))
        >>> read_json(file)
        1
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the JSON value stored in ``path``."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class JsonCache:
    """A JSON object on disk to which several processes add entries, each keeping what the others wrote.

    Attributes:
        path: of the file; it need not exist.
        header: further entries of the file, such as its version and the conditions of a measurement.

    Example:
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
            OSError: the file cannot be read.
            ValueError: it is not such a file, or its header differs.
        """
        if not self.path.exists():
            return {}
        stored = read_json(self.path)
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
            write_text(self.path, json.dumps({**self.header, "entries": merged}, indent=1) + "\n")
        return merged
