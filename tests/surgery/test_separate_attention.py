"""Attention taken apart into its projections, against torch's own module."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import tenfold
from tenfold.errors import PlanError
from tenfold.layers import JoinedProjections, SeparateAttention
from tenfold.surgery import joined_projections, separate_, separated

OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "batch_first": True, "bias": False},
]


def pair(**options):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, **options).eval()
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    return dense, SeparateAttention.of(dense)


def inputs(dense, batched=True):
    shapes = [(4, 12), (5, dense.kdim), (5, dense.vdim)]
    if batched:
        shapes = [(2, n, c) if dense.batch_first else (n, 2, c) for n, c in shapes]
    return [torch.randn(shape) for shape in shapes]


def same(first, second):
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_attention_of_torch(options):
    dense, own = pair(**options)
    for batched, need, average in itertools.product((True, False), repeat=3):
        x = inputs(dense, batched)
        given = {"need_weights": need, "average_attn_weights": average}
        same(own(*x, **given), dense(*x, **given))


@pytest.mark.parametrize("need", [True, False])
def test_masks_are_those_of_torch(need):
    dense, own = pair(batch_first=True)
    x = inputs(dense)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    blocked = torch.rand(4, 5) > 0.7
    blocked[:, 0] = False
    added = torch.randn(4, 5)
    many = torch.randn(2 * 3, 4, 5)
    for mask, keys in itertools.product((None, blocked, added, many), (None, padding)):
        given = {"attn_mask": mask, "key_padding_mask": keys, "need_weights": need}
        if mask is not None and keys is not None and mask.dtype != keys.dtype:  # torch wants both of one kind
            given["key_padding_mask"] = torch.zeros(keys.shape).masked_fill(keys, -torch.inf)
        same(own(*x, **given), dense(*x, **given))
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    short = (x[0], x[0], x[0])
    same(
        own(*short, attn_mask=causal, is_causal=True, need_weights=need),
        dense(*short, attn_mask=causal, is_causal=True, need_weights=need),
    )
    with pytest.raises(ValueError, match="attn_mask"):
        own(*short, is_causal=True)


@pytest.mark.parametrize("padding", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])])
def test_transformer_layers_of_torch_take_it(padding):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 12)
    small = tenfold.surgery.separate(encoder, joined_projections(encoder))
    assert separated(small) == joined_projections(encoder) == dict.fromkeys(
        ["layers.0.self_attn", "layers.1.self_attn"], "MultiheadAttention"
    )  # fmt: skip
    seen = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
    for grad in (True, False):  # the fused kernel is taken without gradients
        with torch.set_grad_enabled(grad):
            made, wanted = small(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
        assert torch.allclose(made[seen], wanted[seen], atol=1e-5)
    decoder = nn.TransformerDecoderLayer(12, 2, 20, batch_first=True).eval()
    apart = tenfold.surgery.separate(decoder, joined_projections(decoder))
    assert len(separated(apart)) == 2
    assert torch.allclose(apart(x, x), decoder(x, x), atol=1e-6)


def test_training_drops_weights():
    dense, own = pair(dropout=0.5, batch_first=True)
    x = inputs(dense)
    own.train()
    assert not torch.equal(own(*x)[0], own(*x)[0])
    assert torch.equal(own.eval()(*x)[0], own(*x)[0])


def test_joined_layers_put_their_outputs_side_by_side():
    net = nn.ModuleDict({"qkv": nn.Linear(6, 12), "other": nn.Linear(6, 12), "to_qkv": nn.Linear(6, 10)})
    wanted = net["qkv"]
    x = torch.randn(3, 6)
    expected = wanted(x)
    assert joined_projections(net) == {"qkv": "4+4+4"}  # 10 are no three parts
    separate_(net, joined_projections(net))
    assert isinstance(net["qkv"], JoinedProjections)
    assert torch.allclose(net["qkv"](x), expected, atol=1e-6)
    assert torch.equal(net["qkv"].key.weight, wanted.weight[4:8])
    assert separated(net) == {"qkv": "4+4+4"}
    again = separate_(net, {"qkv": "4+4+4"})
    assert again["qkv"] is net["qkv"]


def test_what_is_shared_or_unusual_stays_whole():
    shared = nn.MultiheadAttention(8, 2)
    other = nn.MultiheadAttention(8, 2)
    other.in_proj_weight = shared.in_proj_weight
    net = nn.ModuleList([shared, other, nn.MultiheadAttention(8, 2, add_bias_kv=True)])
    net.append(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert joined_projections(net) == {}
    with pytest.raises(PlanError, match="another model's plan"):
        separate_(nn.ModuleDict({"qkv": nn.Linear(6, 12)}), {"qkv": "4+4"})
