"""Small layers to choose ranks for, and what a rule makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tenfold.allocation import Pick, RankRule, Selection, select
from tenfold.records import Budget
from tenfold.testing.tables import SideBySide

FORMATS = ("tucker2", "low_rank")


def conv(out: int, inner: int, k: int = 3, weight: Tensor | None = None, **options: Any) -> nn.Module:
    """Return a convolution that keeps the size, or a linear layer where k is 0; without a bias."""
    if not k:
        layer: nn.Module = nn.Linear(inner, out, bias=False)
    else:
        layer = nn.Conv2d(inner, out, k, padding=k // 2, bias=False, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) if weight is None else weight)  # type: ignore[operator,arg-type]
    return layer


def beside(*unnamed: nn.Module, size: int = 8, **named: nn.Module) -> SideBySide:
    """Return the layers side by side; those without a name are called layer0, layer1 ..."""
    layers = {f"layer{i}": layer for i, layer in enumerate(unnamed)} | named
    shapes = {
        name: (1, layer.in_features) if isinstance(layer, nn.Linear) else (1, layer.in_channels, size, size)
        for name, layer in layers.items()
    }
    return SideBySide(layers, shapes)  # type: ignore[arg-type]


def selection(
    model: SideBySide,
    rule: RankRule,
    limits: dict[str, float] | None = None,
    formats: tuple[str, ...] = FORMATS,
    **measured: Any,
) -> Selection:
    """Return what a rule selects, within absolute limits if there are any."""
    table = model.table(rule, formats, **measured)
    return select(table, table.recipe.replace(budget=Budget.at_most(limits or {})))


def picks(
    model: SideBySide, rule: RankRule, limits: dict[str, float] | None = None, **options: Any
) -> tuple[Pick, ...]:
    """Return what becomes of each layer."""
    return selection(model, rule, limits, **options).picks


def pick(layer: nn.Module, rule: RankRule, limits: dict[str, float] | None = None, **options: Any) -> Pick:
    """Return what becomes of a layer alone."""
    (found,) = picks(beside(layer), rule, limits, **options)
    return found
