"""Modules that compute with several matrices or with a padding, replaced by equal ones of plain layers for plans.

Recurrent networks are unrolled, parameters that stack matrices become stacks of linear layers, projections that an
attention computes at once become layers, convolutions that pad first are put behind their padding, and linear layers
learn of the maps that they take flat. A plan names all of them in ``unrolled``: applying and loading do it again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tenfold.layers import GRU, LSTM
from tenfold.surgery.separate_attention import is_projections, separate_projections_, separated_projections
from tenfold.surgery.separate_map import is_map, mapped, separate_map_
from tenfold.surgery.separate_padding import is_padding, separate_padding_, separated_convs
from tenfold.surgery.unroll_rnn import unroll_rnns_, unrolled_rnns
from tenfold.surgery.unstack import unstack_, unstacked
from tenfold.tracing import copied

_RNNS = (GRU.mode, LSTM.mode)


def separated(model: nn.Module) -> dict[str, str]:
    """Return path and kind of what is so already: see ``Plan.unrolled``."""
    found = unrolled_rnns(model) | unstacked(model) | separated_convs(model) | separated_projections(model)
    return found | mapped(model)


def separate_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Replace modules in place, as ``Plan.unrolled`` says; return the model. What is so already stays.

    Raises:
        PlanError: no such module, or one of another kind.
    """
    padded = {path: kind for path, kind in kinds.items() if is_padding(kind)}
    joined = {path: kind for path, kind in kinds.items() if is_projections(kind)}
    maps = {path: kind for path, kind in kinds.items() if is_map(kind)}
    rnns = [path for path, kind in kinds.items() if kind in _RNNS]
    others = {*padded, *joined, *maps, *rnns}
    stacked = {path: kind for path, kind in kinds.items() if path not in others}
    model = separate_projections_(unstack_(unroll_rnns_(model, rnns), stacked), joined)
    return separate_map_(separate_padding_(model, padded), maps)


def separate(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Return a copy in which this is done, or the model itself if there is nothing to do."""
    return model if kinds.items() <= separated(model).items() else separate_(copied(model), kinds)
