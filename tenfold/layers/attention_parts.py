"""Attention whose projections are layers of their own: ``nn.MultiheadAttention`` and joined ones, taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.layers.dense_layers import dense_weight

PARTS = ("query", "key", "value")


class JoinedProjections(nn.Module):
    """Projections of the same inputs under names of their own, whose outputs are put side by side.

    It stands where one linear layer made queries, keys and values at once. Each may be narrower or factorized.

    Attributes:
        query, key, value: the projections; without queries in cross-attention.
        kind: how a plan names it: the numbers of outputs at first.
    """

    def __init__(self, parts: Sequence[nn.Module], kind: str) -> None:
        super().__init__()
        self.names = PARTS[-len(parts) :]
        self.kind = kind
        for name, part in zip(self.names, parts, strict=True):
            self.add_module(name, part)

    @classmethod
    def of(cls, layer: nn.Module, sizes: Sequence[int]) -> Self:
        """Return the projections of a linear layer, so many outputs each, as layers of torch."""
        held: Any = layer
        weights = dense_weight(layer).detach().split(list(sizes))
        biases = [None] * len(sizes) if held.bias is None else held.bias.detach().split(list(sizes))
        parts = [linear(weight, bias, like=layer) for weight, bias in zip(weights, biases, strict=True)]
        return cls(parts, "+".join(str(size) for size in sizes)).train(layer.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return (..., all outputs) for inputs (..., in)."""
        return torch.cat([self.get_submodule(name)(input) for name in self.names], dim=-1)


class SeparateAttention(nn.Module):
    """``nn.MultiheadAttention`` of which every projection is a linear layer that is called.

    Takes the same arguments, and returns the same. Heads of queries and keys may be narrower than at first, and so may
    those of values, each for itself; scores are scaled by the first size.

    Attributes:
        num_heads: number of heads.
        scaling: of the scores.
        batch_first, embed_dim, dropout: as in ``nn.MultiheadAttention``.
    """

    # What transformer layers of torch ask an attention for, before they call it.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, projections: Sequence[nn.Module], output: nn.Module, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj = output
        self.num_heads, self.embed_dim = num_heads, embed_dim
        self.scaling = (embed_dim // num_heads) ** -0.5
        self.batch_first, self.dropout = False, 0.0

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> Self:
        """Return the same attention, with parameters of its own."""
        if module.in_proj_weight is None:
            weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        else:
            weights = list(module.in_proj_weight.chunk(3))
        biases: Any = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.detach().chunk(3)
        parts = [linear(w.detach(), b, like=module.out_proj) for w, b in zip(weights, biases, strict=True)]
        bias = None if module.out_proj.bias is None else module.out_proj.bias.detach()
        output = linear(module.out_proj.weight.detach(), bias, like=module.out_proj)
        new = cls(parts, output, module.num_heads, module.embed_dim)
        new.batch_first, new.dropout = module.batch_first, module.dropout
        return new.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - as torch has it
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and, with ``need_weights``, the weights; see ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            msg = "is_causal is a hint about attn_mask: pass the mask as well"
            raise ValueError(msg)
        batched = query.dim() == 3
        given = (query, key, value)
        if not batched:
            given = (query[None], key[None], value[None])
        elif not self.batch_first:
            given = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._heads(project(x)) for project, x in zip(projections, given, strict=True))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * self.scaling
            weights = (scores if mask is None else scores + mask).softmax(-1)
            heads = functional.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scaling)
        outputs = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return outputs[0], None if weights is None else weights[0]
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return (batch, heads, rows, size) of (batch, rows, heads·size)."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return what is added to the scores (batch or 1, heads or 1, queries or 1, keys)."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
            masks.append(padding[:, None, None])
        added = [
            torch.zeros_like(m, dtype=like.dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m
            for m in masks
        ]
        return sum(added[1:], added[0]).to(like.dtype) if added else None


def linear(weight: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Linear:
    """Return a linear layer with a copy of these values, as trainable as another layer and in its mode."""
    held: Any = like
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    trained = held.weight.requires_grad
    new.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trained)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), trained)
    return new.train(like.training)
