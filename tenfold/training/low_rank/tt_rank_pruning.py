"""Prune indices of the bonds of tensor-train layers during training: how many, which, and in the optimizer too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor, nn

from tenfold.errors import PlanError
from tenfold.layers import FactorizedLayer
from tenfold.layers.tt_ranks import without_indices


def allowed_params(initial: int, final: int, elapsed: float) -> int:
    """Return the number of parameters allowed after a share of the time, a cubic from ``initial`` to ``final``.

    It falls fast while there is much redundancy (Zhu and Gupta 2017, arXiv 1710.01878).

    Example:
        >>> [allowed_params(1000, 200, t) for t in (0.0, 0.5, 1.0)]
        [1000, 300, 200]
    """
    left = (1 - min(max(elapsed, 0.0), 1.0)) ** 3
    return round(final + (initial - final) * left)


def least_worth(cores: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[float, int, int] | None:
    """Return worth, bond and index of the least valuable index of a train; None if no bond has two indices.

    Worth is the energy lost with the index, (λ over the largest of its bond)², per parameter saved.

    Args:
        cores: (r, n, r').
        variances: λ (r,) of each bond.

    Example:
        >>> cores = [torch.ones(1, 4, 2), torch.ones(2, 6, 1)]
        >>> least_worth(cores, [torch.tensor([1.0, 0.5])])
        (0.025, 0, 1)
    """
    best: tuple[float, int, int] | None = None
    for bond, own in enumerate(variances):
        if len(own) > 1:
            size = (cores[bond].numel() + cores[bond + 1].numel()) / len(own)
            index = int(own.argmin())
            worth = float((own[index] / own.max()) ** 2) / size
            if worth < (best[0] if best else inf):
                best = worth, bond, index
    return best


def prune_bonds_(
    model: nn.Module, path: str, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Replace the layer at ``path``, wherever it is used, by a smaller one with the ``kept`` indices, and return that.

    Args:
        model: changed in place.
        path: of a layer that is a tensor train.
        kept: the remaining indices of every bond, ascending, at least one.
        optimizer: continues with the new parameters. State in the shape of the old ones, such as moments, is sliced
            alike; other state, such as step counts, is kept.

    Raises:
        PlanError: the model itself is the layer; or an optimizer with a factorized layer, whose factors may change
            their order.

    Example:
        >>> from tenfold.layers import TTLinear
        >>> model = nn.Sequential(TTLinear(12, 8, 3, cores=2))
        >>> prune_bonds_(model, "0", [torch.tensor([0, 2])]).ranks
        (2,)
    """
    layer = model.get_submodule(path)
    if layer is model:
        msg = "the model itself is the tensor train: put it into an nn.Sequential, where it can be replaced"
        raise PlanError(msg)
    if optimizer is not None and isinstance(layer, FactorizedLayer):
        msg = f"the factors of {path!r} change their order: prune without the optimizer, and make a new one"
        raise PlanError(msg)
    smaller, moves = without_indices(layer, kept)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is layer:
                setattr(parent, name, smaller)
    if optimizer is not None:
        new = list(smaller.get_submodule("cores").parameters())
        for (old, cut), parameter in zip(moves, new, strict=True):
            _follow_(optimizer, old, parameter, cut)
    return smaller


def _follow_(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, cut: Callable[[Tensor], Tensor]
) -> None:
    """Replace ``old`` by ``new``, with its sliced state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: cut(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }
