"""Weights that somebody quantized are kept with that reason, and the rest of the model is compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import CheckpointError, PlanError
from tenfold.layers import spec_of
from tenfold.runtime import Runtime

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)
    ).eval()


class Scaled(torch.Tensor):
    """A tensor subclass that computes by its own dispatch, as quantized ones do."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, integers: torch.Tensor, scale: float) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers: torch.Tensor, scale: float) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.clone.default):
            msg = f"{func} is not there"
            raise NotImplementedError(msg)
        plain = [a.integers.float() * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))

    def __deepcopy__(self, memo: object) -> nn.Parameter:
        return nn.Parameter(type(self)(self.integers.clone(), self.scale), requires_grad=False)


def by_subclass(net: nn.Sequential) -> nn.Sequential:
    integers = (net[0][0].weight.detach() * 127).round().to(torch.int8)
    net[0][0].weight = nn.Parameter(Scaled(integers, 1 / 127), requires_grad=False)
    return net


def by_torchao(net: nn.Sequential) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net[0], quantization.Int8WeightOnlyConfig())
    return net


def by_torch(net: nn.Sequential) -> nn.Sequential:
    net[0] = torch.ao.quantization.quantize_dynamic(net[0], {nn.Linear})
    return net


WAYS = [by_subclass, by_torchao, by_torch]


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("with_data", [False, True])
def test_the_rest_is_compressed(
    quantize: Callable[[nn.Sequential], nn.Sequential], with_data: bool, tmp_path: Path
) -> None:
    x = torch.randn(256, 64)
    net = quantize(network())
    assert "compress the model first, then quantize it" in tenfold.profile(net, x[:1]).layer("0.0").note
    data = [x] if with_data else None
    small = tenfold.compress(net, x[:1], "params=0.8", data=data, runtime=Runtime(measure=False))
    kept = small.plan.layer("0.0")
    assert kept.action == "keep"
    assert "compress the model first, then quantize it" in kept.reason
    assert small.plan.factorized
    assert torch.equal(small.model[0](x), net[0](x))
    with pytest.raises(CheckpointError, match="tensors only"):
        small.save(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_model_of_nothing_else_says_why() -> None:
    net = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
    with pytest.raises(PlanError, match=r"Reasons: .*a quantized Linear packs its weights"):
        tenfold.compress(net, torch.randn(1, 64), "macs=0.8", runtime=Runtime(measure=False))


def test_weights_of_eight_bits_are_no_weights_to_factorize() -> None:
    layer = nn.Linear(8, 8).to(torch.float8_e4m3fn)
    assert "has dtype torch.float8_e4m3fn, which factors cannot take over" in spec_of(layer)[1]


def test_a_parameter_of_a_class_of_its_own_is_a_weight_like_others() -> None:
    class Named(nn.Parameter):
        pass

    layer = nn.Linear(8, 8)
    layer.weight = Named(layer.weight.detach())
    assert spec_of(layer)[0] == spec_of(nn.Linear(8, 8))[0]
