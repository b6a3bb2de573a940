"""The table of an embedding as a tensor train, its rows gathered from the cores."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Rank, Structure
from tenfold.formats.train import Runs, TrainFormat
from tenfold.records import LayerSpec, Shape, TrainShape, TTGatherSpec
from tenfold.records.train_shape import segmentations
from tenfold.tensors import mode_factors, trains


@FORMATS.register("tt_embedding")
class TTEmbeddingFormat(TrainFormat):
    """Rows and columns split into three modes each, in pairs; a row is the product of one slice of each core.

    (Hrinchuk et al. 2020, arXiv 1901.10787.) Parameters Σ r·mₖ·nₖ·r'. Row modes may multiply to more than there are
    rows; those that nothing asks for are zero in the table that is decomposed. The row of a ``padding_idx`` is kept
    apart, as it is, for padding that the others shine through would not be padding.
    """

    rank_names: ClassVar[tuple[str, ...]] = ("r1", "r2")
    order: ClassVar[int] = 3
    data_aware_algorithm: ClassVar[str | None] = None
    splits_inputs: ClassVar[bool] = False  # row modes may be padded

    def __init__(self, spec: LayerSpec, *, padding: Tensor | None = None, **cores: Tensor) -> None:
        super().__init__(spec, **cores)
        object.__setattr__(self, "_padding", padding)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for all but embeddings whose gradients are dense."""
        if spec.kind != "embedding":
            return "tt_embedding serves embeddings"
        if spec.sparse:
            return "tt_embedding has dense gradients, which are small; low_rank serves embeddings with sparse ones"
        if min(spec.in_channels, spec.out_channels) == 1:
            return "the table has rank 1 already: there is nothing to drop"
        return None

    @classmethod
    def pairs(cls, spec: LayerSpec) -> tuple[Shape, Shape]:
        """Return the row modes, ascending and padded where that pays, and the column modes, descending: balanced."""
        columns = mode_factors(spec.out_channels, cls.order, pad=False).modes
        return mode_factors(spec.in_channels, cls.order).modes, tuple(reversed(columns))

    @classmethod
    def input_modes(cls, spec: LayerSpec) -> Shape:
        """Return the row modes, whose product may be larger than the number of rows."""
        return cls.pairs(spec)[0]

    @classmethod
    def modes(cls, spec: LayerSpec) -> Shape:
        """Return (m₁n₁, m₂n₂, m₃n₃)."""
        return tuple(m * n for m, n in zip(*cls.pairs(spec), strict=True))

    @classmethod
    def to_tensor(cls, weight: Tensor, spec: LayerSpec) -> Tensor:
        """Return the tensor of the table, with zeros for the padding and for rows that nothing asks for."""
        rows, columns = cls.pairs(spec)
        table = weight.mT  # (1, rows, columns)
        if spec.padding_idx is not None:
            table = table.clone()
            table[:, spec.padding_idx] = 0
        unused = prod(rows) - spec.in_channels
        table = torch.cat([table, table.new_zeros(len(table), unused, spec.out_channels)], dim=1)
        return trains.paired(table, rows, columns)

    @classmethod
    def from_tensor(cls, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return the weight (1, columns, rows) without the rows that nothing asks for."""
        return trains.unpaired(tensor, *cls.pairs(spec))[:, : spec.in_channels].mT

    @classmethod
    def beside(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the row of the padding."""
        return {} if spec.padding_idx is None else {"padding": weight[:, :, spec.padding_idx]}

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the one gather."""
        return (TTGatherSpec(rows=spec.in_channels, shape=cls._shape(spec, rank), padding_idx=spec.padding_idx),)

    @classmethod
    def cost_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any], in_shape: Shape) -> tuple[Any, Any]:
        """Return parameters, the row of the padding included, and multiply-accumulates."""
        shape, count = cls._shape_of_runs(spec, runs, sides), prod(in_shape)
        ways, size = segmentations(len(runs)), np.shape(sides[len(sides) // 2])
        costs, macs = (
            np.stack([np.broadcast_to(of(way, count), size) for way in ways]) for of in (shape.cost_by, shape.macs_by)
        )
        least = np.take_along_axis(macs, costs.argmin(0)[None], 0)[0]
        return shape.num_params + (0 if spec.padding_idx is None else spec.out_channels), least

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the flat weight of the gather."""
        rank = cls.check_rank(spec, rank)
        shapes = cls._shape(spec, rank).core_shapes
        sizes = [prod(shape) for shape in shapes]
        (flat,) = chain
        parts = flat[: sum(sizes)].split(sizes)
        cores = [cls._joined(spec, rank, at, part.view(shapes[at])) for at, part in enumerate(parts)]
        apart = {} if spec.padding_idx is None else {"padding": flat[sum(sizes) :][None]}
        return cls(spec, **cls.named_cores(spec, rank, cores), **apart)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the flat weight: cores (row mode, r, column mode, r'), and the row of the padding."""
        rank = self.rank
        parts = [self._apart(self.spec, rank, at, core).flatten() for at, core in enumerate(self.cores)]
        padding = vars(self)["_padding"]
        return (torch.cat(parts if padding is None else [*parts, padding[0]]),)

    def to_grouped(self) -> Tensor:
        """Return the weight (1, columns, rows), the row of the padding put in."""
        dense = super().to_grouped()
        padding, index = vars(self)["_padding"], self.spec.padding_idx
        if padding is None or index is None:
            return dense
        here = torch.eq(torch.arange(self.spec.in_channels, device=dense.device), index)
        return torch.where(here, padding[:, :, None], dense)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores (1, r, m·n, r') of the runs, in order."""
        return tuple(super().tensors().values())

    @property
    def rank(self) -> Rank:
        """The ranks of both bonds; of one inside a run what the run lets it carry."""
        return self.rank_of(super().tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return the cores by name, and the row of the padding where there is one."""
        padding = vars(self)["_padding"]
        return super().tensors() | ({} if padding is None else {"padding": padding})

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` (≥ 0) times the table."""
        cores = super().tensors()
        share = factor ** (1 / len(cores))
        changed: dict[str, Any] = {name: core * share for name, core in cores.items()}
        padding = vars(self)["_padding"]
        return self.map(**changed, **({} if padding is None else {"padding": padding * factor}))

    @classmethod
    def _shape(cls, spec: LayerSpec, rank: Rank) -> TrainShape:
        """Return modes and ranks of the runs."""
        rank = cls.check_rank(spec, rank)
        return cls._shape_of_runs(spec, cls.runs(spec, rank), cls.sides(spec, rank))

    @classmethod
    def _shape_of_runs(cls, spec: LayerSpec, runs: Runs, sides: Sequence[Any]) -> TrainShape:
        rows, columns = cls.pairs(spec)
        return TrainShape(
            row_modes=tuple(prod(rows[first : last + 1]) for first, last in runs),
            col_modes=tuple(prod(columns[first : last + 1]) for first, last in runs),
            ranks=tuple(sides[1:-1]),
        )

    @classmethod
    def _apart(cls, spec: LayerSpec, rank: Rank, at: int, core: Tensor) -> Tensor:
        """Return the core (1, r, m₁n₁m₂n₂..., r') of a run as (rows, r, columns, r')."""
        (first, last), (rows, columns) = cls.runs(spec, rank)[at], cls.pairs(spec)
        pairs = [m * n for m, n in zip(rows[first : last + 1], columns[first : last + 1], strict=True)]
        matrices = core[0].movedim(1, -1).unflatten(-1, pairs)  # (r, r', m₁n₁, ...)
        return trains.unpaired(matrices, rows[first : last + 1], columns[first : last + 1]).permute(2, 0, 3, 1)

    @classmethod
    def _joined(cls, spec: LayerSpec, rank: Rank, at: int, core: Tensor) -> Tensor:
        """Return the core (rows, r, columns, r') of a run as the train has it; undoes ``_apart``."""
        (first, last), (rows, columns) = cls.runs(spec, rank)[at], cls.pairs(spec)
        tensor = trains.paired(core.permute(1, 3, 0, 2), rows[first : last + 1], columns[first : last + 1])
        return tensor.flatten(2).movedim(-1, 1)[None].contiguous()
