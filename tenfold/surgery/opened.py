"""Layers that are opened for a plan: replaced by the same function with its matrices as plain layers of their own.

Recurrent networks are unrolled, and convolutions that pad first are put behind their padding. A plan names them in
``unrolled``, so that applying and loading open them again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tenfold.surgery.separate_padding import is_padding, padded_convs, separate_padding_, separated_convs
from tenfold.surgery.unroll_rnn import fused_rnns, unroll_rnns_, unrolled_rnns
from tenfold.tracing import copied


def openable(model: nn.Module) -> dict[str, str]:
    """Return path and kind of the layers that can be opened."""
    return fused_rnns(model) | padded_convs(model)


def opened(model: nn.Module) -> dict[str, str]:
    """Return path and kind of the layers that are open."""
    return unrolled_rnns(model) | separated_convs(model)


def open_layers_(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Open layers in place, by path and kind; return the model. What is open stays so.

    Raises:
        PlanError: no such layer, or one that cannot be opened.
    """
    model = unroll_rnns_(model, [path for path, kind in kinds.items() if not is_padding(kind)])
    return separate_padding_(model, {path: kind for path, kind in kinds.items() if is_padding(kind)})


def open_layers(model: nn.Module, kinds: Mapping[str, str]) -> nn.Module:
    """Return a copy in which layers are open, or the model itself if all of them are."""
    left = {path: kind for path, kind in kinds.items() if opened(model).get(path) != kind}
    return open_layers_(copied(model), left) if left else model
