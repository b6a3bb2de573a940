"""Temporarily replace one layer; hash a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tenfold import tensors
from tenfold.decompositions import Decomposition, Moments, algorithm_for, fit_layer
from tenfold.formats import Rank
from tenfold.layers import FactorizedLayer
from tenfold.surgery import find, put, reestimate_batchnorm_
from tenfold.surgery.replacement import factorizable_spec, geometry, layer_of, metric_for


def substitute(
    module: nn.Module,
    format: str,
    rank: Rank,
    *,
    algorithm: Decomposition | None = None,
    metric: Moments | None = None,
    seed: int = 0,
) -> FactorizedLayer:
    """Return the factorized layer that would stand in for a dense one, or for one that is factorized already.

    Args:
        module: the layer; stays as it is.
        format: name of the format.
        rank: ranks by name.
        algorithm: the format's default algorithm if None.
        metric: moments of the layer's inputs; the bias then makes up for the mean of what is missed.
        seed: of the default algorithm.

    Raises:
        PlanError: the layer is of a kind that no format serves.
        RankError: a rank outside of what the layer allows.
    """
    algorithm = algorithm_for(format, algorithm, seed, data_aware=metric is not None)
    with torch.no_grad():
        weight = module.factorization() if isinstance(module, FactorizedLayer) else geometry(module)[1]
        fit = fit_layer(
            weight, format, rank, algorithm, spec=factorizable_spec(module), moments=metric_for(module, metric)
        )
    return layer_of(fit, module, algorithm).requires_grad_(requires_grad=False)


@contextmanager
def replaced(
    model: nn.Module, path: str, layer: nn.Module, *, batchnorm: Iterable[Any] | None = None
) -> Iterator[nn.Module]:
    """Yield the model with this layer at ``path``; afterwards it is as before, its buffers included.

    Args:
        model: changed in place meanwhile.
        path: of the layer to replace.
        layer: what stands there meanwhile.
        batchnorm: batches on which batch norm is estimated anew meanwhile; None to leave it alone.
    """
    old = find(model, path)
    kept = {name: b.detach().clone() for name, b in model.named_buffers()} if batchnorm is not None else {}
    changed = put(model, {path: layer})
    try:
        if batchnorm is not None:
            reestimate_batchnorm_(changed, batchnorm)
        yield changed
    finally:
        put(changed, {path: old})
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])


def digest(model: nn.Module) -> str:
    """Return a text that tells models with other weights, names or dtypes apart.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = digest(net)
        >>> _ = nn.init.zeros_(net.weight)
        >>> before == digest(net)
        False
    """
    return tensors.digest(model.state_dict(), type(model).__name__)
