"""Factorized convolutions as blocks of architectures: the same function at first, and open to training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenfold
from tenfold.errors import PlanError, RankError, UnknownNameError
from tenfold.layers import FactorizedLayer
from tenfold.networks import ConvBlock
from tenfold.surgery.architectures import as_block, as_blocks

CASES: list[tuple[str, str, dict[str, int], list[str]]] = [
    ("bottleneck", "tucker2", {"out": 5, "in": 4}, ["1×1 g1", "3×3 g1", "1×1 g1"]),
    ("mobilenet", "cp3", {"rank": 7}, ["1×1 g1", "3×3 g7", "1×1 g1"]),
    ("resnext", "block_term", {"blocks": 2, "out": 3, "in": 2}, ["1×1 g1", "3×3 g2", "1×1 g1"]),
]


def _kinds(block: ConvBlock) -> list[str]:
    convs = (module for module in block if isinstance(module, nn.Conv2d))
    return [f"{'×'.join(map(str, conv.kernel_size))} g{conv.groups}" for conv in convs]


@pytest.mark.parametrize(("architecture", "format", "rank", "kinds"), CASES)
@pytest.mark.parametrize("options", [{}, {"norms": False}, {"activations": False}])
def test_a_block_is_the_factorized_layer_at_first(
    architecture: str, format: str, rank: dict[str, int], kinds: list[str], options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, stride=2, padding=1).eval()
    block = as_block(conv, architecture, rank, **options)
    assert (block.architecture, _kinds(block), block.opened) == (architecture, kinds, 0.0)
    assert len(block.norms) == (2 if options.get("norms", True) else 0)
    x = torch.randn(3, 8, 7, 6)
    fit = tenfold.decompose(conv.weight.detach(), format, rank, spec=tenfold.layers.spec_of(conv)[0])
    layer = FactorizedLayer.of(fit.value, conv.bias)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("conv", "size"), [(nn.Conv1d(6, 5, 3), (8,)), (nn.Conv3d(6, 5, 2), (4, 4, 3))])
def test_other_numbers_of_axes(conv: Any, size: tuple[int, ...]) -> None:
    block = as_block(conv.eval(), "bottleneck", {"out": 3, "in": 4})
    assert block(torch.randn(2, 6, *size)).shape == conv(torch.randn(2, 6, *size)).shape


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 4)).eval()


def _pictures(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def _small(net: nn.Module) -> nn.Module:
    recipe = {"rule": "ratio", "formats": "tucker2", "budget": "params=0.6", "keep": "8"}
    return tenfold.compress(net, _pictures(1), recipe, runtime=tenfold.Runtime(measure=False)).model


def test_a_compressed_network_computes_the_same_and_with_data_nearly_so_in_training() -> None:
    small, x = _small(_net()), _pictures()
    blind, settled = as_blocks(small), as_blocks(small, [x[:32], x[32:]])
    blocks = [module for module in settled.modules() if isinstance(module, ConvBlock)]
    assert len(blocks) == sum(isinstance(module, FactorizedLayer) for module in small.modules()) > 0
    for made in (blind, settled):
        torch.testing.assert_close(made(x), small(x), rtol=1e-4, atol=1e-5)

    def moved(model: nn.Module) -> float:
        for block in model.modules():
            if isinstance(block, ConvBlock):
                block.train()
        return float((model(x) - small(x)).detach().abs().max())

    assert moved(settled) < 1e-3 < moved(blind)


def test_training_opens_it_and_its_state_is_loaded_again() -> None:
    small, x = _small(_net()), _pictures(16)
    made, again = as_blocks(small, [x]), as_blocks(small)
    labels = torch.arange(16) % 4
    steps = torch.optim.SGD(made.parameters(), lr=0.2)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(made(x), labels)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(block.opened > 0 for block in made.modules() if isinstance(block, ConvBlock))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))


def test_bad_input_is_told() -> None:
    conv = nn.Conv2d(8, 6, 3)
    with pytest.raises(UnknownNameError, match=r"no architecture 'bottle'.*bottleneck"):
        as_block(conv, "bottle", {})
    with pytest.raises(PlanError, match="does not become a mobilenet block"):
        as_block(nn.Conv2d(8, 6, 1), "mobilenet", {"rank": 3})
    with pytest.raises(RankError, match=r"out=9 is outside 1\.\.6"):
        as_block(conv, "bottleneck", {"out": 9})
    with pytest.raises(PlanError, match="with 1 stages is no block"):
        as_block(conv, "bottleneck", {})
    with pytest.raises(PlanError, match="no layer of the model is a block: factorize"):
        as_blocks(_net())
