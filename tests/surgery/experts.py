"""Mixtures of experts as people write them: stacks of matrices, with the products written in different ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, INNER, COUNT, PATCHES = 16, 48, 4, 16


class Experts(nn.Module):
    """Two stacks (count, in, out) with biases, of which each token meets two matrices."""

    def __init__(self, words: str = "gathered") -> None:
        super().__init__()
        self.words = words
        self.up = nn.Parameter(torch.randn(COUNT, WIDTH, INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(COUNT, INNER, WIDTH) / INNER**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(COUNT, INNER))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        return getattr(self, f"_{self.words}")(x, chosen, shares)

    def _gathered(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        inner = torch.einsum("nd,nkdf->nkf", x, self.up[chosen]) + self.bias[chosen]
        outs = torch.einsum("nkf,nkfd->nkd", functional.gelu(inner), self.down[chosen])
        return (outs * shares[..., None]).sum(1)

    def _looped(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, (up, bias, down) in enumerate(zip(self.up, self.bias, self.down, strict=True)):
            rows, place = torch.where(chosen == number)
            own = functional.gelu(torch.addmm(bias, x[rows], up)) @ down
            out = out.index_add(0, rows, own * shares[rows, place, None])
        return out

    def _dense(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        outs = functional.gelu(x @ self.up + self.bias[:, None]) @ self.down
        return torch.einsum("end,ne->nd", outs, torch.zeros(len(x), COUNT).scatter(1, chosen, shares))


class Block(nn.Module):
    """Attention and routed experts."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.experts = nn.Linear(WIDTH, COUNT), Experts(words)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.merge(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens = self.second(x).flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        return x + self.experts(tokens, chosen, shares).view_as(x)


class RoutedViT(nn.Module):
    """A vision transformer for pictures (batch, 3, 16, 16) whose MLPs are mixtures of experts."""

    def __init__(self, words: str = "gathered") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.places = nn.Parameter(0.5 * torch.randn(1, PATCHES, WIDTH))
        self.blocks = nn.Sequential(Block(words), Block(words))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return scores


WORDS = ["gathered", "looped", "dense"]
