"""Queries and keys of attention: in how many dimensions they meet."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tenfold.formats import Factorization
from tenfold.formats.low_rank import LowRank
from tenfold.layers import FactorizedLayer, PaddedHeads, dense_weight
from tenfold.records import LayerSpec, Profile, Unit
from tenfold.units.attentions import Attention, HeadSizes, product_macs
from tenfold.units.base import UNITS, Narrowing, PivotFit, Size
from tenfold.units.head_blocks import (
    factors,
    geometry_of,
    random_blocks,
    split_blocks,
    spread,
    turned_bias,
    within_heads,
)
from tenfold.units.narrow_layers import narrowed_layer
from tenfold.units.one_head_size import attributes

_SCORES = 4.0  # how large scores are, about, where forwards are compared


@UNITS.register("query_key")
class QueryKey(HeadSizes):
    """Dimensions in which queries and keys meet: both projections of a head are reduced to the same subspace.

    The pivot is the key projection, W_k ≈ diag(L_1 … L_groups) R by ``head_outputs``: the output Gram matrix of the
    keys holds all that queries and softmax say. Scores are (W_q x)ᵀ L (R x'), so that queries take Lᵀ, for all query
    heads that share the keys, which is exact (CLOVER, Meng et al. 2025, arXiv 2411.17426; MoDeGPT, Lin et al. 2024,
    arXiv 2408.09632). What is the same for all keys cancels in the softmax. Of size r both cost r/d of what they did;
    scores are scaled as before. Not where something acts between projection and score: rotary positions, norms.
    """

    wide = "query"
    shared = "key"
    refitted = "key"
    needs_gradients: ClassVar[bool] = True

    def place(self, found: Attention) -> str:
        """Return the path of the attention, which shows what acts on queries and keys."""
        return found.path

    def watched(self, unit: Unit) -> str:
        """Return the path of the output projection, or of the attention: keys themselves come out narrower."""
        return str(unit.settings["output"])

    def obstacle(self, model: nn.Module, unit: Unit) -> str | None:
        """Return what acts on queries and keys before they meet, as far as the attention shows it."""
        attention = model.get_submodule(unit.path)
        names = [name for name, _ in attention.named_children()]
        if any(re.fullmatch(r"(q|k|query|key)_?(layer_?)?norm", name) for name in names):
            return "queries and keys are normalised head by head before they meet: the norm needs all of their entries"
        takes = [*inspect.signature(attention.forward).parameters, *names]
        if any("rotary" in name or "rope" in name or name == "position_embeddings" for name in takes):
            return "rotary positions turn queries and keys before they meet: their entries belong in pairs"
        return None

    def geometry(self, unit: Unit, size: Size, specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
        """Return the geometry with narrower heads of queries and keys."""
        (query,), width = unit.feeders, size["head_size"]
        return {
            query: specs[query].replace(out_channels=unit.settings["heads"] * width),
            unit.pivot: specs[unit.pivot].replace(out_channels=unit.settings["groups"] * width),
        }

    def other_macs(self, unit: Unit, size: Size, profile: Profile) -> int:
        """Return those of the products of queries with keys, which fall where the forward takes heads of any size."""
        if not unit.settings["native"]:
            return 0
        return product_macs(profile, unit.feeders[0], unit.pivot, unit.settings["heads"] * size["head_size"])

    def pivot_fit(self, unit: Unit, size: Size) -> PivotFit:
        """Return a low-rank key projection whose outer factor acts within heads."""
        groups = unit.settings["groups"]
        return PivotFit("low_rank", {"rank": groups * size["head_size"]}, {"name": "head_outputs", "heads": groups})

    def sample(self, model: nn.Module, unit: Unit, size: Size) -> Factorization:
        """Return the key projection in random subspaces of the heads, at a scale where scores differ.

        Before any training scores hardly do, and a forward would not show what happens to them.
        """
        outer = spread(random_blocks(unit.settings["groups"], size["head_size"], unit.full["head_size"]))
        spec, weight = geometry_of(model.get_submodule(unit.pivot))
        outer = outer.to(weight)
        scale = _SCORES / _score_size(dense_weight(model.get_submodule(unit.feeders[0])), weight, unit)
        return LowRank(spec, left=outer[None] * scale, right=(outer.mT @ weight)[None])

    def narrowed(self, model: nn.Module, unit: Unit, size: Size, pivot: FactorizedLayer | None) -> Narrowing:
        """Return the projections of queries and keys; narrow heads are padded for forwards that want one size."""
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
        if unit.settings["native"]:
            return Narrowing({path: asked, unit.pivot: narrow}, attributes(unit, width))
        return Narrowing({path: PaddedHeads.of(asked, heads, full), unit.pivot: PaddedHeads.of(narrow, groups, full)})


def _score_size(query: Tensor, key: Tensor, unit: Unit) -> float:
    """Return about how large scores are for inputs of variance 1, scaled by the root of the size of heads."""
    heads, groups, full = unit.settings["heads"], unit.settings["groups"], unit.full["head_size"]
    asked = query.detach().double().unflatten(0, (heads, full))
    known = key.double().unflatten(0, (groups, full)).repeat_interleave(heads // groups, dim=0)
    inside = (asked @ asked.mT * (known @ known.mT)).sum((1, 2)).mean() / full  # ‖Qᵀ K‖² of a head
    return float(inside.clamp_min(torch.finfo(torch.float32).tiny).sqrt())
