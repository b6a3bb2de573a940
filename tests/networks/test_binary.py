"""Binary convolutions: the latent tensor multiplied out and torch's own convolution are the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import WeightError
from tenfold.networks import BinaryConv2d, BinaryNet, PackedConv2d, pack
from tenfold.networks.binary import Latent, sign

KINDS = ["independent", "matrix", "tucker"]


def pictures(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("binary_inputs", [True, False])
@pytest.mark.parametrize("latent", KINDS)
def test_it_is_a_convolution_with_scaled_signs(latent: Any, binary_inputs: bool) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 4, latent=latent, binary_inputs=binary_inputs)
    nn.init.normal_(layer.scale)
    weight = layer.scale[:, None, None, None] * torch.where(layer.latent() >= 0, 1.0, -1.0)
    x = pictures()
    seen = torch.where(x >= 0, 1.0, -1.0) if binary_inputs else x
    torch.testing.assert_close(layer(x), F.conv2d(seen, weight, padding=1))


def test_latents_are_products_of_their_factors() -> None:
    torch.manual_seed(0)
    latent = Latent((4, 3, 3, 3), "tucker", dtype=torch.float64)
    assert torch.equal(latent().flatten(2), latent.core)  # the same start whatever the kind
    for factor in latent.factors:
        nn.init.normal_(factor)
    wanted = torch.einsum("abc,oa,ib,kc->oik", latent.core, *latent.factors)
    torch.testing.assert_close(latent().flatten(2), wanted)


@pytest.mark.parametrize("latent", [*KINDS, "network"])
def test_gradients_reach_all_that_is_latent(latent: Any) -> None:
    torch.manual_seed(0)
    net = BinaryNet(4, 2, latent)
    net(pictures()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_gradients_stop_outside_of_the_window() -> None:
    x = torch.tensor([-1.5, -1.0, 0.2, 1.0, 1.1], requires_grad=True)
    (sign(x) * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]  # type: ignore[union-attr]


def test_the_size_of_latent_weights_does_not_matter() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 4)
    x, before = pictures(), layer(pictures())
    before.sum().backward()
    grad = layer.latent.core.grad.clone()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        layer.latent.core.mul_(100)  # type: ignore[union-attr, operator]
    layer.zero_grad()
    after = layer(x)
    after.sum().backward()
    assert torch.equal(after, before)
    torch.testing.assert_close(layer.latent.core.grad * 100, grad)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("latent", [*KINDS, "network"])
def test_packed_bits_give_the_same_bits(latent: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BinaryNet(5, 3, latent).eval()  # 5·5·9 weights do not fill bytes
    small, x = pack(net), torch.randn(2, 3, 8, 8)
    assert torch.equal(small(x), net(x))
    assert not any("latent" in key for key in small.state_dict())
    save_file(small.state_dict(), tmp_path / "net.safetensors")
    torch.manual_seed(1)
    again = pack(BinaryNet(5, 3, latent)).eval()
    assert not torch.equal(again(x), net(x))
    again.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(again(x), net(x))
    assert isinstance(net.convs[0], BinaryConv2d)  # it was left as it is


def test_a_weight_is_one_bit_in_the_file(tmp_path: Path) -> None:
    layer = nn.Sequential(BinaryConv2d(64, 64, latent="tucker"))
    save_file(pack(layer).state_dict(), tmp_path / "net.safetensors")
    header, scales = 300, 64 * 4
    assert (tmp_path / "net.safetensors").stat().st_size <= 64 * 64 * 9 / 8 + scales + header
    assert isinstance(pack(layer)[0], PackedConv2d)  # type: ignore[index]


def test_refusals_say_why() -> None:
    with pytest.raises(WeightError, match="kernel_size=2 is odd"):
        BinaryConv2d(3, 4, 2)
    with pytest.raises(WeightError, match="latent='svd' is independent, matrix or tucker"):
        BinaryConv2d(3, 4, latent="svd")  # type: ignore[arg-type]
