"""Decay falls on dense weights only."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.layers import FactorizedLayer, spec_of
from tenfold.training import TuneConfig, parameter_groups
from tenfold.training.optimizer import build_optimizer


def model() -> nn.ModuleDict:
    dense = nn.Linear(8, 6)
    spec, _ = spec_of(dense)
    assert spec is not None
    factorized = FactorizedLayer.empty(spec, "low_rank", {"rank": 2}, torch.zeros(()))
    return nn.ModuleDict(
        {"dense": dense, "conv": nn.Conv2d(2, 3, 3), "norm": nn.LayerNorm([4, 4]), "factorized": factorized}
    )


def names(of: nn.Module, group: dict[str, object]) -> set[str]:
    by_id = {id(p): n for n, p in of.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups() -> None:
    net = model()
    net["conv"].bias.requires_grad_(False)
    decaying, free = parameter_groups(net, 0.1)
    assert names(net, decaying) == {"dense.weight", "conv.weight"}
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    factors = {f"factorized.{n}" for n, _ in net["factorized"].named_parameters()}
    assert names(net, free) == {"dense.bias", "norm.weight", "norm.bias"} | factors
    decaying, _ = parameter_groups(net, 0.1, decay_factors=True)
    assert names(net, decaying) == {"dense.weight", "conv.weight"} | {n for n in factors if n.endswith("weight")}


def test_optimizers() -> None:
    sgd = build_optimizer(model(), TuneConfig(momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["nesterov"]
    assert sgd.defaults["fused"]
    adamw = build_optimizer(model(), TuneConfig(optimizer="adamw", momentum=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.999)
