"""Units of which some channels are chosen: the pivot on these alone, and the layers before it without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.formats import Factorization
from tenfold.formats.tucker1 import Tucker1
from tenfold.layers import FactorizedLayer, dense_weight, spec_of
from tenfold.records import LayerProfile, Unit
from tenfold.units.base import Narrowing, PivotFit, Size, UnitKind
from tenfold.units.members import holder, inputs
from tenfold.units.narrow_layers import choice_of, kept_channels, kept_outputs, narrowed_layer


class ChannelChoice(UnitKind):
    """Base of the kinds that choose channels between layers, by what the pivot makes of those that stay."""

    size_names = ("width",)

    def unit_of(self, feeders: Sequence[str], pivot: LayerProfile) -> Unit:
        """Return the unit of a pivot and the layers that feed it."""
        return Unit(
            kind=self.name(),
            path=holder([*feeders, pivot.path]),
            pivot=pivot.path,
            feeders=tuple(feeders),
            full={"width": inputs(pivot)},
        )

    def pivot_fit(self, unit: Unit, size: Size) -> PivotFit:
        """Return a choice of the inputs of the pivot."""
        del unit
        return PivotFit("tucker1", {"rank": size["width"]}, {"name": "column_selection"})

    def sample(self, model: nn.Module, unit: Unit, size: Size) -> Factorization:
        """Return some of the inputs of the pivot."""
        return sampled_choice(model.get_submodule(unit.pivot), size["width"])

    def narrowed(self, model: nn.Module, unit: Unit, size: Size, pivot: FactorizedLayer | None) -> Narrowing:
        """Return the layers with the channels that stay."""
        return Narrowing(narrowed_choice(model, unit, size["width"], pivot))


def sampled_choice(pivot: nn.Module, size: int) -> Factorization:
    """Return every n-th input channel of a layer, with its own weights: a choice that needs no data."""
    spec, reason = spec_of(pivot)
    if spec is None:
        raise PlanError(reason)
    weight = dense_weight(pivot).detach()
    chosen = torch.linspace(0, spec.in_channels - 1, size).round().long()
    choice = weight.new_zeros(1, size, spec.in_channels)
    choice[0, torch.arange(size), chosen] = 1.0
    return Tucker1(spec, core=weight[None][:, :, chosen.to(weight.device)], in_factor=choice)


def narrowed_choice(model: nn.Module, unit: Unit, size: int, pivot: FactorizedLayer | None) -> dict[str, nn.Module]:
    """Return the layers of a unit with the channels that the pivot has chosen; with the first ones for a structure.

    Raises:
        PlanError: the inner factor of the pivot chooses no channels but mixes them.
    """
    old: Any = model.get_submodule(unit.pivot)
    weight = dense_weight(old).detach()
    if pivot is None:
        core, bias, mix = weight[:, :size], old.bias, _first(size, weight)
    else:
        core, bias, mix = _factors(pivot)
        if choice_of(mix) is None:
            msg = f"the pivot {unit.pivot!r} of {unit.kind} mixes channels where it should choose some: fit it again"
            raise PlanError(msg)
    layers = {path: _kept(model.get_submodule(path), mix) for path in unit.feeders}
    return {**layers, unit.pivot: narrowed_layer(old, core, bias)}


def _kept(layer: nn.Module, mix: Tensor) -> nn.Module:
    """Return a layer with the chosen channels alone: its outputs, or all of it where it treats every channel alone."""
    spec, chosen = spec_of(layer)[0], choice_of(mix)
    alone = spec is None or spec.groups == spec.in_channels == spec.out_channels
    return kept_channels(layer, chosen) if alone and chosen is not None else kept_outputs(layer, mix)


def _factors(pivot: FactorizedLayer) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the weight on the chosen channels, the bias, and the choice (size, in)."""
    value = pivot.factorization()
    parts = value.tensors()
    if parts.keys() != {"core", "in_factor"}:
        msg = f"the pivot of a unit is factorized as tucker1, not as {value.name()}: edit the plan of both or neither"
        raise PlanError(msg)
    core, choice = (parts[name][0].detach() for name in ("core", "in_factor"))
    return core.reshape(*core.shape[:2], *value.spec.kernel), pivot.bias, choice


def _first(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, like.shape[1], dtype=like.dtype, device="cpu")  # also where models are built on meta
