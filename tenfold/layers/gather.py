"""Rows of a table that is a tensor train, found without ever forming the table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.layers.joining import NARROW, JoinPicked, join
from tenfold.records import GatherSpec, TrainShape
from tenfold.records.gather import Segments

# From this many ids on, repeated ones are looked for; they are computed once if at most this share is distinct.
_MANY = 256
_REPEATED = 0.7

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
    digits, segments = _digits(ids, shape.row_modes), segments or shape.segments(len(ids))
    picked = []
    for start, stop in segments:
        table = _multiplied(cores[start:stop]).flatten(2)  # (rows of the run, r, columns · r')
        picked.append((table, _index(digits[start:stop], shape.row_modes[start:stop])))
    if len(picked) == 2 and not torch.compiler.is_compiling():
        (left, i), (right, j) = picked
        inner = shape.sides[segments[1][0]]
        found: Tensor = JoinPicked.apply(left.reshape(len(left), -1, inner), right, i, j)  # type: ignore[no-untyped-call]
        return found
    return _joined(picked, ids.shape[0])


def _joined(picked: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the products, row by row, of what is picked from each table."""
    found: Tensor | None = None
    for table, index in picked:
        part = F.embedding(index, table.flatten(1)).view(count, *table.shape[1:])
        found = part if found is None else join(found.reshape(count, -1, table.shape[1]), part)
    assert found is not None  # noqa: S101 - a train has a core
    return found.reshape(count, -1)


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
    distinct, inverse = ids.unique(return_inverse=True)
    if len(distinct) > _REPEATED * len(ids):
        return gather_rows(cores, shape, ids)
    return F.embedding(inverse, gather_rows(cores, shape, distinct))


def split_cores(flat: Tensor, shape: TrainShape) -> tuple[Tensor, ...]:
    """Return the cores that lie one after the other in ``flat``, as views."""
    sizes = [a * b * c * d for a, b, c, d in shape.core_shapes]
    parts = flat[: shape.num_params].split(sizes)
    return tuple(part.view(core) for part, core in zip(parts, shape.core_shapes, strict=True))


def _digits(ids: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Return the mixed-radix digits of the ids, the first the slowest."""
    digits, rest = [], ids
    for mode in reversed(modes[1:]):
        digits.append(rest % mode)
        rest = rest.div(mode, rounding_mode="floor")
    return [rest, *reversed(digits)]


def _index(digits: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """Return where the rows of a run lie in its table: there the first mode is the fastest."""
    index, place = digits[0], modes[0]
    for digit, mode in zip(digits[1:], modes[1:], strict=True):
        index, place = index + digit * place, place * mode
    return index


def _multiplied(cores: Sequence[Tensor]) -> Tensor:
    """Return all products (rows, r, columns, r') of a run of cores, the first row mode the fastest."""
    table = cores[0]
    for core in cores[1:]:
        rows, left, columns, inner = table.shape
        mode, _, more, right = core.shape
        flat = table.reshape(-1, inner)
        if more * right >= NARROW:
            product = torch.matmul(flat, core.reshape(mode, inner, -1))
        else:
            wide = core.movedim(0, 1).reshape(inner, -1)
            product = (flat @ wide).view(-1, mode, more * right).transpose(0, 1)
        table = product.reshape(mode * rows, left, columns * more, right)
    return table


class Gather(nn.Module):
    """One gather of rows from a train whose cores lie in one flat weight; see ``GatherSpec``."""

    bias = None

    def __init__(self, spec: GatherSpec, weight: nn.Parameter) -> None:
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
