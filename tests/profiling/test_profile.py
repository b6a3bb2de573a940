"""A profile accounts for every parameter and every MAC, layer by layer, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from tenfold.errors import ProfileError
from tenfold.formats import FORMATS
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.profiling import profile
from tenfold.profiling.profile import NEVER_CALLED, NOT_REACHED
from tenfold.records import Profile
from tenfold.tracing.inputs import call_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:.*even kernel lengths and odd dilation"),
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Torch without the kernels that its flop counter cannot see into."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def counted_by_torch(model: nn.Module, inputs: Any) -> float:
    model.eval()
    with torch.no_grad(), _plain_kernels(), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    return counter.get_total_flops() / 2


def check(model: nn.Module, inputs: Any) -> Profile:
    """Profile and hold the result against torch's own counts of parameters, bytes and FLOPs."""
    result = profile(model, inputs)
    assert result.macs == counted_by_torch(model, inputs)
    assert result.macs == sum(layer.macs for layer in result.layers) + result.other_macs
    assert result.params == sum(layer.params for layer in result.layers) == sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert result.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert "flop counter saw" not in " ".join(layer.note for layer in result.layers)
    assert Profile.from_text(result.to_json()) == result
    return result


CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "bias": False},
    {"groups": 4},
]
CONV_ONLY = [
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "dilation": 2},
]
TRANSPOSED_ONLY = [{"stride": 3, "output_padding": 1, "padding": 1}, {"stride": 2, "output_padding": 1, "groups": 2}]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", [*CONVS, *CONV_ONLY], ids=str)
def test_closed_form_of_a_convolution_meets_the_counter(axes: int, options: dict[str, Any], batched: bool) -> None:
    layer = getattr(nn, f"Conv{axes}d")(4, 8, 3, **options)
    x = torch.randn(*(2,) * batched, 4, *(7, 9, 8)[:axes])
    result = check(layer, x)
    assert result.layers[0].spec.macs(tuple(x.shape)) == result.macs > 0


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", [*CONVS, *TRANSPOSED_ONLY], ids=str)
def test_closed_form_of_a_transposed_convolution_meets_the_counter(
    axes: int, options: dict[str, Any], batched: bool
) -> None:
    layer = getattr(nn, f"ConvTranspose{axes}d")(4, 8, 3, **options)
    x = torch.randn(*(2,) * batched, 4, *(4, 5, 3)[:axes])
    result = check(layer, x)
    assert result.layers[0].spec.macs(tuple(x.shape)) == result.macs > 0


def test_axes_of_their_own_and_other_shapes() -> None:
    check(nn.Conv2d(4, 8, (1, 5), stride=(3, 1), padding=(0, 2), dilation=(1, 2)), torch.randn(2, 4, 9, 11))
    check(nn.ConvTranspose2d(4, 8, (2, 3), stride=(3, 1)), (torch.randn(2, 4, 3, 3), {"output_size": [9, 5]}))
    for shape in [(5,), (2, 5), (2, 3, 4, 5), (0, 5)]:
        assert check(nn.Linear(5, 7), torch.randn(shape)).macs == 35 * torch.zeros(shape).numel() // 5
    assert check(nn.Embedding(9, 4), torch.tensor([[1, 2, 8]])).macs == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    result = check(model, torch.randn(2, 3, 6, 6, dtype=dtype))
    assert result.layers[0].activation_bytes == 2 * 4 * 16 * dtype.itemsize


def test_meta_device() -> None:
    result = check(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to("meta"), torch.zeros(3, 4, device="meta"))
    assert result.macs == 3 * 48
    assert result.environment.device == "meta"


class Everything(nn.Module):
    """Attention, recurrence, tied weights, a shared layer, a parameter of its own, a functional product, a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("position", torch.zeros(1, 8, dtype=torch.float64))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.shared = nn.Linear(8, 8)
        self.same = self.shared
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, mask: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids) * self.scale + self.position.float()
        x = self.encoder(x, src_key_padding_mask=mask)
        while x.norm() > 1e-3 and x.shape[1] > 2:
            x = self.same(self.shared(x))[:, 1:]
        x, _ = self.rnn(x)
        return {"logits": self.head(x), "scores": x @ x.mT, "note": "text"}


def test_a_model_with_everything_adds_up() -> None:
    inputs = {"ids": torch.randint(0, 11, (2, 5)), "mask": torch.zeros(2, 5, dtype=torch.bool)}
    result = check(Everything(), inputs)
    assert result.layer("shared").aliases == ("same",)
    assert result.layer("same").num_calls == 6
    assert [c.count for c in result.layer("shared").calls] == [2, 2, 2]
    assert result.layer("shared").macs == 2 * 2 * (5 + 4 + 3) * 64
    assert result.layer("embed").tied == ("head",)
    assert result.layer("head").tied == ("embed",)
    assert (result.layer("embed").params, result.layer("head").params) == (88, 0)
    assert result.layer("").params == 8
    assert result.layer("unused").calls == ()
    assert result.layer("unused").note == NOT_REACHED
    assert NEVER_CALLED in result.layer("encoder.layers.0.self_attn.out_proj").note
    assert result.layer("encoder.layers.0.self_attn").macs == 10 * 8 * 8 * 4 + 2 * (2 * 2 * 5 * 5 * 4)
    assert result.layer("rnn").macs == 4 * 2 * 8 * 8 * 4
    assert result.layer("").macs == 2 * 2 * 2 * 8
    assert result.other_macs == 0
    assert sorted(result.fused_macs) == ["aten._scaled_dot_product_flash_attention_for_cpu", "aten.mkldnn_rnn_layer"]
    assert result.uncounted == {}
    assert result.input_shapes == ((2, 5), (2, 5))


def test_products_outside_of_layers_are_other_macs() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ x.mT

    result = check(Functional(), torch.randn(3, 4))
    assert (result.macs, result.other_macs) == (48 + 36, 36)


def test_a_layer_that_reads_the_weight_of_a_child() -> None:
    result = check(nn.MultiheadAttention(8, 2, batch_first=True), (torch.randn(2, 5, 8),) * 3)
    assert result.layers[0].params == 3 * 64 + 24
    assert result.layers[0].macs > 0 == result.layers[1].macs


def test_parametrized_and_weight_normed_layers_add_up() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), parametrizations.orthogonal(nn.Linear(6, 6)))
    result = profile(model, torch.randn(2, 4))
    assert [layer.path for layer in result.layers] == ["0", "1"]
    assert result.params == sum(p.numel() for p in model.parameters())
    assert "parametriz" in result.layers[0].note


def test_packed_sequences_and_lists() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 4, 1]), batch_first=True)
    lstm = nn.LSTM(6, 8, batch_first=True)
    assert check(lstm, packed).layers[0].calls[0].in_shape == (10, 6)

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [self.conv(image) for image in images]

    result = check(Many(), [torch.randn(3, 8, 8), torch.randn(3, 9, 7), torch.randn(3, 8, 8)])
    assert [c.count for c in result.layer("conv").calls] == [2, 1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", sorted(FORMATS.names()))
def test_a_factorized_layer_is_one_entry(name: str, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    dense: nn.Module = kind(8, 12, 3, padding=1, stride=2)
    if FORMATS.get(name).unsupported_reason(spec_of(dense)[0]):
        dense = nn.Linear(8, 12)
        if FORMATS.get(name).unsupported_reason(spec_of(dense)[0]):
            pytest.skip("serves neither")
    spec = spec_of(dense)[0]
    x = torch.randn(2, 8, 7, 7) if spec.axes else torch.randn(3, 8)
    halves = {k: max(1, r // 2) for k, r in FORMATS.get(name).max_rank(spec).items()}
    rank = FORMATS.get(name).check_rank(spec, halves)
    model = nn.Sequential(FactorizedLayer.empty(spec, name, rank, torch.zeros(())), nn.ReLU())
    result = check(model, x)
    assert [layer.path for layer in result.layers] == ["0", "1"]
    layer = result.layers[0]
    assert (layer.format, layer.rank, layer.spec) == (name, rank, spec)
    assert layer.macs == FORMATS.get(name).macs(spec, rank, tuple(x.shape)) == result.macs
    assert layer.params == FORMATS.get(name).num_params(spec, rank)


def test_the_model_is_left_as_it_was() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), Noise())
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].register_forward_hook(lambda *_: None)
    x = torch.randn(3, 4)
    generator = torch.get_rng_state()
    result = profile(model, x, latency=True, seconds=0.02)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == [0, 1, 0, 0, 0]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert result.latency is not None


def test_a_failing_forward_leaves_no_hooks_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(ProfileError, match="Sequential does not run on inputs"):
        profile(model, torch.randn(3, 4))
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())
    with pytest.raises(ProfileError, match=r"0\.weight is lazy"):
        profile(nn.Sequential(nn.LazyLinear(3)), torch.randn(3, 4))


def test_latency_is_there_for_the_model_and_every_layer_that_ran() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.add_module("never", nn.Identity())
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    result = profile(model, torch.randn(3, 64), latency=True, seconds=0.05)
    assert result.latency.median_ms > 0
    assert all(layer.latency_ms > 0 for layer in result.layers[:2])
    assert all(layer.latency_spread_ms >= 0 for layer in result.layers[:2])
    assert result.layer("never").latency_ms is None


def test_scripted_children_count_for_their_callers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), torch.jit.script(nn.Linear(5, 6)))
    result = check(model, torch.randn(2, 4))
    assert result.macs == 2 * (20 + 30)
    assert result.other_macs == 60


def test_an_unknown_operation_of_a_layer_is_listed() -> None:
    class MatrixVector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight @ x

    result = profile(MatrixVector(), torch.ones(4))
    assert (result.macs, result.uncounted) == (0, {"aten.mv": 1})
