"""Why layers stay as they are: grouped by reason, the biggest group first, each with its share of a cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tenfold.records import Recipe

CHEAP_END = "too little to be worth distortion there"  # how the reason of a cheap first or last layer ends
_MOST = 5  # groups are spelled out; further ones are counted


@dataclass(frozen=True)
class Group:
    """Layers that stay for one reason, and what they cost together."""

    reason: str
    layers: int
    cost: float


def grouped_reasons(kept: Iterable[tuple[str, float]]) -> list[Group]:
    """Return the groups of layers that share a reason, the costliest first, from the reason and cost of each layer.

    Example:
        >>> [group.reason for group in grouped_reasons([("tied", 2.0), ("kept as asked", 3.0), ("tied", 2.0)])]
        ['tied', 'kept as asked']
    """
    groups: dict[str, Group] = {}
    for reason, cost in kept:
        old = groups.get(reason, Group(reason, 0, 0.0))
        groups[reason] = Group(reason, old.layers + 1, old.cost + cost)
    return sorted(groups.values(), key=lambda group: (-group.cost, -group.layers))


def in_words(groups: Sequence[Group], whole: float) -> str:
    """Return the groups in one line, each with the number of its layers and its share of ``whole``, if that is any.

    Example:
        >>> in_words(grouped_reasons([("tied", 20.0), ("tied", 20.0), ("not called by the forward", 0.0)]), 100)
        '40.0% in 2 layers: tied; 1 layer: not called by the forward'
    """

    def one(group: Group, reason: str) -> str:
        layers = f"{group.layers} layer{'s' * (group.layers != 1)}"
        return (
            f"{share(group.cost, whole)} in {layers}: {reason}" if whole and group.cost > 0 else f"{layers}: {reason}"
        )

    rest = groups[_MOST:]
    shown = [one(group, group.reason) for group in groups[:_MOST]]
    if rest:
        last = Group("", sum(group.layers for group in rest), sum(group.cost for group in rest))
        shown.append(one(last, f"{len(rest)} further reason{'s' * (len(rest) > 1)}"))
    return "; ".join(shown)


def share(part: float, whole: float) -> str:
    """Return a share in percent, of which what there is of it is not lost in rounding.

    Example:
        >>> share(1, 8), share(1, 100_000)
        ('12.5%', 'below 0.1%')
    """
    return "below 0.1%" if 0 < part < 0.0005 * whole else f"{part / whole:.1%}"


def ways_to_be_faster(recipe: Recipe, batch_size: int | None = None) -> list[str]:
    """Return what can be tried beside other plans where a budget of latency cannot be met.

    Example:
        >>> ways_to_be_faster(Recipe(fuse_batchnorm=True), batch_size=1)
        ['another runtime than torch', 'more threads', 'batches larger than 1']
    """
    ways = [] if recipe.fuse_batchnorm else ["fuse_batchnorm=True, if there is batch norm"]
    ways += [f"another runtime than {recipe.target}", "more threads"]
    return ways + ([] if batch_size is None else [f"batches larger than {batch_size}"])


def listed(words: Iterable[str], last: str = "and") -> str:
    """Return words as a sentence lists them.

    Example:
        >>> listed(["cp3"]), listed(["tucker2", "low_rank", "spatial"])
        ('cp3', 'tucker2, low_rank and spatial')
    """
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
