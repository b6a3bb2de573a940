"""Trained networks whose layers share kernels: parameters count once, and files and exports know nothing special."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import BudgetError, PlanError
from tenfold.layers import FactorizedLayer
from tenfold.networks import KernelBank, SharedConv, TrainBank, TuckerBank
from tenfold.surgery.share_kernels import bank_ranks, equal_kernels, share_kernels, unshare_kernels


class Block(nn.Module):
    """Two convolutions around a batch norm, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.norm(self.first(x)).relu())).relu()


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(nn.Conv2d(3, 12, 3), Block(12), Block(12), nn.Conv2d(12, 12, 3, stride=2), *head).eval()


def _pictures(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [TuckerBank, TrainBank])
def test_a_network_keeps_within_its_parameters_and_data_help(kind: type[KernelBank]) -> None:
    net, x = _net(), _pictures()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    params = sum(p.numel() for p in net.parameters())
    moments = tenfold.calibrate(net, [x])
    small = share_kernels(net, int(0.6 * params), moments=moments, kind=kind, steps=40)
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * params
    assert tenfold.profile(small, x[:1]).params == sum(p.numel() for p in small.parameters())
    shared = [module for module in small.modules() if isinstance(module, SharedConv)]
    assert [module.index for module in shared] == [0, 1, 2, 3, 4]
    assert len({id(module.bank) for module in shared}) == 1
    blind = share_kernels(net, ranks=bank_ranks(small), kind=kind, steps=40)

    def missed(model: nn.Module) -> float:
        return float((model(x) - net(x)).detach().square().mean())

    assert missed(small) < missed(blind)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_full_ranks_change_nothing_and_names_stay_of_the_group() -> None:
    net, x = _net(), _pictures(3)
    (name,) = equal_kernels(net)
    same = share_kernels(net, ranks={name: {}})
    torch.testing.assert_close(same(x), net(x), rtol=1e-5, atol=1e-6)
    assert bank_ranks(same) == {name: {"layers": 5, "out": 12, "in": 12}}


def test_it_is_trained_saved_and_exported(tmp_path: Any) -> None:
    net, x = _net(), _pictures(4)
    ranks = {"12×12×3×3": {"layers": 3, "out": 6, "in": 6}}
    small = share_kernels(net, ranks=ranks, steps=5)
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    again = share_kernels(_net(), ranks=ranks, steps=0)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x))
    apart = unshare_kernels(small)
    torch.testing.assert_close(apart(x), small(x), rtol=1e-5, atol=1e-6)
    assert {m.format for m in apart.modules() if isinstance(m, FactorizedLayer)} == {"tucker2"}
    assert not any(isinstance(m, KernelBank) for m in apart.modules())
    assert tenfold.profile(apart, x).macs < tenfold.profile(small, x).macs


def test_groups_are_kernels_of_one_shape() -> None:
    net = _net()
    own = ("1.first", "1.second", "2.first", "2.second", "3")
    assert equal_kernels(net) == {"12×12×3×3": own}
    assert equal_kernels(net, keep=["3"]) == {"12×12×3×3": own[:-1]}
    tied = _net()
    tied[2].second.weight = tied[1].second.weight
    assert equal_kernels(tied) == {"12×12×3×3": ("1.first", "2.first", "3")}


def test_bad_input_is_told() -> None:
    net = _net()
    with pytest.raises(PlanError, match="one of both"):
        share_kernels(net)
    with pytest.raises(PlanError, match="nothing to share"):
        share_kernels(nn.Sequential(nn.Conv2d(3, 4, 3)), 10)
    with pytest.raises(BudgetError, match="outside of the shared kernels: raise it"):
        share_kernels(net, 100)
    with pytest.raises(PlanError, match="ranks name the groups other; there are 12×12×3×3"):
        share_kernels(net, ranks={"other": {}})
    with pytest.raises(PlanError, match="'6' cannot take its kernel from a bank: kernels of convolutions"):
        share_kernels(net, 4000, groups={"mine": ["6"]})
    with pytest.raises(PlanError, match=r"no moments of 2\.first"):
        share_kernels(net, 4000, groups={"mine": ["1.first", "2.first"]}, moments={"1.first": None})  # type: ignore[dict-item]
