"""Queries and keys of attention: in how many dimensions they meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from tenfold.formats import Factorization
from tenfold.formats.low_rank import LowRank
from tenfold.layers import FactorizedLayer, PaddedHeads
from tenfold.records import LayerSpec, Profile, Unit
from tenfold.units.attentions import NO_HEADS, attentions
from tenfold.units.base import UNITS, Narrowing, PivotFit, Size, UnitKind
from tenfold.units.head_blocks import factors, geometry_of, random_blocks, split_blocks, spread, turned_bias, within_heads
from tenfold.units.members import holder
from tenfold.units.narrow_layers import narrowed_layer


@UNITS.register("query_key")
class QueryKey(UnitKind):
    """Dimensions in which queries and keys meet: both projections of a head are reduced to the same subspace.

    The pivot is the key projection, W_k ≈ diag(L_1 … L_groups) R by ``head_outputs``: the output Gram matrix of the
    keys holds all that queries and softmax say. Scores are (W_q x)ᵀ L (R x'), so that queries take Lᵀ, for all query
    heads that share the keys, which is exact (CLOVER, Meng et al. 2025, arXiv 2411.17426; MoDeGPT, Lin et al. 2024,
    arXiv 2408.09632). What is the same for all keys cancels in the softmax. Of size r both cost r/d of what they did;
    scores are scaled as before. Not where something acts between projection and score: rotary positions, norms.
    """

    size_names = ("head_size",)

    def candidates(self, model: nn.Module, profile: Profile) -> Iterator[Unit]:
        """Iterate over attentions with a projection of queries and one of keys."""
        for found in attentions(model, profile):
            if "query" not in found.layers:
                continue
            heads, groups = found.heads("query"), found.heads("key")
            query, key = found.layers["query"].path, found.layers["key"].path
            unit = Unit(kind=self.name(), path=holder([query, key]), pivot=key, feeders=(query,))
            if not groups or not heads or heads % groups:
                yield unit.replace(keep_reason=NO_HEADS)
                continue
            yield unit.replace(full={"head_size": found.size}, settings={"heads": heads, "groups": groups})

    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry with narrower heads of queries and keys."""
        (query,), width = unit.feeders, size["head_size"]
        return {
            query: specs[query].replace(out_channels=unit.settings["heads"] * width),
            unit.pivot: specs[unit.pivot].replace(out_channels=unit.settings["groups"] * width),
        }

    def pivot_fit(self, unit: Unit, size: Size) -> PivotFit:
        """Return a low-rank key projection whose outer factor acts within heads."""
        groups = unit.settings["groups"]
        return PivotFit("low_rank", {"rank": groups * size["head_size"]}, {"name": "head_outputs", "heads": groups})

    def sample(self, unit: Unit, size: Size, pivot: nn.Module) -> Factorization:
        """Return the key projection in random subspaces of the heads."""
        outer = spread(random_blocks(unit.settings["groups"], size["head_size"], unit.full["head_size"]))
        spec, weight = geometry_of(pivot)
        outer = outer.to(weight)
        return LowRank(spec, left=outer[None], right=(outer.mT @ weight)[None])

    def narrowed(self, model: nn.Module, unit: Unit, size: Size, pivot: FactorizedLayer | None) -> Narrowing:
        """Return the projections of queries and keys to narrow heads, which are padded for the forward."""
        (path,), full, width = unit.feeders, unit.full["head_size"], size["head_size"]
        heads, groups = unit.settings["heads"], unit.settings["groups"]
        query, key = model.get_submodule(path), model.get_submodule(unit.pivot)
        if pivot is None:
            blocks = random_blocks(groups, width, full)
            narrow = within_heads(key, blocks)
        else:
            left, right = factors(unit, pivot)
            blocks, inner = split_blocks(unit, left, right.mT, groups)
            narrow = narrowed_layer(key, inner.mT, turned_bias(pivot.bias, blocks))
        asked = within_heads(query, blocks.repeat_interleave(heads // groups, dim=0))
        return Narrowing({path: PaddedHeads.of(asked, heads, full), unit.pivot: PaddedHeads.of(narrow, groups, full)})
