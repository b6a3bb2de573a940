"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tenfold.errors import TuningError
from tenfold.layers import FactorizedLayer
from tenfold.records.tuning import TuneConfig

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_factors: bool = False) -> list[dict[str, Any]]:
    """Return optimizer groups of all parameters that require grad: with and without weight decay.

    Biases, norms and everything else with fewer than two axes never decay. Neither do the factors of factorized layers:
    decay of the factors of a product is a penalty on its nuclear norm, which lowers its rank, and it unbalances chains
    of three and more. ``decay_factors`` lets them decay all the same. A module with ``no_weight_decay()``, as in timm,
    names parameters of its own that never decay. Empty groups are left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(model, 1e-4)]
        [(1, 0.0001), (3, 0.0)]
    """
    spared = NORMS if decay_factors else (*NORMS, FactorizedLayer)
    exempt = {p for m in model.modules() if isinstance(m, spared) for p in m.parameters()} | _declared(model)
    decaying: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (free if parameter.dim() < 2 or parameter in exempt else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _declared(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that modules exempt by ``no_weight_decay()``."""
    exempt: set[nn.Parameter] = set()
    for module in model.modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            own = dict(module.named_parameters(remove_duplicate=False))
            exempt |= {own[name] for name in names() if name in own}
    return exempt


def build_optimizer(model: nn.Module, config: TuneConfig) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters that require grad, fused where torch has a fused kernel.

    Raises:
        TuningError: no parameter requires grad.
    """
    groups = parameter_groups(model, config.weight_decay, decay_factors=config.decay_factors)
    if not groups:
        msg = "no parameter of the model requires grad: there is nothing to tune. Call model.requires_grad_() first."
        raise TuningError(msg)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def learning_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: linear warm-up to ``peak``, then a cosine down to almost zero.

    A function of the step, so that there is no scheduler state to store.

    Args:
        step: counted from 0 over all epochs; constant beyond the last.
        steps: of the whole run.
        peak: the highest rate.
        warmup: share of the steps.

    Example:
        >>> [round(learning_rate(s, 5, peak=1.0, warmup=0.4), 2) for s in range(5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    falling = max(steps - rising, 1)
    return peak * (1 + cos(pi * min(step - rising, falling - 1) / falling)) / 2
