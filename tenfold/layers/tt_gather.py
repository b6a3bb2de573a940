"""Rows of a table that is a tensor train, found without ever forming the table."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.layers.batched_matmul import NARROW, JoinPicked, join, sum_of_terms
from tenfold.records import TrainShape, TTGatherSpec
from tenfold.records.train_shape import Segments

# From this many ids on, repeated ones are looked for; they are computed once if at most this share is distinct.
_MANY = 256
_REPEATED = 0.7
# A list of all ids is made where there are at most this many times more than ids asked for; its memory is not cleared.
_LISTED = 64

# Compiled programs write out products with so few terms, so that what they pick goes through no memory.
_TERMS = 32

# Compiled and exported programs take any number of ids, and run as is best for this many.
COMPILED_IDS = 1024


def gather_rows(cores: Sequence[Tensor], shape: TrainShape, ids: Tensor, segments: Segments | None = None) -> Tensor:
    """Return the rows (n, columns) of ``ids`` (n,), computed from the cores of a train.

    Runs of cores that many rows share are multiplied out once for all of their rows (``TrainShape.segments``: it
    depends on the number of ids alone); then each row is one small product for each further run. Autograd gives dense
    gradients of the cores, which are small; no gradient has the size of the table.

    Args:
        cores: shapes ``shape.core_shapes``.
        shape: modes and ranks.
        ids: integers in 0..∏ row modes.
        segments: the runs; the best for this number of ids if left out.
    """
    device = cores[0].device.type
    if torch.is_autocast_enabled(device):  # which does not touch torch's own embedding either
        with torch.autocast(device, enabled=False):
            return gather_rows(cores, shape, ids, segments)
    segments = segments or shape.segments(len(ids))
    fused = _fused(cores)
    # (rows of a run, r, columns · r')
    tables = [_multiplied(cores[start:stop], in_place=fused).flatten(2) for start, stop in segments]
    picked = list(zip(tables, _indices(ids, shape.row_modes, segments), strict=True))
    if len(picked) == 2 and not torch.compiler.is_compiling():
        (left, i), (right, j) = picked
        inner = shape.sides[segments[1][0]]
        found: Tensor = JoinPicked.apply(left.reshape(len(left), -1, inner), right, i, j)  # type: ignore[no-untyped-call]
        return found
    return _joined(picked, ids.shape[0], fused=fused)


def _joined(picked: Sequence[tuple[Tensor, Tensor]], count: int, *, fused: bool) -> Tensor:
    """Return the products, row by row, of what is picked from each table."""
    found: Tensor | None = None
    product = sum_of_terms if fused else join
    for table, index in picked:
        part = F.embedding(index, table.flatten(1)).view(count, *table.shape[1:])
        found = part if found is None else product(found.reshape(count, -1, table.shape[1]), part)
    assert found is not None  # noqa: S101 - a train has a core
    return found.reshape(count, -1)


def _fused(cores: Sequence[Tensor]) -> bool:
    """Return whether a compiler is to make one kernel of picking and multiplying; exported programs keep products."""
    graph = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return compiled and not graph and all(core.shape[1] <= _TERMS for core in cores)


def gather_distinct(
    cores: Sequence[Tensor], shape: TrainShape, ids: Tensor, compiled: Segments | None = None
) -> Tensor:
    """Return what ``gather_rows`` does, with ids that repeat computed once where many do.

    Looking for them takes 2 % of the time of computing them. Not under ``torch.compile`` and ``torch.export``, where
    the number of distinct ids would be a shape that depends on data: there the cores are run through in the segments
    ``compiled``, whatever the number of ids, so that it may stay open.
    """
    if torch.compiler.is_compiling():
        return gather_rows(cores, shape, ids, compiled)
    if len(ids) < _MANY:
        return gather_rows(cores, shape, ids)
    found = distinct_ids(ids, prod(shape.row_modes), _REPEATED * len(ids))
    if found is None:
        return gather_rows(cores, shape, ids)
    distinct, inverse = found
    return gather_rows(cores, shape, distinct).index_select(0, inverse)


def distinct_ids(ids: Tensor, size: int, most: float) -> tuple[Tensor, Tensor] | None:
    """Return the distinct ids, in any order, and where each id stands among them; None if they are more than ``most``.

    Without sorting where the numbers below ``size`` are not very many more than the ids: every id writes its place to
    the entry of a list that it names, and those that read their own place there stand for all of their kind.
    """
    if size > _LISTED * len(ids):
        distinct, inverse = ids.unique(return_inverse=True)
        return None if len(distinct) > most else (distinct, inverse)
    places = torch.arange(len(ids), device=ids.device)
    standing = places.new_empty(size).scatter_(0, ids.long(), places).index_select(0, ids)
    stands = standing == places
    if int(torch.count_nonzero(stands)) > most:
        return None
    return ids[stands], (stands.cumsum(0) - 1).index_select(0, standing)


def split_cores(flat: Tensor, shape: TrainShape) -> tuple[Tensor, ...]:
    """Return the cores that lie one after the other in ``flat``, as views."""
    sizes = [a * b * c * d for a, b, c, d in shape.core_shapes]
    parts = flat[: shape.num_params].split(sizes)
    return tuple(part.view(core) for part, core in zip(parts, shape.core_shapes, strict=True))


def _indices(ids: Tensor, modes: Sequence[int], segments: Segments) -> list[Tensor]:
    """Return for each run where its rows lie in its table: there the first mode is the fastest, in ids the slowest."""
    found, rest = [], ids
    for start, stop in reversed(segments):
        own, number = modes[start:stop], rest
        if start:
            rest = number.div(prod(own), rounding_mode="floor")
            number = number - rest * prod(own)
        if len(own) > 1:
            places = torch.arange(prod(own), device=ids.device).view(*reversed(own))
            number = places.permute(*reversed(range(len(own)))).reshape(-1).index_select(0, number)
        found.append(number)
    return found[::-1]


def _multiplied(cores: Sequence[Tensor], *, in_place: bool = False) -> Tensor:
    """Return all products (rows, r, columns, r') of a run of cores, the first row mode the fastest.

    With ``in_place`` each product lies in memory as it is read later, also where one large product and a turn of the
    memory are faster: a compiler would make the turn part of every loop that reads.
    """
    table = cores[0]
    for core in cores[1:]:
        rows, left, columns, inner = table.shape
        mode, _, more, right = core.shape
        flat = table.reshape(-1, inner)
        if in_place or more * right >= NARROW:
            product = torch.bmm(flat.expand(mode, -1, -1), core.reshape(mode, inner, -1))  # matmul would transpose
        else:
            wide = core.movedim(0, 1).reshape(inner, -1)
            product = (flat @ wide).view(-1, mode, more * right).transpose(0, 1)
        table = product.reshape(mode * rows, left, columns * more, right)
    return table


class Gather(nn.Module):
    """One gather of rows from a train whose cores lie in one flat weight; see ``TTGatherSpec``."""

    bias = None

    def __init__(self, spec: TTGatherSpec, weight: nn.Parameter) -> None:
        super().__init__()
        self.spec = spec
        self.weight = weight
        self._compiled = spec.shape.segments(COMPILED_IDS)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (*ids, columns)."""
        shape, flat = self.spec.shape, ids.reshape(-1)
        found = gather_distinct(split_cores(self.weight, shape), shape, flat, self._compiled)
        if self.spec.padding_idx is not None:
            padding = self.weight[shape.num_params :].detach()
            found = torch.where((flat == self.spec.padding_idx).unsqueeze(-1), padding, found)
        return found.view(*ids.shape, -1)

    def extra_repr(self) -> str:
        """Return rows, modes and ranks."""
        s = self.spec.shape
        return f"{self.spec.rows}, row_modes={s.row_modes}, col_modes={s.col_modes}, ranks={s.ranks}"
