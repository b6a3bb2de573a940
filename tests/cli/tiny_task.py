"""A task that is trained, compressed and scored in a fraction of a second; and ways for it to go wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.records import Metric
from tenfold.tasks import InMemoryTask, TensorSet


class Tiny(InMemoryTask):
    """Points in 8 dimensions, told apart by a small network with batch norm.

    The variants end the second epoch of training in the ways that they are called, while a file ``armed`` is there.
    """

    name: ClassVar[str] = "tiny"
    tune_settings: ClassVar = {"epochs": 3, "batch_size": 40, "lr": 0.05}
    variants: ClassVar[tuple[str, ...]] = ("plain", "empty", "killed", "interrupted", "broken")
    input_shape: ClassVar[tuple[int, ...]] = (8,)

    def architecture(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
        )

    def pretrained(self) -> nn.Module:
        return self.build()

    def read(self, split: str) -> TensorSet:
        samples = 0 if self.variant == "empty" else {"train": 240, "test": 60}[split]
        inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(len(split)))
        return TensorSet(inputs, inputs[:, :3].argmax(1))

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False):
        if epoch == 1 and not hold_out and Path("armed").exists():
            self._go_wrong()
        return super().train_batches(epoch, batch_size=batch_size, seed=seed, hold_out=hold_out)

    def _go_wrong(self) -> None:
        match self.variant:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(10)
            case "interrupted":
                raise KeyboardInterrupt
            case "broken":
                msg = "by the task\nitself"
                raise ZeroDivisionError(msg)


class TinyBlocks(Tiny):
    """The same in two equal blocks; the second ends the process once the first is refined, while there is ``armed``."""

    name: ClassVar[str] = "tiny-blocks"
    variants: ClassVar[tuple[str, ...]] = ("killed",)

    def architecture(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(24, 24), nn.ReLU(), Deadly(24, 24)) for _ in range(2)]
        return nn.Sequential(nn.Linear(8, 24), nn.Sequential(*blocks), nn.Linear(24, 3))


class Deadly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if Path("armed").exists() and any(Path(".out.tuning").glob("*/block-*-001.safetensors")):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
        return super().forward(x)


class TinyLoss(Tiny):
    """The same, scored by its perplexity, of which less is better."""

    name: ClassVar[str] = "tiny-loss"
    metric: ClassVar[Metric] = Metric(name="perplexity", better="lower")

    def evaluate(self, model: nn.Module, *, split: str = "test", limit: int | None = None, **_: Any) -> float:
        read = self.test_batches if split == "test" else self.validation_batches
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(model.eval()(x), y) for x, y in read(limit, batch_size=60)]
        return float(torch.stack(losses).mean().exp())


class TinyPercent(Tiny):
    """The same, with a score in percent that does not say so."""

    name: ClassVar[str] = "tiny-percent"

    def evaluate(self, model: nn.Module, **options: Any) -> float:
        return 100 * super().evaluate(model, **options)


def inputs() -> Tensor:
    """Return a few inputs to compare outputs on."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
