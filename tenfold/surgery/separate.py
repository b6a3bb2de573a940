"""Modules that compute with several matrices at once, replaced by equal ones in which each matrix is a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from tenfold.layers import GRU, LSTM
from tenfold.surgery.unroll_rnn import unroll_rnns_, unrolled_rnns
from tenfold.surgery.unstack import unstack_, unstacked

_RNNS = (GRU.mode, LSTM.mode)


def separated(model: nn.Module) -> dict[str, str]:
    """Return path and kind of unrolled recurrent networks, and of modules whose stacked parameters are layers."""
    return unrolled_rnns(model) | unstacked(model)


def separate_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Unroll and unstack in place, as ``Plan.unrolled`` says; return the model. What is so already stays.

    Raises:
        PlanError: no such module, or one of another kind.
    """
    model = unroll_rnns_(model, [path for path, kind in kinds.items() if kind in _RNNS])
    return unstack_(model, {path: kind for path, kind in kinds.items() if kind not in _RNNS})


def separate(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Return a copy in which this is done, or the model itself if there is nothing to do."""
    return model if kinds.items() <= separated(model).items() else separate_(copy.deepcopy(model), kinds)
