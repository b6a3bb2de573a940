"""Embeddings whose table is a tensor train: trained from scratch or made from a dense one, never multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import WeightError
from tenfold.layers.tt_gather import COMPILED_IDS, gather_distinct, gather_rows
from tenfold.layers.tt_logits import train_logits
from tenfold.layers.tt_modes import column_modes, each_rank, row_modes_for
from tenfold.records import TrainShape
from tenfold.tensors import version_of
from tenfold.tensors.trains import Cores, tt_core_std, tt_norm, ttm_svd, ttm_to_dense


class _Options(TypedDict, total=False):
    """Torch's own options of an embedding."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    device: Any
    dtype: Any


class _TrainTable(nn.Module):
    """A table (rows, columns) held as a train, with padding row and largest norm as ``nn.Embedding`` has them.

    Cores are held with the row mode first, (row mode, r, column mode, r'): a lookup reads slices that lie together.
    """

    cached_ids: Tensor | None
    cached_rows: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: int | Sequence[int] = 16,
        *,
        row_modes: Sequence[int] | None = None,
        col_modes: Sequence[int] | None = None,
        order: int = 3,
        std: float | None = None,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__()
        order = len(row_modes or col_modes or range(order))
        rows = tuple(row_modes) if row_modes else row_modes_for(num_embeddings, order)
        columns = tuple(col_modes) if col_modes else column_modes(embedding_dim, rows, ranks)
        if prod(rows) < num_embeddings or prod(columns) != embedding_dim or len(rows) != len(columns):
            msg = (
                f"row_modes={rows} must multiply to {num_embeddings} or more, col_modes={columns} to {embedding_dim}, "
                f"and both must be as many; leave them out to have them chosen"
            )
            raise WeightError(msg)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.shape = TrainShape(row_modes=rows, col_modes=columns, ranks=each_rank(ranks, len(rows)))
        self._compiled = self.shape.segments(COMPILED_IDS)
        # Glorot's variance, as Hrinchuk et al. have it.
        self.std = (2 / (num_embeddings + embedding_dim)) ** 0.5 if std is None else std
        self._follow(**options)
        self.register_buffer("cached_ids", None, persistent=False)
        self.register_buffer("cached_rows", None, persistent=False)
        self._cached_at: tuple[int | None, ...] = ()
        self.reset_parameters()

    def _follow(
        self,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Take over torch's own options."""
        _refuse(scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        self.padding_idx = _padding(padding_idx, self.num_embeddings)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = False, False
        self.cores = nn.ParameterList(torch.empty(s, device=device, dtype=dtype) for s in self.shape.core_shapes)

    def reset_parameters(self) -> None:
        """Draw normal cores, scaled so that the entries of the table have exactly the standard deviation ``std``."""
        with torch.no_grad():
            for core in self.cores:
                nn.init.normal_(core, std=tt_core_std(self.std, self.shape.ranks))
            size = prod(self.shape.row_modes) * self.embedding_dim
            seen = tt_norm(tuple(c.double() for c in self._train()))
            factor = float(self.std * size**0.5 / seen) if seen > 0 else 1.0
            for core in self.cores:
                core.mul_(factor ** (1 / len(self.cores)))

    def _train(self) -> Cores:
        """Return the cores (r, m·n, r') of the train that the table is."""
        return tuple(c.detach().transpose(0, 1).flatten(1, 2) for c in self.cores)

    def cores_ttm(self) -> Cores:
        """Return the cores (r, row mode, column mode, r') as ``tenfold.tensors`` has them; gradients flow through."""
        return tuple(core.transpose(0, 1) for core in self.cores)

    @property
    def weight(self) -> Tensor:
        """The table (rows, columns), multiplied out on every access: what the layer exists to avoid."""
        table: Tensor = ttm_to_dense(self.cores_ttm())[: self.num_embeddings]
        if self.padding_idx is None:
            return table
        keep = torch.ones(self.num_embeddings, 1, dtype=table.dtype, device=table.device)
        keep[self.padding_idx] = 0
        kept: Tensor = table * keep
        return kept

    def _rows(self, ids: Tensor) -> Tensor:
        """Return rows (n, columns) as they are looked up: the padding zero, none longer than ``max_norm``."""
        return self._finished(gather_rows(list(self.cores), self.shape, ids), ids)

    def _finished(self, rows: Tensor, ids: Tensor) -> Tensor:
        if self.padding_idx is not None:
            rows = rows.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)
        if self.max_norm is None:
            return rows
        size = torch.linalg.vector_norm(rows.detach(), ord=self.norm_type, dim=-1, keepdim=True)
        shortened: Tensor = rows * (self.max_norm / (size + 1e-7)).clamp(max=1)
        return shortened

    def _checked(self, ids: Tensor) -> Tensor:
        """Return the ids, flat; ids beyond the table would else name unused rows of the last core."""
        flat = ids.reshape(-1)
        if not torch.compiler.is_compiling() and flat.numel() and flat.device.type == "cpu":
            low, high = (int(v) for v in torch.aminmax(flat))
            if low < 0 or high >= self.num_embeddings:
                msg = f"ids are in 0..{self.num_embeddings - 1}, not {low if low < 0 else high}"
                raise IndexError(msg)
        return flat

    def cache(self, ids: Tensor) -> None:
        """Keep the rows of the ids that are looked up most often, multiplied out, for lookups without gradients.

        A cache holds what the cores say now (Yin et al. 2021, arXiv 2101.11714, have such rows trained on their own).
        Rows that the cores do not say any more are never read: after a step of training, call ``cache`` again. It is
        no part of the state dict. An empty tensor drops it.
        """
        if not ids.numel():
            self.cached_ids, self.cached_rows, self._cached_at = None, None, ()
            return
        with torch.no_grad():
            self.cached_ids = self._checked(ids).unique()
            self.cached_rows = self._rows(self.cached_ids)
        self._cached_at = self._versions()

    def _versions(self) -> tuple[int | None, ...]:
        return tuple(version_of(core) for core in self.cores)

    def _cache_serves(self) -> bool:
        fresh = self.cached_ids is not None and not torch.compiler.is_compiling()
        return (
            fresh
            and not torch.is_grad_enabled()
            and None not in self._cached_at
            and self._cached_at == self._versions()
        )

    def _from_cache(self, ids: Tensor) -> Tensor:
        hot, rows = self.cached_ids, self.cached_rows
        assert hot is not None  # noqa: S101 - asked before
        assert rows is not None  # noqa: S101
        place = torch.searchsorted(hot, ids).clamp_(max=len(hot) - 1)
        found = rows.index_select(0, place)
        missed = (hot[place] != ids).nonzero().squeeze(-1)
        if len(missed):
            others = ids[missed]
            found[missed] = self._finished(
                gather_distinct(list(self.cores), self.shape, others, self._compiled), others
            )
        return found

    @classmethod
    def _like(cls, dense: Any, ranks: int | Sequence[int], options: dict[str, Any]) -> Self:
        """Return a layer with the options of a dense one and the cores that TT-SVD finds for its table."""
        _refuse(scale_grad_by_freq=dense.scale_grad_by_freq, sparse=dense.sparse)
        made = cls(
            dense.num_embeddings,
            dense.embedding_dim,
            ranks,
            padding_idx=dense.padding_idx,
            max_norm=dense.max_norm,
            norm_type=dense.norm_type,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
            **options,
        )
        made._fill(dense.weight.detach())
        return made.train(dense.training)

    @torch.no_grad()
    def _fill(self, table: Tensor) -> None:
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        padded = table.new_zeros(prod(self.shape.row_modes), self.embedding_dim, dtype=wide)
        padded[: self.num_embeddings] = table.to(wide)
        if self.padding_idx is not None:
            padded[self.padding_idx] = 0
        found = ttm_svd(padded, self.shape.row_modes, self.shape.col_modes, self.shape.ranks)
        size = [core.norm() for core in found]
        common = prod(float(s) for s in size) ** (1 / len(size))
        for core, new, own in zip(self.cores, found, size, strict=True):
            core.copy_(new.transpose(0, 1) * (common / own if own > 0 else 1.0))

    @property
    def compression(self) -> float:
        """How many times fewer parameters than the dense table."""
        return self.num_embeddings * self.embedding_dim / self.shape.num_params

    def extra_repr(self) -> str:
        """Return sizes, modes and ranks."""
        s = self.shape
        modes = f"row_modes={s.row_modes}, col_modes={s.col_modes}, ranks={s.ranks}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {modes}{padding}"


class TTEmbedding(_TrainTable):
    """An embedding whose table is a tensor train: the rows asked for are multiplied out, the table never is.

    Hrinchuk et al. 2020, arXiv 1901.10787. Takes the place of ``nn.Embedding``; ``max_norm`` shortens the rows on their
    way out (torch renormalises its table in place) and is a constant to gradients, as in torch. Gradients of the cores
    are dense, and small. Negative and too large ids are refused.

    Args:
        num_embeddings: number of rows.
        embedding_dim: number of columns.
        ranks: one for every bond or one for each; taken as they are, also where a bond could not use all of it.
        row_modes: their product at least ``num_embeddings``, the first the slowest; chosen when left out.
        col_modes: their product ``embedding_dim``; chosen when left out.
        order: how many cores, where no modes are given.
        std: standard deviation of the entries of the table to begin with; (2/(rows + columns))^½ when left out.
        options: ``padding_idx``, ``max_norm``, ``norm_type``, ``device`` and ``dtype``, as in torch.
            ``scale_grad_by_freq`` and ``sparse`` are refused: gradients belong to cores, which all rows share.

    Raises:
        WeightError: modes that do not make the table, or an option that factors cannot have.

    Example:
        >>> layer = TTEmbedding(25_000, 256, 16, row_modes=(25, 30, 40), col_modes=(4, 8, 8))
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 256])
        >>> sum(p.numel() for p in layer.parameters()), int(layer.compression)
        (68160, 93)
    """

    @classmethod
    def from_embedding(cls, dense: nn.Embedding, ranks: int | Sequence[int] = 16, **options: Any) -> Self:
        """Return the layer with the TT-SVD of a trained table; ``options`` are modes, order.

        The padding row is zero whatever the dense one is.

        Example:
            >>> dense = nn.Embedding(12, 6)
            >>> layer = TTEmbedding.from_embedding(dense, 99, row_modes=(3, 4), col_modes=(2, 3))
            >>> torch.allclose(layer(torch.arange(12)), dense.weight, atol=1e-5)
            True
        """
        return cls._like(dense, ranks, options)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the rows (*input, columns)."""
        ids = self._checked(input)
        if self._cache_serves():
            rows = self._from_cache(ids)
        else:
            rows = self._finished(gather_distinct(list(self.cores), self.shape, ids, self._compiled), ids)
        return rows.view(*input.shape, self.embedding_dim)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return hidden (..., columns) @ tableᵀ (..., rows), for output layers tied to the embedding.

        The cores are contracted with the hidden states; neither the table nor its transpose is formed.
        """
        found = train_logits(list(self.cores), self.shape, hidden)[..., : self.num_embeddings]
        if self.padding_idx is None:
            return found
        ids = torch.arange(self.num_embeddings, device=hidden.device)
        return found.masked_fill(ids == self.padding_idx, 0)


class TTEmbeddingBag(_TrainTable):
    """Sums, means or maxima of the rows of a tensor train, bag by bag, as in ``nn.EmbeddingBag``.

    Options as in ``TTEmbedding``; ids of the padding take no part in a bag. Repeated ids, in whatever bag, are computed
    once.

    Args:
        num_embeddings: number of rows.
        embedding_dim: number of columns.
        ranks: as in ``TTEmbedding``.
        mode: ``sum``, ``mean`` or ``max``.
        include_last_offset: whether ``offsets`` ends with the number of ids.
        options: of ``TTEmbedding``.

    Example:
        >>> bag = TTEmbeddingBag(1000, 32, 8, mode="sum")
        >>> bag(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 3])).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: int | Sequence[int] = 16,
        *,
        mode: Literal["sum", "mean", "max"] = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, ranks, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_embedding(cls, dense: nn.EmbeddingBag, ranks: int | Sequence[int] = 16, **options: Any) -> Self:
        """Return the layer with the TT-SVD of a trained table; ``options`` are modes, order."""
        own = {"mode": dense.mode, "include_last_offset": dense.include_last_offset}
        return cls._like(dense, ranks, own | options)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's own name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return one row (bags, columns) for each bag: rows of 2-D input, or runs of flat input from ``offsets``."""
        flat = self._checked(input)
        distinct, inverse = flat.unique(return_inverse=True)
        rows = self._from_cache(distinct) if self._cache_serves() else self._rows(distinct)
        padding = None
        if self.padding_idx is not None:
            # A row of its own, past the others, stands for the padding, whether a bag has any or not.
            rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
            padding = len(distinct)
            inverse = torch.where(flat == self.padding_idx, padding, inverse)
        return F.embedding_bag(
            inverse.view(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


def _refuse(*, scale_grad_by_freq: bool, sparse: bool) -> None:
    option = "scale_grad_by_freq" if scale_grad_by_freq else "sparse" if sparse else ""
    if option:
        msg = f"{option}=True needs gradients of rows, but all rows share the cores of a train: leave it out"
        raise WeightError(msg)


def _padding(index: int | None, rows: int) -> int | None:
    if index is None:
        return None
    if not -rows <= index < rows:
        msg = f"padding_idx={index} is outside of the {rows} rows"
        raise WeightError(msg)
    return index % rows
