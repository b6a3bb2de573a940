"""Sizes of memory, as people write them."""

from __future__ import annotations

import re

from tenfold.errors import RecipeError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: int | str) -> int:
    """Return a number of bytes from one, or from text such as ``"512 MiB"`` (2²⁰ bytes) or ``"8GB"`` (10⁹).

    Raises:
        RecipeError: not of that form, or negative.

    Example:
        >>> parse_size("8GB"), parse_size("512 MiB"), parse_size("1.5k"), parse_size(12)
        (8000000000, 536870912, 1500, 12)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", str(size).lower())
    if found is None or isinstance(size, bool):
        msg = f"cannot read the size {size!r}: write a number of bytes, or one with its unit such as 512MiB or 8GB"
        raise RecipeError(msg)
    return int(float(found[1]) * _UNITS[found[2]])


def size_in_words(number: float) -> str:
    """Return a number of bytes as people read it.

    Example:
        >>> size_in_words(3 << 29), size_in_words(12 << 20)
        ('1.5 GiB', '12.0 MiB')
    """
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
