"""Omniglot: characters of unknown alphabets, recognised after one example of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import pi
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import DataError
from tenfold.networks import OneShotSiamese
from tenfold.networks.learnet import SiameseKind
from tenfold.tasks.base import TASKS, MappedBatches, Progress, Task, seeded
from tenfold.tasks.omniglot_files import SIDE, background, one_shot_runs
from tenfold.tracing.contexts import device_of, dtype_of, evaluating
from tenfold.tracing.inputs import call_model, to_device

HELD_OUT = ("Early_Aramaic", "Tagalog")  # alphabets of the validation part
WAYS = 20
PICTURES = 4  # compared with an exemplar in training, one of which shows the same
EPOCH = 3_200  # exemplars in an epoch
EPISODES = 20  # of the validation part


@TASKS.register("omniglot")
class Omniglot(Task):
    """Which of twenty characters, each seen once, is it? A siamese network with filters predicted from the example.

    ``learnet``: the depthwise core of a layer is predicted; ``whole``: the whole layer; ``shared``: a plain siamese
    network. Training is on pairs of the two small background sets (eight alphabets, turned by quarters as further
    characters), the test is Omniglot's 20 official runs (other alphabets and drawers), the validation part episodes of
    two background alphabets that are held out. The archives of github.com/brendenlake/omniglot are looked for in
    ``data``, else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets: there, or in a folder ``omniglot`` within.
    """

    name: ClassVar[str] = "omniglot"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("learnet", "shared", "whole")
    weights_hint: ClassVar[str] = "Train them: tenfold train --method plain. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 8,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": 0.001,
        "autocast": "off",
        "channels_last": False,
    }

    def architecture(self) -> nn.Module:
        """Return the siamese network that the variant names."""
        return OneShotSiamese(16, cast("SiameseKind", self.variant))

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Return seeded exemplars (batch, 1, 28, 28) and pictures (batch, 4, 1, 28, 28)."""
        both = torch.rand(batch_size, 1 + PICTURES, 1, SIDE, SIDE, generator=seeded(0))
        return both[:, 0], both[:, 1:]

    def loss(self) -> Callable[[nn.Module, Any, Any], Tensor]:
        """Return the logistic loss of pairs, in which those of the same weigh as much as all others."""
        return logistic

    @cached_property
    def alphabets(self) -> dict[str, Tensor]:
        """Drawings (characters, 20, 28, 28) of the background alphabets."""
        return background(self.data)

    def _fitting(self, *, hold_out: bool) -> list[Tensor]:
        own = [drawings for name, drawings in self.alphabets.items() if not (hold_out and name in HELD_OUT)]
        return [drawings.rot90(turn, (2, 3)) for drawings in own for turn in range(4)]

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False) -> Pairs:
        """Return ((exemplars, pictures), same) of one epoch, drawn and distorted by (seed, epoch)."""
        return Pairs(self._fitting(hold_out=hold_out), batch_size, EPOCH, (seed, epoch, 1))

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> MappedBatches[Any]:
        """Return (exemplars, pictures) of the alphabets outside the validation part."""
        pairs = Pairs(self._fitting(hold_out=True), batch_size, samples, (seed, 0, 2))
        return MappedBatches(pairs, _first)

    def validation_batches(self, samples: int | None = None, *, batch_size: int, seed: int = 0) -> Any:
        """Return ((exemplars, pictures), same) of pairs of the validation part, at most ``samples`` exemplars."""
        held = [self.alphabets[name] for name in HELD_OUT]
        return Pairs(held, batch_size, samples or 800, (seed, 0, 3))

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> Any:
        """Return ((exemplars, pictures), same) of every exemplar of the official runs with the twenty tests."""
        del batch_size  # an exemplar has twenty pictures already
        batches = [((z, x), _same(answers)) for z, x, answers in self._episodes("test")]
        return batches[: -(-samples // WAYS)] if samples else batches

    def evaluate(
        self,
        model: nn.Module,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> float:
        """Return the fraction of pictures whose exemplar scores highest among twenty; ``limit`` is of pictures."""
        del batch_size
        device, dtype, right, done = device_of(model), dtype_of(model), 0, 0
        episodes = list(self._episodes(split))[: None if limit is None else -(-limit // WAYS)]
        with evaluating(model):
            for exemplars, pictures, answers in episodes:
                scores = call_model(model, to_device((exemplars, pictures), device, dtype))
                right += int((scores.argmax(0).cpu() == answers).sum())
                done += len(answers)
                if progress is not None:
                    progress(done, len(episodes) * WAYS)
        return right / done

    def _episodes(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield exemplars (20, 1, 28, 28), pictures (20, 20, 1, 28, 28), the same for each, and answers (20,)."""
        if split == "test":
            for shown, tests, answers in zip(*one_shot_runs(self.data), strict=True):
                yield _floats(shown)[:, None], _floats(tests)[None, :, None].expand(WAYS, -1, -1, -1, -1), answers
            return
        if split != "validation":
            msg = f"unknown split {split!r}. Known: test, validation."
            raise DataError(msg)
        generator = seeded(0, 5)  # a constant: the episodes never change
        every = torch.cat([self.alphabets[name] for name in HELD_OUT])
        for _ in range(EPISODES):
            chosen = torch.randperm(len(every), generator=generator)[:WAYS]
            first, second = torch.rand(WAYS, 20, generator=generator).argsort(1)[:, :2].T
            tests = _floats(every[chosen, second])[None, :, None].expand(WAYS, -1, -1, -1, -1)
            yield _floats(every[chosen, first])[:, None], tests, torch.arange(WAYS)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Exemplars, each with one picture of the same character and three of others, half of these of its alphabet."""

    alphabets: list[Tensor]  # (characters, 20, 28, 28) each
    batch_size: int
    samples: int
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        generator = seeded(*self.seeds)
        every = torch.cat(self.alphabets)
        owner = torch.repeat_interleave(torch.tensor([len(a) for a in self.alphabets]))
        starts = torch.tensor([0, *(len(a) for a in self.alphabets)]).cumsum(0)
        for left in range(self.samples, 0, -self.batch_size):
            count = min(left, self.batch_size)
            own = torch.randint(len(every), (count,), generator=generator)
            sizes = (starts[owner[own] + 1] - starts[owner[own]])[:, None]
            places = torch.rand(count, PICTURES - 1, generator=generator)
            within = starts[owner[own]][:, None] + (places * (sizes - 1)).long()
            within = within + (within >= own[:, None]).long()  # never the character itself
            anywhere = torch.randint(1, len(every), (count, PICTURES - 1), generator=generator)
            others = torch.where(
                torch.rand(within.shape, generator=generator) < 0.5, within, (own[:, None] + anywhere) % len(every)
            )
            characters = torch.cat([own[:, None], own[:, None], others], 1)
            drawers = torch.rand(count, 20, generator=generator).argsort(1)[:, : PICTURES + 1]
            chosen = _floats(every[characters, drawers])
            seen = distorted(chosen.flatten(0, 1)[:, None], generator).unflatten(0, chosen.shape[:2])
            same = torch.zeros(count, PICTURES)
            same[:, 0] = 1
            yield (seen[:, 0], seen[:, 1:]), same


def distorted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (samples, 1, rows, columns) turned by up to 10°, scaled and sheared by up to a tenth, moved."""
    turn, scale, shear, right, down = torch.rand(5, len(pictures), generator=generator) * 2 - 1
    turn, scale, shear = turn * 10 * pi / 180, 1 + 0.1 * scale, 0.1 * shear
    upper = torch.stack([scale * turn.cos(), scale * (shear - turn.sin()), 0.1 * right], -1)
    lower = torch.stack([scale * turn.sin(), scale * turn.cos(), 0.1 * down], -1)
    grid = F.affine_grid(torch.stack([upper, lower], 1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def logistic(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    """Return the mean logistic loss of scores, in which pairs of the same weigh as much as all others."""
    weight = torch.full_like(targets, PICTURES - 1.0)
    return F.binary_cross_entropy_with_logits(call_model(model, inputs), targets, pos_weight=weight)


def _first(batch: tuple[Any, Any]) -> Any:
    return batch[0]


def _floats(drawings: Tensor) -> Tensor:
    return drawings.float() / 255


def _same(answers: Tensor) -> Tensor:
    return F.one_hot(answers, WAYS).T.float()
