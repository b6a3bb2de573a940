"""The channels between two convolutions: which of them stay, by their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import nn

from tenfold.records import Cost, LayerProfile, LayerSpec, Profile, Unit
from tenfold.units.base import UNITS, Size
from tenfold.units.channel_choice import ChannelChoice
from tenfold.units.members import inputs, narrowable, outputs

_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d")


@UNITS.register("conv_width")
class ConvWidth(ChannelChoice):
    """Channels between two convolutions: some stay, the second convolution is refitted to make up for the others.

    The pivot is the second of: convolution, batch norm, activation, convolution; a depthwise convolution with its norm
    may lie in between. Its kernel is refitted on a choice of its input channels, with all taps (``column_selection``);
    channel pruning as of He et al. 2017 (arXiv 1707.06168), by the data and what the network loses. The layers before
    keep these channels, which is exact. No layer is added: so it stays fast where thin factors are not. Not used unless
    it is named.
    """

    default: ClassVar[bool] = False

    def candidates(self, model: nn.Module, profile: Profile) -> Iterator[Unit]:
        """Iterate over convolutions with another one before them whose outputs are as many as their inputs."""
        del model
        layers = [layer for layer in profile.layers if layer.params]
        for place, pivot in enumerate(layers):
            if narrowable(pivot) and _is_conv(pivot):
                feeders = _feeders(layers[:place], pivot)
                if feeders:
                    yield self.unit_of(feeders, pivot)

    def stands_out(self, unit: Unit, profile: Profile) -> bool:
        """Whether both ends sit in one module that is not the whole model: a block."""
        del profile
        return bool(unit.path)

    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry with as many channels between the convolutions as stay."""
        width = size["width"]
        narrow = {path: _narrower(specs[path], width) for path in unit.feeders if path in specs}
        return narrow | {unit.pivot: specs[unit.pivot].replace(in_channels=width)}

    def costs(self, unit: Unit, size: Size, profile: Profile) -> dict[str, Cost]:
        """Return what each member costs; the parameters of a norm are as many for each channel as before."""
        norms = {path: profile.layer(path) for path in unit.feeders if profile.layer(path).spec is None}
        share = {path: layer.params * size["width"] // unit.full["width"] for path, layer in norms.items()}
        return super().costs(unit, size, profile) | {path: Cost(params=params) for path, params in share.items()}


def _feeders(before: Sequence[LayerProfile], pivot: LayerProfile) -> list[str]:
    """Return the convolution before a pivot and what lies in between; nothing where that cannot be narrowed."""
    found: list[str] = []
    for layer in reversed(before):
        found.insert(0, layer.path)
        if _is_norm(layer) or _is_depthwise(layer):
            continue
        fits = _is_conv(layer) and narrowable(layer) and outputs(layer) == inputs(pivot)
        return found if fits else []
    return []


def _is_conv(layer: LayerProfile) -> bool:
    return layer.spec is not None and layer.spec.kind == "conv"


def _is_depthwise(layer: LayerProfile) -> bool:
    own = not (layer.tied or layer.read or layer.format or layer.aliases)
    return own and layer.spec is not None and layer.spec.groups == layer.spec.in_channels == layer.spec.out_channels


def _is_norm(layer: LayerProfile) -> bool:
    return layer.spec is None and layer.kind in _NORMS and not layer.tied and not layer.aliases


def _narrower(spec: LayerSpec, width: int) -> LayerSpec:
    depthwise = spec.groups == spec.in_channels == spec.out_channels
    return (
        spec.replace(in_channels=width, out_channels=width, groups=width)
        if depthwise
        else spec.replace(out_channels=width)
    )
