"""One line for many layers that share kind and reason."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

_NAMED = 2  # so many paths of a group are spelled out


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items that share a key, in the order of the first of each group.

    Example:
        >>> grouped(["a1", "b1", "a2"], lambda text: text[0])
        [['a1', 'a2'], ['b1']]
    """
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def kind_name(kind: str) -> str:
    """Return the name of a kind of layer without its size.

    Example:
        >>> kind_name("Conv2d 16→32 3×3 /2×2"), kind_name("BatchNorm2d")
        ('Conv2d', 'BatchNorm2d')
    """
    return kind.split(" ", 1)[0]


def paths_in_short(paths: Sequence[str]) -> str:
    """Return the first paths and how many more there are.

    Example:
        >>> paths_in_short(["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1"])
        'bn1, layer1.0.bn1 and 2 more'
    """
    shown = [path or "(the model)" for path in paths]
    if len(shown) <= _NAMED + 1:
        return ", ".join(shown)
    return f"{', '.join(shown[:_NAMED])} and {len(shown) - _NAMED} more"


def kinds_in_short(kinds: Sequence[str]) -> str:
    """Return the one kind of a group in full, or how many there are of what.

    Example:
        >>> kinds_in_short(["Linear 64→10"]), kinds_in_short(["Conv2d 3→8 1×1", "Conv2d 8→8 1×1"])
        ('Linear 64→10', '2 × Conv2d')
    """
    if len(kinds) == 1:
        return kinds[0]
    return f"{len(kinds)} × {kinds[0] if len(set(kinds)) == 1 else kind_name(kinds[0])}"
