"""Part batches into samples that are fitted to and samples that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import TenfoldError
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import arguments, batch_size_of, call_model, map_tensors, tensors_in
from tenfold.tracing.randomness import Randomness

_PLAIN = (Tensor, bool, int, float, str)
_CLOSE = 1e-3  # of the largest output: kernels of other shapes round differently


def parted(model: nn.Module, batches: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Return batches without a share of their samples, and batches of these samples; the second may be empty.

    Whole batches are held out where there are enough of them to come near the share, evenly from first to last. Else
    every batch is cut along its first axis, if it can be: if all of its tensors have that axis, and outputs of a part
    are those that its samples have in the whole batch.

    Args:
        model: that takes the batches.
        batches: on its device.
        share: of the samples to hold out, below 1.

    Example:
        >>> kept, held = parted(nn.Linear(3, 2), [torch.randn(10, 3)], 0.2)
        >>> [len(b) for b in kept], [len(b) for b in held]
        ([8], [2])
        >>> kept, held = parted(nn.Linear(3, 2), [torch.randn(2, 3) for _ in range(10)], 0.2)
        >>> len(kept), len(held)
        (8, 2)
    """
    if share * len(batches) >= 2:
        held = set(_places(len(batches), share))
        return [b for i, b in enumerate(batches) if i not in held], [b for i, b in enumerate(batches) if i in held]
    kept: list[Any] = []
    out: list[Any] = []
    for batch in batches:
        size = common_axis(batch)
        rows = _places(size, share) if size else []
        if not rows or len(rows) == size or not (out or _falls_apart(model, batch, rows)):
            kept.append(batch)
            continue
        others = [i for i in range(size) if i not in set(rows)]
        kept.append(_rows(batch, others))
        out.append(_rows(batch, rows))
    return kept, out


def count_samples(batches: Iterable[Any]) -> int:
    """Return the number of samples in all batches: see ``samples_in``."""
    return sum(map(samples_in, batches))


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch: its graphs, or else its size; a batch without a first axis is one.

    Graphs are not counted by their nodes: a batch of them says ``num_graphs``, as those of PyTorch Geometric do, or is
    their features (nodes, ...), edges (2, edges) and, in rising order from 0, the graph of each node.

    Example:
        >>> nodes, edges = torch.zeros(5, 3), torch.zeros(2, 7, dtype=torch.long)
        >>> samples_in((nodes, edges, torch.tensor([0, 0, 0, 1, 1]))), samples_in(nodes)
        (2, 5)
    """
    args, kwargs = arguments(batch)
    for value in (*args, *kwargs.values()):
        graphs = getattr(value, "num_graphs", None)
        if isinstance(graphs, int) and graphs > 0:
            return graphs
    nodes = next(tensors_in((args, kwargs)), None)
    whole = [t for t in tensors_in((args, kwargs)) if t.dtype == torch.long]
    if nodes is not None and nodes.is_floating_point() and any(t.dim() == 2 and len(t) == 2 for t in whole):
        for graph_of in whole:
            if graph_of.shape == nodes.shape[:1] and _counts_up(graph_of):
                return int(graph_of[-1]) + 1
    return batch_size_of(batch) or 1


def _counts_up(values: Tensor) -> bool:
    """Whether numbers (n,) begin with 0 and rise by 0 or 1."""
    steps = values.diff(prepend=values.new_zeros(1))
    return len(values) > 0 and not values[0] and bool(((steps == 0) | (steps == 1)).all())


def _places(count: int, share: float) -> list[int]:
    """Return the indices of a share of ``count`` things, evenly spread."""
    wanted = round(share * count)
    return sorted({int((i + 0.5) * count / wanted) for i in range(wanted)})


def common_axis(batch: Any) -> int:
    """Return the length of the first axis that all tensors of a batch have in common, 0 if there is none."""
    args, kwargs = arguments(batch)
    if not all(value is None or isinstance(value, _PLAIN) for value in (*args, *kwargs.values())):
        return 0
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors_in((args, kwargs))}
    return sizes.pop() if len(sizes) == 1 else 0


def _rows(batch: Any, rows: Sequence[int]) -> Any:
    return map_tensors(batch, lambda t: t[torch.as_tensor(rows, device=t.device)])


def _falls_apart(model: nn.Module, batch: Any, rows: Sequence[int]) -> bool:
    """Whether samples do not know of each other: of some alone the outputs are the same."""
    try:
        with evaluating(model):
            whole, part = (_outputs(model, b) for b in (batch, _rows(batch, rows)))
    except TenfoldError:
        return False
    if not whole or len(whole) != len(part):
        return False
    index = torch.as_tensor(rows)
    for a, b in zip(whole, part, strict=True):
        own = a[index.to(a.device)] if a.dim() and len(a) > index[-1] else a
        if own.shape != b.shape or not bool((own - b).abs().max() <= _CLOSE * a.abs().max()):
            return False
    return True


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with Randomness(model, batch).seeded(0):
        return [t.float() for t in tensors_in(call_model(model, batch)) if t.is_floating_point() and t.numel()]
