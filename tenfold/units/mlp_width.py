"""The hidden units of an MLP: which of them stay, by their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from tenfold.records import LayerProfile, LayerSpec, Profile, Unit
from tenfold.units.base import UNITS, Size
from tenfold.units.channel_choice import ChannelChoice
from tenfold.units.members import inputs, narrowable, outputs, parent


@UNITS.register("mlp_width")
class MLPWidth(ChannelChoice):
    """Hidden units of an MLP, plain or gated: some stay, the second matrix is refitted to make up for the others.

    The pivot is the second matrix W₂ of W₂ φ(W₁ x) or W₂ (φ(W₁ x) ⊙ W₃ x): W₂ ≈ A S with S a choice of hidden units, A
    their least-squares refit on the data (``column_selection``; Nyström of MoDeGPT, Lin et al. 2024, arXiv 2408.09632).
    The layers before keep the rows S, which is exact, since nothing mixes hidden units in between. Of k units both cost
    k·(in + out) and their biases: all of it falls with k, and no matrix product is added.
    """

    def candidates(self, model: nn.Module, profile: Profile) -> Iterator[Unit]:
        """Iterate over linear layers with one or two others near them whose outputs are as many as their inputs.

        Hidden units are no fewer than the outputs, and more if the MLP is gated: else the projections of every
        attention would look like one.
        """
        del model
        linear = [layer for layer in profile.layers if layer.spec is not None and layer.spec.kind == "linear"]
        linear = [layer for layer in linear if narrowable(layer)]
        for place, pivot in enumerate(linear):
            least = inputs(pivot) - outputs(pivot)
            for feeders in _feeders(linear, place):
                if least >= len(feeders) - 1:
                    yield self.unit_of(feeders, pivot)

    def stands_out(self, unit: Unit, profile: Profile) -> bool:
        """Whether it is wider than its outputs, and the module around it holds no other linear layers."""
        inside = f"{unit.path}." if unit.path else ""
        linear = {layer.path for layer in profile.layers if layer.spec is not None and layer.spec.kind == "linear"}
        wider = unit.full["width"] > outputs(profile.layer(unit.pivot))
        return wider and {path for path in linear if path.startswith(inside)} <= set(unit.members)

    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry with as many outputs, and inputs of the second matrix, as units stay."""
        width = size["width"]
        narrow = {path: specs[path].replace(out_channels=width) for path in unit.feeders}
        return narrow | {unit.pivot: specs[unit.pivot].replace(in_channels=width)}


def _feeders(linear: Sequence[LayerProfile], place: int) -> list[list[str]]:
    """Return which layers could feed the one at a place: its siblings, or the one or two before it."""
    pivot = linear[place]
    fitting = [_feeds(layer, pivot) for layer in linear]
    siblings = [layer.path for i, layer in enumerate(linear) if fitting[i] and parent(layer.path) == parent(pivot.path)]
    before = [linear[i].path for i in range(max(place - 2, 0), place) if fitting[i]]
    near = before[-1:] if place and fitting[place - 1] else []
    pair = before if len(before) == 2 else []
    tried = [found for found in (siblings, pair, near) if 1 <= len(found) <= 2]
    return [found for i, found in enumerate(tried) if found not in tried[:i]]


def _feeds(layer: LayerProfile, pivot: LayerProfile) -> bool:
    return layer is not pivot and outputs(layer) == inputs(pivot)
