"""Find the projections of attentions: by their names, or by their order in a module that tells its number of heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import nn

from tenfold.layers import JoinedProjections, SeparateAttention
from tenfold.records import LayerProfile, Profile, Unit
from tenfold.units.base import UnitKind
from tenfold.units.members import holder, narrowable, parent
from tenfold.units.one_head_size import resizes

_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head", "d_kv", "dim_per_head")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "encoder_attention_heads")
_ROLES = {
    role: re.compile(rf"(?i)(w|to_|linear_|in_)?{short}({rest})?(_?(proj|lin|linear|layer|projection|attn))?")
    for role, short, rest in (("query", "q", "uery"), ("key", "k", "ey"), ("value", "v", "alue"))
}


NO_HEADS = "no module around it tells a number of heads that divides the widths of its projections"


@dataclass(frozen=True)
class Attention:
    """The projections of one attention.

    Attributes:
        path: of the module that computes with queries, keys and values.
        layers: the projections by role: query, key, value, output; some may be missing.
        size: of a head; None where no module tells.
        native: whether its forward takes heads of any sizes; others want one size, and narrow heads are padded.
    """

    path: str
    layers: dict[str, LayerProfile]
    size: int | None
    native: bool = False

    def heads(self, role: str) -> int:
        """Return the number of heads of a projection, or 0 where it is missing, or not a multiple of their size."""
        layer = self.layers.get(role)
        if layer is None or layer.spec is None or not self.size:
            return 0
        width = layer.spec.in_channels if role == "output" else layer.spec.out_channels
        return 0 if width % self.size else width // self.size

    def settings(self, model: nn.Module, heads: int, groups: int) -> dict[str, Any]:
        """Return what a unit has to know of it: see ``one_head_size`` for how its module itself may be narrowed."""
        told = {} if self.native else resizes(model.get_submodule(self.path), heads, self.size or 0)
        return {
            "heads": heads,
            "groups": groups,
            "native": self.native,
            "attention": self.path,
            "output": self.layers["output"].path if "output" in self.layers else self.path,
            "resizes": told,
        }


def attentions(model: nn.Module, profile: Profile) -> Iterator[Attention]:
    """Iterate over what looks like an attention whose projections are layers of their own."""
    linear = [layer for layer in profile.layers if layer.spec is not None and layer.spec.kind == "linear"]
    linear = [layer for layer in linear if narrowable(layer)]
    for path in dict.fromkeys(parent(layer.path) for layer in linear):
        siblings = [layer for layer in linear if parent(layer.path) == path]
        holders = [model.get_submodule(path), model.get_submodule(parent(path))]
        found = _by_name(siblings) or (_by_order(siblings) if _told(holders[:1]) else {})
        if "value" not in found:
            continue
        output = _output([layer for layer in linear if layer not in found.values()], path, found)
        parts = found | ({} if output is None else {"output": output})
        own = parent(path) if isinstance(holders[0], JoinedProjections) else path
        yield Attention(own, parts, _head_size(holders, found), isinstance(holders[0], SeparateAttention))


def product_macs(profile: Profile, rows: str, columns: str, entries: int) -> int:
    """Return the multiply-accumulates of products of rows with columns, summed over ``entries`` numbers in each pair.

    Args:
        profile: of the model.
        rows: path of a layer that is called on (batch, rows, channels), such as the projection of queries.
        columns: path of a layer that is called on (batch, columns, channels), such as that of keys.
        entries: numbers that meet in a pair: heads·size.
    """
    pairs = zip(profile.layer(rows).calls, profile.layer(columns).calls, strict=False)
    return sum(
        prod(one.in_shape[:-1]) * other.in_shape[-2] * one.count * entries
        for one, other in pairs
        if len(one.in_shape) == len(other.in_shape) == 3
    )


def _by_name(siblings: Sequence[LayerProfile]) -> dict[str, LayerProfile]:
    """Return the projections that are called so."""
    names = {layer.path.rpartition(".")[2]: layer for layer in siblings}
    matches = {role: [layer for name, layer in names.items() if p.fullmatch(name)] for role, p in _ROLES.items()}
    found = {role: layers[0] for role, layers in matches.items() if len(layers) == 1}
    return found if {"key", "value"} <= found.keys() else {}


def _by_order(siblings: Sequence[LayerProfile]) -> dict[str, LayerProfile]:
    """Return the first three of the four projections of a module, whatever they are called."""
    return dict(zip(_ROLES, siblings, strict=False)) if len(siblings) == 4 else {}


def _output(others: Sequence[LayerProfile], path: str, found: dict[str, LayerProfile]) -> LayerProfile | None:
    """Return the projection that takes the heads: the first of fitting size in the same module, or around it."""
    heads = found.get("query", found["value"]).spec
    for place in (path, parent(path)):
        inside = f"{place}.".lstrip(".")
        for layer in others:
            if layer.path.startswith(inside) and layer.spec and heads and layer.spec.in_channels == heads.out_channels:
                return layer
    return None


def _head_size(holders: Sequence[nn.Module], found: dict[str, LayerProfile]) -> int | None:
    """Return the size of a head, as the module, its parent or their configuration tells, if it divides all widths."""
    widths = [layer.spec.out_channels for layer in found.values() if layer.spec is not None]
    whole = found.get("query", found["value"]).spec
    for name, number in _told(holders):
        size = number if name in _SIZES else (whole.out_channels // number if whole else 0)
        if size > 1 and not any(width % size for width in widths):
            return size
    return None


def _told(holders: Sequence[nn.Module]) -> list[tuple[str, int]]:
    """Return what modules and their configurations say of the size and number of heads, the most telling first."""
    sources: list[Any] = [*holders, *(config for m in holders if (config := getattr(m, "config", None)) is not None)]
    told = [(name, getattr(source, name, None)) for source in sources for name in (*_SIZES, *_COUNTS)]
    return [(name, number) for name, number in told if type(number) is int and number > 0]


class HeadSizes(UnitKind):
    """Base of the kinds that narrow heads: two projections of an attention, one for all heads, one that groups share.

    Attributes:
        wide: role of the projection with entries for every head.
        shared: role of the one whose heads may be shared by several of the others.
        refitted: which of the two is the pivot.
    """

    default: ClassVar[bool] = False  # a trained sentence encoder keeps a little less with it than with pairs
    size_names = ("head_size",)
    of_projections: ClassVar[bool] = True
    wide: ClassVar[str]
    shared: ClassVar[str]
    refitted: ClassVar[str]

    def candidates(self, model: nn.Module, profile: Profile) -> Iterator[Unit]:
        """Iterate over attentions that have both projections."""
        for found in attentions(model, profile):
            if self.wide not in found.layers:
                continue
            heads, groups = found.heads(self.wide), found.heads(self.shared)
            paths = {role: found.layers[role].path for role in (self.wide, self.shared)}
            pivot = paths.pop(self.refitted)
            unit = Unit(kind=self.name(), path=self.place(found), pivot=pivot, feeders=tuple(paths.values()))
            if not groups or not heads or heads % groups:
                yield unit.replace(keep_reason=NO_HEADS)
                continue
            yield unit.replace(full={"head_size": found.size}, settings=found.settings(model, heads, groups))

    def place(self, found: Attention) -> str:
        """Return the path of the module that holds both projections."""
        return holder([found.layers[role].path for role in (self.wide, self.shared)])

    def stands_out(self, unit: Unit, profile: Profile) -> bool:
        """Whether it is worth a line in the plan: every attention is."""
        del unit, profile
        return True
