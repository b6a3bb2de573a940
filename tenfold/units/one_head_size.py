"""Attentions whose queries, keys and values get heads of one and the same size: then their module is made narrower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from tenfold.records import Unit

UnitT = TypeVar("UnitT", bound=Unit)

_PARTNERS = {"query_key", "value_output"}
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")


def resizes(attention: nn.Module, heads: int, size: int) -> dict[str, int]:
    """Return the attributes by which the forward of an attention may tell the size of its heads, in multiples of it.

    Example:
        >>> module = nn.Module()
        >>> module.head_dim, module.inner_dim, module.num_heads = 16, 64, 4
        >>> resizes(module, 4, 16)
        {'head_dim': 1, 'inner_dim': 4}
    """
    sizes = {name: 1 for name in _SIZES if vars(attention).get(name) == size}
    widths = {name: heads for name in _WIDTHS if vars(attention).get(name) == heads * size}
    return sizes | widths if sizes else {}


def partners(units: Iterable[UnitT]) -> Iterator[tuple[UnitT, UnitT]]:
    """Iterate over the pairs of units of one attention, for keys and for values, that may resize its module."""
    known: dict[str, dict[str, UnitT]] = {}
    for unit in units:
        if unit.kind in _PARTNERS and unit.settings.get("resizes"):
            known.setdefault(unit.settings["attention"], {})[unit.kind] = unit
    for own in known.values():
        if own.keys() == _PARTNERS:
            yield own["query_key"], own["value_output"]


def native(unit: UnitT, *, together: bool) -> UnitT:
    """Return the unit as one whose module runs on narrow heads, or as one whose heads are padded."""
    return unit.replace(settings=unit.settings | {"native": together})


def attributes(unit: Unit, size: int) -> Mapping[str, Mapping[str, Any]]:
    """Return what the attention of a unit has to know of its narrower heads: by path, and by name."""
    told = unit.settings.get("resizes") if unit.settings["native"] else None
    return {unit.settings["attention"]: {name: times * size for name, times in told.items()}} if told else {}
