"""Real tokens are counted and padding is not, whichever mask says which is which."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.tracing.masks import real_tokens, token_mask

REAL = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
LOW = torch.finfo(torch.float32).min
CAUSAL = torch.ones(4, 4).tril().bool()


def additive(seen, low=-torch.inf, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)


UNDERSTOOD = {
    "integers": ("attention_mask", REAL.long()),
    "booleans": ("attention_mask", REAL),
    "ones and zeros": ("attention_mask", REAL.float()),
    "additive": ("attention_mask", additive(REAL)),
    "additive, finite": ("attention_mask", additive(REAL, LOW)),
    "additive, float16": ("attention_mask", additive(REAL, -65504, torch.float16)),
    "additive, -1e4": ("attention_mask", additive(REAL, -1e4)),
    "True is padding": ("key_padding_mask", ~REAL),
    "True is padding, of nn.Transformer": ("src_key_padding_mask", ~REAL),
    "additive padding": ("src_key_padding_mask", additive(REAL)),
    "keys": ("attention_mask", REAL[:, None, None]),
    "additive keys": ("attention_mask", additive(REAL[:, None, None])),
    "causal": ("attention_mask", CAUSAL & REAL[:, None, None]),
    "causal, additive": ("attention_mask", additive(CAUSAL & REAL[:, None], LOW)),
    "causal, every head": ("attention_mask", (CAUSAL & REAL[:, None, None]).expand(3, 2, 4, 4)),
}


@pytest.mark.parametrize(("name", "mask"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_real_tokens_are_found(name, mask):
    assert torch.equal(token_mask({"x": torch.zeros(3, 4, 8), name: mask}), REAL)


NOT_UNDERSTOOD = {
    "a bias": ("attention_mask", torch.linspace(-2, 0, 4).expand(3, 4)),
    "queries and keys of one sequence": ("attention_mask", CAUSAL.float()),
    "queries and keys, additive": ("attention_mask", additive(CAUSAL)),
    "True is what is masked out": ("attention_mask", ~CAUSAL.expand(3, 1, 4, 4)),
    "no tensor": ("attention_mask", None),
    "another name": ("mask", REAL),
}


@pytest.mark.parametrize(("name", "mask"), NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_all_rows_count_where_a_mask_is_not_understood(name, mask):
    assert token_mask({"x": torch.zeros(3, 4, 8), name: mask}) is None


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.ones(3, 1, 4, 4).tril().bool(), additive(CAUSAL[None])])
def test_masks_without_padding_leave_all_rows(mask):
    x = torch.randn(3, 4, 8)
    assert len(real_tokens(x, token_mask({"x": x, "attention_mask": mask})).reshape(-1, 8)) == 12


class Encoder(nn.Module):
    def forward(self, x, attention_mask=None):
        return x


def test_a_positional_mask_is_known_by_the_signature():
    batch = (torch.zeros(3, 4, 8), REAL)
    assert torch.equal(token_mask(batch, Encoder()), REAL)
    assert token_mask(batch) is None
    assert token_mask((torch.zeros(3, 4), REAL), nn.Bilinear(4, 4, 2)) is None
    assert token_mask(batch, torch.jit.script(nn.Sequential(nn.Linear(8, 2)))) is None


def test_rows_are_selected_along_both_orders_of_axes():
    x = torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    wanted = x[REAL]
    assert torch.equal(real_tokens(x, REAL), wanted)
    assert sorted(real_tokens(x.transpose(0, 1), REAL).tolist()) == sorted(wanted.tolist())
    assert torch.equal(real_tokens(x[..., 0].long(), REAL, features=False), wanted[:, 0].long())
    assert torch.equal(real_tokens(x, REAL[:1]), x[:, :3].flatten(0, 1))  # one mask for all samples
    assert real_tokens(x[:, :3], REAL).shape == (3, 3, 2)  # of another sequence
