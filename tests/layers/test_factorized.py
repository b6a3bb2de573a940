"""The layer that stands in: the face of the dense one, plain stages, and an independent life."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from tenfold.decompositions import decompose
from tenfold.layers import Contract, FactorizedLayer, build, spec_of, stage_specs
from tenfold.records import ContractSpec, LayerSpec
from tenfold.testing.weights import random_factors


def factorized(layer: nn.Module, format: str, rank: dict[str, int]) -> FactorizedLayer:
    spec, _ = spec_of(layer)
    return FactorizedLayer.of(decompose(layer.weight, format, rank, spec=spec).value, getattr(layer, "bias", None))


def test_stages_are_plain_torch_layers_under_stable_names():
    layer = factorized(nn.Conv2d(8, 6, 3, stride=2, padding=1), "tucker2", {"out": 4, "in": 3})
    assert [type(s) for s in layer.stages] == [nn.Conv2d] * 3
    assert list(layer.state_dict()) == ["stages.0.weight", "stages.1.weight", "stages.2.weight", "stages.2.bias"]
    assert layer.stages[1].stride == (2, 2)
    linear = factorized(nn.Linear(8, 6), "low_rank", {"rank": 2})
    assert [type(s) for s in linear.stages] == [nn.Linear] * 2
    embedding = factorized(nn.Embedding(9, 6, padding_idx=0), "low_rank", {"rank": 2})
    assert [type(s) for s in embedding.stages] == [nn.Embedding, nn.Linear]
    assert embedding.stages[0].padding_idx == 0


def test_the_face_of_the_dense_layer_is_there():
    conv = nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding="valid", groups=2, padding_mode="zeros")
    layer = factorized(conv, "low_rank", {"rank": 2})
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.weight.shape == conv.weight.shape
    assert torch.equal(layer.bias, conv.bias)
    linear = factorized(nn.Linear(8, 6, bias=False), "low_rank", {"rank": 2})
    assert (linear.in_features, linear.out_features, linear.bias) == (8, 6, None)
    assert str(linear).startswith("FactorizedLayer(\n  low_rank(rank=2) for Linear 8→6")


def test_weight_is_differentiable_and_follows_training():
    layer = factorized(nn.Linear(8, 6), "low_rank", {"rank": 2})
    layer.weight.square().sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if n.endswith("weight"))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.stages[0].weight.mul_(2)
    torch.testing.assert_close(layer.weight.detach(), 2 * before)


def test_factors_own_their_memory():
    value = random_factors(
        type(factorized(nn.Linear(8, 6), "low_rank", {"rank": 2}).factorization()),
        LayerSpec(kind="linear", in_channels=8, out_channels=6),
        {"rank": 2},
    )
    one, two = FactorizedLayer.of(value), FactorizedLayer.of(value)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}
    assert all(p.is_contiguous() for p in one.parameters())
    twin = copy.deepcopy(one)
    with torch.no_grad():
        twin.stages[0].weight.zero_()
    assert one.weight.abs().sum() > 0


def test_empty_has_the_structure_and_takes_the_state():
    layer = factorized(nn.Conv2d(8, 6, 3), "tucker2", {"out": 4, "in": 3})
    empty = FactorizedLayer.empty(layer.spec, "tucker2", {"out": 4, "in": 3}, like=torch.zeros(1))
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(empty(x), layer(x))
    assert stage_specs(layer) == tuple(spec_of(s)[0] for s in layer.stages)
    meta = FactorizedLayer.empty(layer.spec, "tucker2", {"out": 4}, like=torch.zeros(1, device="meta"))
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("format", ["low_rank", "spatial", "tucker2"])
def test_output_size_of_transposed_convolutions(format):
    layer = nn.ConvTranspose2d(6, 4, (3, 4), stride=(2, 3), padding=1)
    small = factorized(layer, format, {})  # full rank
    x = torch.randn(2, 6, 4, 5)
    for size in ([7, 14], [8, 16]):
        wanted = layer(x, output_size=size)
        assert list(wanted.shape[-2:]) == size
        torch.testing.assert_close(small(x, output_size=size), wanted, rtol=1e-4, atol=1e-5)


def test_contract_is_an_einsum_with_a_bias():
    spec = ContractSpec(modes=(4, 6), equation="...ab,cb->...ac", weight_shape=(5, 6), bias=True)
    layer = build(spec, nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(20)))
    assert isinstance(layer, Contract)
    x = torch.randn(3, 7, 24)
    wanted = torch.einsum("nmab,cb->nmac", x.view(3, 7, 4, 6), layer.weight).reshape(3, 7, 20) + layer.bias
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0, 0]), wanted[0, 0])
    assert spec.macs((3, 7, 24)) == 21 * 4 * 5 * 6
    assert spec.num_params == 30 + 20


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OnlyRenamed(nn.Linear):
    pass


class Gained(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1]))


def wrapped() -> nn.Linear:
    layer = nn.Linear(4, 4)
    own = layer.forward
    layer.forward = lambda x: own(x) * 10
    return layer


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ReLU(), "ReLU has no weight to factorize"),
        (
            nn.GRUCell(3, 3),
            "GRUCell is not a layer that tenfold factorizes; nn.GRU and nn.LSTM are, which run one step too",
        ),
        (Quiet(), "Quiet is not a layer that tenfold factorizes"),
        (nn.BatchNorm2d(3), "BatchNorm2d is not a layer that tenfold factorizes"),
        (OwnForward(4, 4), "OwnForward is a Linear with a forward of its own"),
        (Gained(4, 4), "Gained holds 'gain' besides its weight and bias"),
        (wrapped(), "forward of this Linear was replaced by another"),
        (parametrizations.orthogonal(nn.Linear(4, 4)), "parametrized: remove the parametrization first"),
        (nn.LazyLinear(4), "lazy and has not seen an input yet"),
        (nn.Linear(4, 4).to(torch.complex64), "has dtype torch.complex64: only floating point weights"),
        (nn.Linear(0, 4), "is empty"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_served_says_why(layer, reason):
    spec, text = spec_of(layer)
    assert spec is None
    assert reason in text


@pytest.mark.filterwarnings("ignore")
def test_old_weight_norm_is_seen():
    assert "computed, not a parameter of its own" in spec_of(weight_norm(nn.Linear(4, 4)))[1]


def test_a_subclass_that_changes_nothing_is_served():
    assert spec_of(OnlyRenamed(4, 3))[0] == LayerSpec(kind="linear", in_channels=4, out_channels=3, bias=True)


def test_the_input_may_be_given_by_torchs_name():
    layer = factorized(nn.Linear(8, 6), "low_rank", {"rank": 2})
    x = torch.randn(3, 8)
    assert torch.equal(layer(input=x), layer(x))
