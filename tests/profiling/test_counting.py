"""The counter agrees with torch's wherever that one counts, and fills only the gaps that it should."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from tenfold.profiling import MacCounter

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"bidirectional": True, "num_layers": 3}, {"bias": False})


def ours(run: Callable[[], Any]) -> MacCounter:
    with torch.no_grad(), MacCounter() as counter:
        run()
    return counter


def torchs(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [5, 9])
@pytest.mark.parametrize("heads", [4, 2])
def test_fused_attention_on_the_cpu_counts_as_its_two_products(heads: int, keys: int, causal: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, heads, keys, 8), torch.randn(2, heads, keys, 8)

    def run() -> Tensor:
        return attention(q, k, v, is_causal=causal, enable_gqa=heads < 4)

    counter = ours(run)
    with sdpa_kernel(SDPBackend.MATH):
        assert counter.flops == torchs(run) == 2 * 2 * (2 * 4 * 5 * keys * 8)
    assert torchs(run) + 2 * sum(counter.fused_macs.values()) == counter.flops
    assert counter.uncounted == {}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "options"), [*product(KINDS, OPTIONS), (nn.LSTM, {"proj_size": 4})])
@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:.*TF32 acceleration on top of oneDNN")
def test_recurrent_networks_count_as_without_onednn(
    kind: type[nn.RNNBase], options: dict[str, Any], packed: bool
) -> None:
    model = kind(6, 8, batch_first=True, **options).eval()
    x: Any = torch.randn(3, 5, 6)
    steps = 15
    if packed:
        x, steps = pack_padded_sequence(x, torch.tensor([5, 4, 1]), batch_first=True), 10
    counter = ours(lambda: model(x))
    by_hand = steps * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert counter.macs == by_hand
    with torch.backends.mkldnn.flags(enabled=False):
        assert counter.flops == torchs(lambda: model(x))
    assert counter.uncounted == {}


def test_the_traps_are_still_there() -> None:
    """If torch fills a gap some day, its formula wins and ``fused_macs`` empties: then this test may go."""
    lstm, x = nn.LSTM(6, 8).eval(), torch.randn(5, 3, 6)
    q = torch.randn(2, 4, 5, 8)
    assert torchs(lambda: lstm(x)) == 0
    assert torchs(lambda: attention(q, q, q)) == 0
    assert torchs(lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()(x[..., :1].expand(5, 3, 8))) == 0


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda: torch.ones(3, 4) @ torch.ones(4), "aten.mv"),
        (lambda: nn.Bilinear(3, 4, 5)(torch.ones(2, 3), torch.ones(2, 4)), "aten._trilinear"),
        (lambda: torch.fft.rfft(torch.ones(8)), "aten._fft_r2c"),
        (lambda: torch.cdist(torch.ones(4, 3), torch.ones(4, 3)), "aten._cdist_forward"),
        (lambda: torch.linalg.inv(torch.eye(3)), "aten.linalg_inv_ex"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_formula_is_named(run: Callable[[], Any], name: str) -> None:
    assert ours(run).uncounted == {name: 1}


def test_an_unknown_custom_operation_is_named() -> None:
    with torch.library._scoped_library("tenfold_test", "DEF") as library:
        library.define("scan(Tensor x) -> Tensor")
        library.impl("scan", lambda x: x.clone(), "CPU")
        counter = ours(lambda: torch.ops.tenfold_test.scan(torch.ones(3)))
    assert counter.uncounted == {"tenfold_test.scan": 1}


def test_common_layers_without_products_leave_nothing_uncounted() -> None:
    x = torch.randn(2, 8, 6, 6)
    normalise = [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(6), nn.InstanceNorm2d(8), nn.RMSNorm(6)]
    pool = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.LPPool2d(2, 2)]
    resize = [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelShuffle(2)]
    pad = [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)]
    activate = [nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.PReLU(), nn.GLU(), nn.Mish(), nn.LogSigmoid()]
    other = [nn.Softmax(-1), nn.LogSoftmax(-1), nn.Flatten(), nn.Unfold(2), nn.ChannelShuffle(2), nn.Dropout()]
    layers = [*normalise, *pool, *resize, *pad, *activate, *other, nn.LocalResponseNorm(2)]
    missed = {
        type(layer).__name__: c.uncounted for layer in layers if (c := ours(lambda m=layer: m.eval()(x))).uncounted
    }
    assert missed == {}
    assert ours(lambda: nn.Embedding(4, 3)(torch.tensor([1, 2]))).uncounted == {}
    assert ours(lambda: nn.EmbeddingBag(4, 3)(torch.tensor([[1, 2]]))).uncounted == {}
