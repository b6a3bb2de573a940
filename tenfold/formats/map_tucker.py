"""A linear layer behind a flattened feature map as a tensor regression: a factor for each mode, and a core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.formats.base import FORMATS, Factorization, Ints, Rank, Structure, combinations, distinct, total_cost
from tenfold.records import ContractSpec, LayerSpec, Shape, SubLayerSpec

# Modes of the map by the name of their rank, in the order in which they are flattened, and their fields.
_MODES = {"in": "in_factor", "height": "height_factor", "width": "width_factor"}


@FORMATS.register("tensor_regression")
@dataclass(frozen=True, eq=False)
class MapTucker(Factorization):
    """Width, height and channels of a flattened map contracted with small factors, then two linear layers.

    W (out, channels, height, width) = core ×_out ``out_factor`` ×_in ``in_factor`` ×_height ``height_factor`` ×_width
    ``width_factor`` (Tucker; tensor regression networks: Kossaifi et al. 2020, arXiv 1707.08308). A rank equal to its
    mode drops that factor. Parameters r_in·r_h·r_w·r_out + in·r_in + height·r_h + width·r_w + out·r_out.
    """

    core: Tensor  # (1, r_out, r_in, r_height, r_width)
    out_factor: Tensor | None = None  # (1, out, r_out); None where r_out = out, and so for all
    in_factor: Tensor | None = None  # (1, channels, r_in)
    height_factor: Tensor | None = None  # (1, height, r_height)
    width_factor: Tensor | None = None  # (1, width, r_width)

    rank_names: ClassVar[tuple[str, ...]] = ("out", *_MODES)
    default_algorithm: ClassVar[str] = "map_hooi"
    data_aware_algorithm: ClassVar[str | None] = "whitened_hosvd"
    reads_map: ClassVar[bool] = True

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        """Return a reason for all but linear layers behind a flattened map of channels, height and width."""
        if spec.kind != "linear" or len(spec.in_modes) != len(_MODES):
            return "tensor_regression needs a linear layer behind a flattened map (channels, height, width)"
        return None

    @classmethod
    def max_rank(cls, spec: LayerSpec) -> Rank:
        """Return the modes {out, in: channels, height, width}."""
        return {"out": spec.out_channels} | dict(zip(_MODES, spec.in_modes, strict=True))

    @classmethod
    def structure(cls, spec: LayerSpec, rank: Rank) -> Structure:
        """Return the contractions of width, height and channels that are not full, the core, and the outputs."""
        wide = spec.mix(prod(rank[name] for name in _MODES), rank["out"], bias=spec.bias)
        if rank["out"] == spec.out_channels:
            return (*_contractions(spec, rank), wide)
        last = spec.mix(rank["out"], spec.out_channels, bias=spec.bias)
        return (*_contractions(spec, rank), wide.replace(bias=False), last)

    @classmethod
    def cost(cls, spec: LayerSpec, ranks: Ints, in_shape: Shape) -> tuple[Ints, Ints]:
        """Return parameters and multiply-accumulates of what ``structure`` lists, at many ranks at once."""
        most, positions = cls.max_rank(spec), spec.positions(in_shape)[1]
        out, *inner = (ranks[:, at] for at in range(len(cls.rank_names)))
        sizes = dict(zip(_MODES, inner, strict=True))
        steps = []
        for place, name in reversed(list(enumerate(_MODES))):
            carried = prod(spec.in_modes[:place]) * prod(inner[place + 1 :])
            weights = (sizes[name] < most[name]) * most[name] * sizes[name]
            steps.append((weights, positions * carried))
        steps += [(prod(inner) * out, positions), ((out < most["out"]) * most["out"] * out, positions)]
        return total_cost(spec, steps)

    @classmethod
    def rank_grid(cls, spec: LayerSpec, axis: Callable[[int], Sequence[int]]) -> Ints:
        """Return all pairs of output and channel ranks, with the same rank along height and width up to their sizes."""
        most = cls.max_rank(spec)
        sides = range(1, max(most["height"], most["width"]) + 1)
        rows = combinations([axis(most["out"]), axis(most["in"]), sides])
        height, width = (rows[:, 2].clip(max=most[name]) for name in ("height", "width"))
        return distinct(np.column_stack([rows[:, :2], height, width]))

    @classmethod
    def unfoldings(cls, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the unfolding along each mode."""
        tensor = weight.unflatten(2, spec.in_modes)
        return {name: tensor.movedim(at, 1).flatten(2) for at, name in enumerate(cls.rank_names, 1)}

    @classmethod
    def from_chain(cls, spec: LayerSpec, rank: Rank, chain: Sequence[Tensor]) -> Self:
        """Return the factorization from the weights of the contractions and of one or two linear layers."""
        rest = list(chain)
        factors = {_MODES[name]: rest.pop(0).mT[None] for name in _reduced(spec, rank)}
        outer = rest.pop().reshape(1, spec.out_channels, -1) if rank["out"] < spec.out_channels else None
        (core,) = rest
        shape = (1, rank["out"], *(rank[name] for name in _MODES))
        return cls(spec, core=core.reshape(shape), out_factor=outer, **factors)

    def chain(self) -> tuple[Tensor, ...]:
        """Return the weights of the contractions, the core as a matrix, and the output factor where there is one."""
        factors = [getattr(self, _MODES[name])[0].mT for name in _reduced(self.spec, self.rank)]
        last = () if self.out_factor is None else (self.out_factor,)
        return (*factors, self.core.flatten(2), *last)

    @property
    def rank(self) -> Rank:
        """The sides of the core."""
        return dict(zip(self.rank_names, self.core.shape[1:], strict=True))

    def to_grouped(self) -> Tensor:
        """Return the core multiplied with the factor of each mode, the modes of the map flattened."""
        weight = self.core
        for at, factor in enumerate((self.out_factor, *(getattr(self, field) for field in _MODES.values())), 1):
            if factor is not None:
                weight = torch.einsum("gnr,g...r->g...n", factor, weight.movedim(at, -1)).movedim(-1, at)
        return weight.flatten(2)

    def scaled(self, factor: float) -> Self:
        """Return the factorization of ``factor`` times the weight: the core takes it, the factors stay orthonormal."""
        return self.map(core=self.core * factor)

    def balanced(self) -> Self:
        """Return orthonormal factors, with the core as it is seen through them."""
        core, framed = self.core, {}
        for at, field in enumerate(("out_factor", *_MODES.values()), 1):
            factor = getattr(self, field)
            if factor is not None and factor.shape[1] >= factor.shape[2]:
                framed[field], triangle = torch.linalg.qr(factor)
                core = torch.einsum("gsr,g...r->g...s", triangle, core.movedim(at, -1)).movedim(-1, at)
        return self.map(core=core, **framed)


def _reduced(spec: LayerSpec, rank: Rank) -> list[str]:
    """Return the modes of the map that have a factor, in the order in which they are contracted: the last one first."""
    full = dict(zip(_MODES, spec.in_modes, strict=True))
    return [name for name in reversed(_MODES) if rank[name] < full[name]]


def _contractions(spec: LayerSpec, rank: Rank) -> list[SubLayerSpec]:
    """Return the products with the factors: width first, which is carried along by the most, and channels last."""
    names, sizes = list(_MODES), list(spec.in_modes)
    found: list[SubLayerSpec] = []
    for name in _reduced(spec, rank):
        at = names.index(name)
        found.append(ContractSpec.middle(prod(sizes[:at]), sizes[at], prod(sizes[at + 1 :]), rank[name]))
        sizes[at] = rank[name]
    return found
