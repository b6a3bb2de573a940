"""Small models whose forward does more than to hand tensors from layer to layer."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, OUT = 24, 8


def linear(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


class Block(nn.Module):
    """Two layers with a shortcut; subclasses do something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def inside(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inside(F.gelu(self.up(x))))


class Stack(nn.Module):
    """Blocks between a first and a last layer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.last = linear(), linear(WIDTH, OUT)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.last(x)


# What draws random numbers


class Variational(Stack):
    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.mean, self.spread = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x).relu())
        x = self.mean(x) + torch.randn_like(x) * (0.3 * self.spread(x)).exp()
        return self.last(self.blocks[1](x).relu())


class DroppingBlock(Block):
    def inside(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


class Denoiser(Stack):
    """A step of diffusion: time and noise are drawn, by torch, numpy and Python."""

    def forward(self, x: Tensor) -> Tensor:
        level = torch.rand(len(x), 1) * random.random()  # noqa: S311
        noise = torch.from_numpy(np.random.randn(*x.shape)).to(x)  # noqa: NPY002
        x = self.first(x * (1 - level) + noise * level).relu()
        for block in self.blocks:
            x = block(x + level)
        return self.last(x)


class OwnGenerator(Stack):
    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.generator, self.numbers = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = block(x + 0.3 * torch.randn(x.shape, generator=self.generator) + self.numbers.normal())
        return self.last(x)


ELSEWHERE = torch.Generator().manual_seed(5)


class NoisyBlock(Block):
    """The generator is no attribute of any module."""

    def inside(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn(x.shape, generator=ELSEWHERE)


# What leaves values behind


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        self.entered = x
        self.features = [self.one(x)]
        self.features.append(self.two(self.features[0]).relu())
        return self.features[-1] * 0.5


class UNet(Stack):
    """The decoder takes from the encoder what that keeps as attributes: features, and its own input."""

    def __init__(self) -> None:
        super().__init__(Encoder(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.first(x).relu()))
        x = self.blocks[2](x + self.blocks[0].features[0] + self.blocks[0].entered)
        return self.last(x + self.blocks[0].features[1])


class Pyramid(Stack):
    """Hooks fill a list outside of all modules, which the forward empties at its end."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
        self.merge = linear(4 * WIDTH, WIDTH)
        seen: list[Tensor] = []
        for stage in self.blocks:
            stage[0].up.register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
            stage[1].register_forward_hook(lambda _m, _args, y: seen.append(y.detach()))
        self.taken = lambda: [seen.pop(0) for _ in list(seen)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.last(self.merge(torch.cat(self.taken(), -1)).relu() + x)


_SKIPS: dict[str, Tensor] = {}


class Giver(Block):
    def forward(self, x: Tensor) -> Tensor:
        _SKIPS["given"] = x
        return super().forward(x)


class Taker(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + _SKIPS["given"])


class Streaming(Stack):
    """Remembers from one forward to the next: a state, a running mean, a counter of tensors and one of Python."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.state: Tensor = torch.zeros(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        x = self.first(x).relu()
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.state = self.state * 0.5 + x.mean(0)
        x = self.blocks[self.calls % 2](x - self.mean + self.state)
        return self.last(x * (1 + self.steps))


class CachingAttention(nn.Module):
    """Writes into a buffer made before, as caches of keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = linear(), linear()
        self.register_buffer("cache", torch.zeros(512, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[: len(x)] = self.key(x)
        return self.query(x)


class Cached(Stack):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(CachingAttention(), Block()), Block())

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        x = self.blocks[0](self.first(x).relu())
        return self.last(self.blocks[1](x * self.blocks[0][0].cache[:rows].sigmoid()))


# What routes rows


class Experts(nn.Module):
    """Each row goes to one expert; those without rows do not run."""

    def __init__(self, *, all_run: bool) -> None:
        super().__init__()
        self.router, self.all_run = linear(WIDTH, 4), all_run
        self.experts = nn.ModuleList(nn.Sequential(linear(), nn.GELU(), linear()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = (5 * self.router(x)).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if self.all_run or len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return x + y


class Capacity(nn.Module):
    """The two best experts of each row, of which each takes so many rows and no more, by products with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Sequential(linear(), nn.GELU(), linear()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gates = (5 * self.router(x)).softmax(-1)
        room = len(x) // 3
        chosen = F.one_hot(gates.topk(2).indices, 4).sum(1)
        place = chosen.cumsum(0) * chosen - 1
        fits = (place >= 0) & (place < room)
        send = F.one_hot(place.clamp(0, room - 1), room).to(x) * fits[..., None].to(x)
        combine = send * gates[..., None]
        sent = torch.einsum("sec,sd->ecd", (combine > 0).to(x), x)
        out = torch.stack([expert(own) for expert, own in zip(self.experts, sent, strict=True)])
        return x + torch.einsum("sec,ecd->sd", combine, out)


class Sorted(Block):
    """Rows in the order of a score, neighbours mixed, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.score = linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        order = self.score(x)[:, 0].argsort()
        y = super().forward(x[order])
        return (y + y.roll(1, 0))[order.argsort()]


class Pruned(Block):
    """Keeps the half of the rows with the best score, and those above a threshold: numbers differ by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.score = linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)[:, 0]
        x = x[(score >= score.topk(len(x) // 2).values[-1]) | (score > 0)]
        return super().forward(x)


class Merged(Block):
    """Adds each odd row to the even one that is most like it."""

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[::2], x[1::2]
        nearest = (F.normalize(even, dim=-1) @ F.normalize(odd, dim=-1).T).max(0).indices
        return super().forward(even.index_add(0, nearest, odd) / 2)


class Exits(Stack):
    """Batches go different ways, as their activations say, and need different skips."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        x = self.blocks[0](first)
        if x.mean() > first.mean():
            x = self.blocks[1](x) + first
        scale = x.abs().max().item()
        return self.last(self.blocks[2](x / scale))


class Listed(nn.Module):
    """Experts again, whose rows are looked up in lists of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.router = linear(WIDTH, 3)
        self.experts = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1).tolist()
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = [row for row, choice in enumerate(chosen) if choice == number]
            y[rows] = expert(x[rows])
        return x + y


class Grouped(Block):
    """Adds the mean of the rows that round to the same number, by an operation that cannot be told what to return."""

    def __init__(self) -> None:
        super().__init__()
        self.score = linear(WIDTH, 1)

    def inside(self, x: Tensor) -> Tensor:
        _, groups = x.sum(-1).round().unique(return_inverse=True)
        sums = x.new_zeros(len(x), x.shape[1]).index_add(0, groups, x)
        return x + sums[groups] / groups.bincount()[groups, None]


class GammaBlock(Block):
    """How many numbers are drawn depends on the values."""

    def inside(self, x: Tensor) -> Tensor:
        return x * torch.distributions.Gamma(x.abs() + 0.1, 1.0).sample()


# What calls its layers in other ways


class Shared(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for _ in range(2):
            x = torch.tanh(self.blocks[0](x))
        return self.last(x)


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


MODELS = {
    "variational": Variational,
    "dropout at test time": lambda: Stack(DroppingBlock(), DroppingBlock()),
    "denoiser": lambda: Denoiser(Block(), Block()),
    "a generator of its own": OwnGenerator,
    "a generator elsewhere": lambda: Stack(NoisyBlock(), NoisyBlock()),
    "features in attributes": UNet,
    "features by hooks": Pyramid,
    "features in a dictionary": lambda: Stack(nn.Sequential(Giver(), Block()), Taker()),
    "state": Streaming,
    "a buffer as a cache": Cached,
    "experts": lambda: Stack(Experts(all_run=True), Experts(all_run=True)),
    "experts that do not always run": lambda: Stack(Experts(all_run=False), Block()),
    "experts of limited capacity": lambda: Stack(Block(), Capacity(), Block()),
    "sorted rows": lambda: Stack(Block(), Sorted(), Block()),
    "pruned rows": lambda: Stack(Block(), Pruned(), Block()),
    "merged rows": lambda: Stack(Block(), Merged(), Block()),
    "rows in lists": lambda: Stack(Block(), Listed()),
    "early exits": lambda: Exits(Block(), Block(), Block()),
    "shared layers": lambda: Shared(Block()),
    "checkpoints": lambda: Checkpointed(Block(), Block()),
}

# Models whose later layers see rows that cannot be held together with those of the original.
ADRIFT = {"groups": lambda: Stack(Block(), Grouped()), "gamma noise": lambda: Stack(Block(), GammaBlock())}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (MODELS | ADRIFT)[name]().eval()


def batches(count: int, rows: int = 96, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    mix = mix + torch.eye(WIDTH)
    return [torch.randn(rows, WIDTH, generator=generator) @ mix for _ in range(count)]
