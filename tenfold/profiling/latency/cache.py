"""Disk cache of measured times: one JSON file per device, version, dtype, thread count and memory format."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold.records import JsonCache

_VERSION = 2  # 1 had no digest
_LOG = logging.getLogger("tenfold")

Samples = dict[str, list[float]]


class LatencyCache:
    """Samples by point, in a file named after the conditions of their measurement.

    A file that cannot be read counts as empty, and one that cannot be written is skipped; each is logged once as a
    warning. Files are replaced atomically, and merged with what another process wrote in between.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> LatencyCache(folder, {"device": "cpu"}).save({"conv 8->8": [1.5]})
        >>> LatencyCache(folder, {"device": "cpu"}).load(), LatencyCache(folder, {"device": "tpu"}).load()
        ({'conv 8->8': [1.5]}, {})
    """

    def __init__(self, folder: Path | str | None, conditions: Mapping[str, Any]) -> None:
        header = {"version": _VERSION, "conditions": dict(conditions)}
        self.path = None if folder is None else Path(folder).expanduser() / _file_name(header)
        self._file = None if self.path is None else JsonCache(self.path, header)
        self._warned: set[str] = set()

    def load(self) -> Samples:
        """Read all samples stored for these conditions."""
        if self._file is None:
            return {}
        try:
            return {key: [_positive(v) for v in values] for key, values in self._file.load().items()}
        except (OSError, ValueError, TypeError) as error:
            self._warn("read", f"cannot read the latency cache {self.path}: {error}. Times are measured again.")
            return {}

    def save(self, samples: Mapping[str, list[float]]) -> None:
        """Store these samples, and keep stored samples of other points."""
        if self._file is None:
            return
        try:
            try:
                self._file.add(samples)
            except ValueError:  # it cannot be read, as was said
                self._file.path.unlink()
                self._file.add(samples)
        except (OSError, ValueError) as error:
            self._warn("write", f"cannot write the latency cache {self.path}: {error}. Times are not kept.")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            _LOG.warning(message)


def _file_name(header: dict[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True)
    words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, header["conditions"].values()))).strip("-").lower()
    return f"{words[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        msg = f"{value!r} is not a valid latency"
        raise ValueError(msg)
    return number
