"""What a chain of layers takes inside a network, from a runtime's own account of the nodes that it ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tenfold.runtimes.onnx_layers import AFTER, BEFORE

NodeTimes = Sequence[tuple[str, float]]


def between_anchors(nodes: NodeTimes) -> float:
    """Return the time of all nodes between the two anchors of a chain, in the order in which they ran.

    A runtime renames nodes, and adds some that change the memory format; the anchors are known by a part of the name.

    Example:
        >>> between_anchors([("reorder", 9.0), ("anchor_before_nchwc", 2.0), ("layer0", 5.0), ("anchor_after", 2.0)])
        5.0
    """
    places = [place for place, (name, _) in enumerate(nodes) if BEFORE in name]
    first = places[-1] + 1 if places else 0
    last = next((place for place, (name, _) in enumerate(nodes) if place >= first and AFTER in name), len(nodes))
    return sum(time for _, time in nodes[first:last])


def runs_of(events: Iterable[tuple[str, float]], runs: int) -> list[NodeTimes]:
    """Return the events of every run apart; all runs have equally many.

    Example:
        >>> runs_of([("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 4.0)], 2)
        [[('a', 1.0), ('b', 2.0)], [('a', 3.0), ('b', 4.0)]]
    """
    listed = list(events)
    each = len(listed) // max(1, runs)
    return [listed[n * each : (n + 1) * each] for n in range(runs)]


def lower_quartile(times: Sequence[float]) -> float:
    """Return the time that a quarter of the runs stays below: other load on the machine only ever adds.

    Example:
        >>> lower_quartile([4.0, 1.0, 9.0, 2.0])
        2.0
    """
    return sorted(times)[len(times) // 4]
