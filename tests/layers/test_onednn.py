"""Stages that oneDNN runs: which they are, and that they give what torch's own choice gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tenfold.layers import FactorizedLayer, onednn
from tenfold.layers.dense_layers import spec_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the choice made as on a processor with slow products and one thread, and collect the samples of each run."""
    monkeypatch.setattr(onednn, "slow_products", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    collected: list[int] = []
    convolution = torch.mkldnn_convolution

    def counted(x: Tensor, *rest: Any) -> Tensor:
        collected.append(len(x))
        return convolution(x, *rest)

    monkeypatch.setattr(torch, "mkldnn_convolution", counted)
    return collected


def _layer(format: str, rank: dict[str, int], inputs: int = 256, outputs: int = 256, stride: int = 1) -> Any:
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    spec, _ = spec_of(conv)
    assert spec is not None
    layer = FactorizedLayer.empty(spec, format, rank, conv.weight)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    return layer.eval()


def _stages(layer: Any, x: Tensor) -> Tensor:
    for stage in layer.stages:
        x = stage(x)
    return x


@pytest.mark.parametrize(
    ("format", "rank", "stride", "batch", "taken", "taken_last"),
    [
        ("tucker2", {"out": 80, "in": 80}, 1, 1, 1, 3),  # the small core, which torch runs in Slow2d
        ("tucker2", {"out": 80, "in": 80}, 2, 1, 1, 2),
        ("tucker2", {"out": 80, "in": 80}, 1, 4, 2, 2),
        ("cp3", {"rank": 160}, 1, 1, 2, 2),
        ("cp3", {"rank": 160}, 1, 4, 2, 2),
        ("cp3", {"rank": 8}, 1, 1, 0, 0),
        ("low_rank", {"rank": 160}, 1, 4, 1, 1),
        ("cp3", {"rank": 160}, 1, 16, 0, 0),  # torch's own choice is oneDNN
    ],
)
def test_outputs_and_their_layout_are_those_of_the_stages(
    runs: list[int], format: str, rank: dict[str, int], stride: int, batch: int, taken: int, taken_last: int
) -> None:
    layer = _layer(format, rank, stride=stride)
    x = torch.randn(batch, 256, 14, 14)
    for given, count in ((x, taken), (x.contiguous(memory_format=torch.channels_last), taken_last)):
        runs.clear()
        with torch.no_grad():
            found, wanted = layer(given), _stages(layer, given)
        assert runs == [batch] * count
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert found.stride() == wanted.stride()


def test_whoever_watches_sees_torchs_own_operations(runs: list[int]) -> None:
    layer = _layer("cp3", {"rank": 160})
    x = torch.randn(2, 256, 14, 14)
    wanted = layer(x)  # gradients: oneDNN alone has none
    assert not runs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 14 * 14 * (256 * 160 * 2 + 160 * 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not runs
    seen: list[int] = []
    handle = layer.stages[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert (seen, runs) == ([1], [2])
    handle.remove()
    runs.clear()
    with torch.no_grad():
        for other in (torch.export.export(layer, (x,)).module(), torch.jit.script(layer), torch.jit.trace(layer, (x,))):
            torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(layer, (x,))
        assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
        batched = torch.func.vmap(layer)(x[None])[0]
    torch.testing.assert_close(batched, wanted, rtol=1e-4, atol=1e-4)


def test_torchs_own_choice_stands_on_several_threads_and_for_what_is_no_plain_convolution(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 512, 14, 14)
    large = nn.Conv2d(512, 256, 1)
    assert onednn.StageChoice().taken([large, nn.Conv2d(256, 512, 1)], x) == (True, True)
    for conv in (
        nn.Conv2d(512, 256, 1, stride=2),
        nn.Conv2d(512, 512, 1, groups=512),
        nn.Conv2d(512, 256, 1, padding="same"),
        nn.Conv2d(512, 256, 1, padding=1, padding_mode="reflect"),
        nn.Conv2d(512, 4, 1),
        nn.ConvTranspose2d(512, 256, 1),
    ):
        assert onednn.StageChoice().taken([conv], x) == ()
    choice = onednn.StageChoice()
    assert choice.taken([nn.ReLU(), large], x) == ()  # nobody knows its shapes
    for size in range(1, 200):
        choice.taken([large], torch.empty(1, 512, size, 1))
    assert len(choice._known) <= 64
    assert onednn.StageChoice().taken([large], x[0]) == ()  # without a batch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert onednn.StageChoice().taken([large], x) == ()


@pytest.mark.parametrize(
    ("known", "slow"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_products_are_slow_where_mkl_leaves_instructions_unused(
    known: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    onednn.slow_products.cache_clear()
    try:
        assert onednn.slow_products() is slow
    finally:
        onednn.slow_products.cache_clear()
