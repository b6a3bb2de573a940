"""A layer on fewer inputs, each of them a mix of all: what a unit makes of its pivot, before others absorb the mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Factorization, Ints, Rank, Structure, proportional_cost
from tenfold.records import LayerSpec, Shape


@FORMATS.register("tucker1")
@dataclass(frozen=True, eq=False)
class Tucker1(Factorization):
    """A mix of the inputs into R channels, then the layer on these (partial Tucker along the inputs).

    W = core ×_in ``in_factor`` (Tucker-1; Kolda & Bader 2009, section 4). A linear layer is the product of two
    matrices, as in ``low_rank``, but R may be larger than the smaller side: it pays where another layer absorbs the
    mix, which units do (``tenfold list units``), and not by itself. Parameters R·(in + out·K) before, R·out·K after.
    """

    core: Tensor  # (groups, out/groups, R, *kernel)
    in_factor: Tensor  # (groups, R, in/groups)

    rank_names: ClassVar[tuple[str, ...]] = ("rank",)
    default_algorithm: ClassVar[str] = "column_selection"
    svd_bounds_error: ClassVar[bool] = False

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for what is no linear layer or convolution, and where there is one input only."""
        if spec.kind not in ("linear", "conv"):
            return f"tucker1 serves linear layers and convolutions, not {spec.kind} layers"
        if spec.group_shape[2] == 1:
            return "tucker1 mixes input channels, of which there is one only"
        return None

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return {rank: in/groups}, or the outputs where these are more: what a structured factor may need."""
        _, out, inner, *_ = spec.group_shape
        return {"rank": max(inner, out)}

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the mix of the inputs, and the layer on R channels per group."""
        inner = rank["rank"] * spec.groups
        return (spec.mix(spec.in_channels, inner), spec.core(inner, spec.out_channels, bias=spec.bias))

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates, which grow in proportion to the rank."""
        return proportional_cost(cls.structure(spec, {"rank": 1}), ranks[:, 0], in_shape)

    @classmethod
    def channels(cls, spec: LayerSpec, ranks: Ints) -> tuple[tuple[Any, Any], ...]:
        """Return those of the two layers: R for each group in between."""
        inner = ranks[:, 0] * spec.groups
        return (spec.in_channels, inner), (inner, spec.out_channels)

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfolding along the inputs (groups, in, out·kernel)."""
        del spec
        return {"rank": weight.transpose(1, 2).flatten(2)}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the mix and the layer behind it."""
        del rank
        mix, core = chain
        return cls(spec, core=core, in_factor=mix.flatten(2))

    def chain(self) -> tuple[Tensor, ...]:
        """Return the mix, then the layer behind it."""
        return self.in_factor, self.core

    @property
    def rank(self) -> Rank:
        """The one rank R."""
        return {"rank": self.in_factor.shape[1]}

    def to_grouped(self) -> Tensor:
        """Return core ×_in in_factor, per group."""
        groups, out, rank, *_ = self.core.shape
        core = self.core.reshape(groups, out, rank, -1)
        weight: Tensor = torch.einsum("gort,gri->goit", core, self.in_factor)
        return weight.reshape(*weight.shape[:3], *self.spec.kernel)

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` times the weight: the layer takes it, the mix stays what it is."""
        return self.map(core=self.core * factor)
