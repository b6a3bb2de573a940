"""Unroll recurrent networks into linear layers, so that plans reach their matrices, and fuse them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from tenfold.errors import PlanError
from tenfold.layers import GRU, LSTM, Recurrent, open_recurrent
from tenfold.layers.recurrent import stacked_weights
from tenfold.surgery.modules import find, put
from tenfold.tracing.held_tensors import copied


def fused_rnns(model: nn.Module) -> dict[str, str]:
    """Return path and kind of torch's recurrent networks that can be unrolled: GRUs and LSTMs, no derived classes.

    Networks with a projection, or whose weights are computed by hooks in each forward, cannot be unrolled.

    Example:
        >>> fused_rnns(nn.ModuleDict({"words": nn.Embedding(9, 4), "rnn": nn.LSTM(4, 8)}))
        {'rnn': 'LSTM'}
    """
    return {path: type(m).__name__ for path, m in model.named_modules() if _can_unroll(m)}


def unrolled_rnns(model: nn.Module) -> dict[str, str]:
    """Return path and kind of the unrolled recurrent networks."""
    return {path: m.mode for path, m in model.named_modules() if isinstance(m, Recurrent) and type(m) in (GRU, LSTM)}


def unroll_rnns_(model: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Unroll recurrent networks in place, all that can be or those at ``paths``; return the model.

    Outputs stay the same. The linear layers, such as ``rnn.cells.0.ih``, hold the same parameter objects as the network
    did. Networks that are unrolled already are left unchanged.

    Raises:
        PlanError: no such network, or one that cannot be unrolled.

    Example:
        >>> model = unroll_rnns_(nn.ModuleDict({"rnn": nn.GRU(4, 8)}))
        >>> model["rnn"].cells[0].hh
        Linear(in_features=8, out_features=24, bias=True)
    """
    if paths is None:
        paths = fused_rnns(model)
    new: dict[str, nn.Module] = {}
    for path in paths:
        network = find(model, path)
        if type(network) in (GRU, LSTM):
            continue
        if not _can_unroll(network):
            kind = type(network).__name__
            msg = f"{path!r} is a {kind} that cannot be unrolled: only plain GRUs and LSTMs of torch can"
            raise PlanError(msg)
        assert isinstance(network, nn.GRU | nn.LSTM)  # noqa: S101 - asked before
        new[path] = open_recurrent(network)
    return put(model, new)


def unroll_rnns(model: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Return a copy in which recurrent networks are unrolled, or the model itself if there is nothing to unroll."""
    fused = fused_rnns(model) if paths is None else [p for p in paths if type(find(model, p)) not in (GRU, LSTM)]
    return unroll_rnns_(copied(model), fused) if fused else model


def fuse_rnns_(model: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Replace unrolled networks by torch's own, in place, with factors multiplied out; return the model."""
    unrolled = unrolled_rnns(model)
    new: Mapping[str, nn.Module] = {
        path: network.close()
        for path in (unrolled if paths is None else paths)
        if isinstance(network := find(model, path), Recurrent)
    }
    return put(model, new)


def _can_unroll(module: nn.Module) -> bool:
    if type(module) not in (nn.GRU, nn.LSTM):
        return False
    assert isinstance(module, nn.RNNBase)  # noqa: S101 - asked before
    own = dict(module.named_parameters(recurse=False))
    return not module.proj_size and all(any(weight is p for p in own.values()) for weight, _ in stacked_weights(module))
