"""Names of families of decompositions, and the formats that stand for them: what the field calls them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger("tenfold")

FAMILIES: dict[str, tuple[str, ...]] = {
    "tucker": ("tucker2",),
    "cp": ("cp3",),
    "svd": ("low_rank", "spatial"),
    "tt": ("tensor_train", "tt_matrix", "tt_embedding"),
    "tr": ("tensor_ring",),
    "btd": ("block_term",),
}


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Return formats with families written out, each format once; what became of a family is logged.

    Example:
        >>> expanded(["tucker", "svd", "spatial"])
        ('tucker2', 'low_rank', 'spatial')
    """
    for name in names:
        if name in FAMILIES:
            logger.info("formats: %s", meaning(name))
    return tuple(dict.fromkeys(format for name in names for format in FAMILIES.get(name, (name,))))


def meaning(name: str) -> str:
    """Return what a family stands for, in words.

    Example:
        >>> meaning("svd")
        'svd is a family, which stands for low_rank and spatial'
    """
    return f"{name} is a family, which stands for {' and '.join(FAMILIES[name])}"
