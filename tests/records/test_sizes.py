"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest

from tenfold.errors import RecipeError
from tenfold.records import parse_size
from tenfold.runtime import Runtime


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0", 0), (7, 7), ("1kB", 1000), ("1 KiB", 1024), (" 2.5 gib ", 5 << 29), ("3T", 3 * 10**12), (".5MB", 500_000)],
)
def test_sizes_are_read(text: int | str, wanted: int) -> None:
    assert parse_size(text) == wanted
    assert Runtime(max_cache=text).cache_bytes() == wanted


@pytest.mark.parametrize("text", ["", "MiB", "12 potatoes", "-1", "1e3", "1,5GB", "nan", True])
def test_others_are_refused(text: int | str) -> None:
    with pytest.raises(RecipeError, match="cannot read the size"):
        Runtime(max_cache=text)
