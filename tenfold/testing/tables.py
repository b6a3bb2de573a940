"""Option tables of small layers, for laws and tests of rank rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.allocation import RankRule
from tenfold.formats import FORMATS
from tenfold.planning import tabulate
from tenfold.planning.eligible import EligibleLayer, eligible_layer
from tenfold.profiling import profile
from tenfold.records import OptionTable, Recipe


class SideBySide(nn.Module):
    """Layers that have nothing to do with each other, each with an input of its own; none is kept for being an end.

    Args:
        layers: by name.
        shapes: of their inputs, by name; ids of 0 go into embeddings.
        calls: how often a forward calls each layer.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]], *, calls: int = 1
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.calls = calls
        self.inputs = tuple(
            torch.zeros(shapes[name], dtype=torch.long if isinstance(layer, nn.Embedding) else torch.float32)
            for name, layer in layers.items()
        )
        self.profile = profile(self, (self.inputs, {}))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs of the layers."""
        return [layer(x) for layer, x in zip(self.children(), inputs, strict=True) for _ in range(self.calls)]

    def table(self, rule: RankRule, formats: Sequence[str] | None = None, **measured: Any) -> OptionTable:
        """Return the options of the layers for a rule, in all formats if None; ``measured`` goes to ``tabulate``."""
        names = tuple(FORMATS.names() if formats is None else formats)
        recipe = Recipe(rule=rule.to_dict(), formats=names, keep_ends=False)
        return tabulate(self, self.profile, recipe, **measured)

    def eligible(self, name: str, formats: Sequence[str] | None = None) -> EligibleLayer:
        """Return what the options of a layer are computed from."""
        return eligible_layer(self, self.profile.layer(name), tuple(FORMATS.names() if formats is None else formats))
