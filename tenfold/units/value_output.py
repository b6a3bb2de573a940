"""Values and outputs of attention: how wide the heads are that carry values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tenfold.formats import Factorization
from tenfold.formats.low_rank import LowRank
from tenfold.layers import FactorizedLayer, PaddedHeads, UnpaddedHeads, dense_weight
from tenfold.records import LayerSpec, Profile, Unit
from tenfold.units.attentions import HeadSizes, product_macs
from tenfold.units.base import UNITS, Narrowing, PivotFit, Size
from tenfold.units.head_blocks import factors, geometry_of, random_blocks, split_blocks, spread, within_heads
from tenfold.units.narrow_layers import narrowed_layer
from tenfold.units.one_head_size import attributes


@UNITS.register("value_output")
class ValueOutput(HeadSizes):
    """Width of the heads that carry values: the output projection reads, and the value projection makes, fewer entries.

    The pivot is the output projection W_o of Σ_h W_o,h Σ_j a_hj W_v,h x_j: W_o ≈ A diag(B_1 … B_heads), by
    ``head_inputs`` on what really enters it, attention included. The value projection becomes B_h W_v,h, which is exact
    since attention only averages over positions (MoDeGPT, Lin et al. 2024, arXiv 2408.09632). Query heads that share
    their values share B_h. Of size r both cost r/d of what they did. Serves every attention, rotary or not.
    """

    wide = "output"
    shared = "value"
    refitted = "output"

    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry with narrower heads of values and of what enters the output projection."""
        (value,), width = unit.feeders, size["head_size"]
        return {
            value: specs[value].replace(out_channels=unit.settings["groups"] * width),
            unit.pivot: specs[unit.pivot].replace(in_channels=unit.settings["heads"] * width),
        }

    def other_macs(self, unit: Unit, size: Size, profile: Profile) -> int:
        """Return those of the products of weights with values, which fall where the forward takes heads of any size."""
        if not unit.settings["native"]:
            return 0
        return product_macs(profile, unit.pivot, unit.feeders[0], unit.settings["heads"] * size["head_size"])

    def pivot_fit(self, unit: Unit, size: Size) -> PivotFit:
        """Return a low-rank output projection whose inner factor acts within heads."""
        heads, groups = unit.settings["heads"], unit.settings["groups"]
        algorithm = {"name": "head_inputs", "heads": heads, "shared": heads // groups}
        return PivotFit("low_rank", {"rank": heads * size["head_size"]}, algorithm)

    def sample(self, model: nn.Module, unit: Unit, size: Size) -> Factorization:
        """Return the output projection behind random subspaces of the heads."""
        heads, groups = unit.settings["heads"], unit.settings["groups"]
        inner = spread(random_blocks(heads, size["head_size"], unit.full["head_size"], heads // groups))
        spec, weight = geometry_of(model.get_submodule(unit.pivot))
        inner = inner.to(weight)
        return LowRank(spec, left=(weight @ inner)[None], right=inner.mT[None])

    def narrowed(self, model: nn.Module, unit: Unit, size: Size, pivot: FactorizedLayer | None) -> Narrowing:
        """Return the projections of values and outputs; narrow heads are padded for forwards that want one size."""
        (path,), full, width = unit.feeders, unit.full["head_size"], size["head_size"]
        heads, groups = unit.settings["heads"], unit.settings["groups"]
        value, output = model.get_submodule(path), model.get_submodule(unit.pivot)
        if pivot is None:
            blocks = random_blocks(heads, width, full, heads // groups)
            outer, bias = dense_weight(output).detach()[:, : heads * width], getattr(output, "bias", None)
        else:
            left, right = factors(unit, pivot)
            blocks, outer = split_blocks(unit, right.mT, left, heads)
            bias = pivot.bias
        narrow = {
            path: within_heads(value, blocks[:: heads // groups]),
            unit.pivot: narrowed_layer(output, outer, bias),
        }
        if unit.settings["native"]:
            return Narrowing(narrow, attributes(unit, width))
        ends = (PaddedHeads.of(narrow[path], groups, full), UnpaddedHeads.of(narrow[unit.pivot], heads, full))
        return Narrowing(dict(zip(unit.members, ends, strict=True)))
