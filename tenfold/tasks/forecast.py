"""Forecasts of generated series: the Lorenz attractor, and six families of Genz's functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.networks import Forecaster, taught_steps
from tenfold.records import Metric
from tenfold.tasks.base import TASKS, MappedBatches, Progress, SizedBatches, seeded
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet
from tenfold.tracing.contexts import device_of, dtype_of, evaluating
from tenfold.tracing.inputs import call_model, to_device

SAMPLES = {"train": 4_000, "test": 1_000}
PAST = 20
HORIZONS = {"lorenz": 40, "genz": 80}
HIDDEN = {"hot-lstm": 16, "lstm": 31}  # at which both have equally many parameters
FALLS = 0.9  # what is left of the share of taught steps after an epoch
_TAUGHT = 7  # keeps the stream of random numbers apart


def lorenz(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return trajectories (count, steps, 3) on the Lorenz attractor, every 0.05 units of time, of about unit size.

    σ = 10, ρ = 28, β = 8/3, by the classical Runge-Kutta method with steps of 0.01, in double precision; they begin
    after 10 units of time from points around (0, 0, 25).
    """

    def slope(p: Tensor) -> Tensor:
        x, y, z = p.unbind(-1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)

    def onwards(p: Tensor, times: int) -> Tensor:
        for _ in range(times):
            a = slope(p)
            b = slope(p + 0.005 * a)
            c = slope(p + 0.005 * b)
            d = slope(p + 0.01 * c)
            p = p + 0.01 / 6 * (a + 2 * b + 2 * c + d)
        return p

    point = torch.randn(count, 3, generator=generator, dtype=torch.float64) * 5 + torch.tensor([0.0, 0.0, 25.0])
    point, found = onwards(point, 1000), []
    for _ in range(steps):
        found.append(point)
        point = onwards(point, 5)
    whole = torch.stack(found, 1)
    return ((whole - torch.tensor([0.0, 0.0, 23.5])) / torch.tensor([7.9, 9.0, 8.6])).float()


def genz(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return series (count, steps, 1): Genz's six families in turn on 0..1, with c in 1..10 and w in 0..1 drawn.

    Oscillatory, product peak, corner peak, Gaussian, continuous and discontinuous (Genz 1984), each scaled to at
    most 1.
    """
    x = torch.linspace(0, 1, steps)
    c, w = torch.rand(2, count, 1, generator=generator)
    c = 1 + 9 * c
    families = [
        torch.cos(2 * math.pi * w + c * x),
        1 / (1 + c**2 * (x - w) ** 2),
        (1 + c * x) ** -2,
        torch.exp(-(c**2) * (x - w) ** 2),
        torch.exp(-c * (x - w).abs()),
        torch.where(x > w, torch.zeros(()), torch.exp(c * (x - w))),
    ]
    kind = torch.arange(count) % len(families)
    return torch.stack(families)[kind, torch.arange(count)][..., None]


@TASKS.register("forecast")
class Forecast(InMemoryTask):
    """Forty steps of the Lorenz attractor (``lorenz-*``) or eighty of Genz's functions (``genz-*``) from twenty.

    By a higher-order LSTM (``hot-lstm``: lags, order and rank 2) or an LSTM (``lstm``) with equally many parameters,
    with scheduled sampling: true steps are given less and less in training. 4,000 series for training and 1,000 for the
    test, generated with a seed; the score is the root of the mean squared error over all steps.
    """

    name: ClassVar[str] = "forecast"
    variants: ClassVar[tuple[str, ...]] = ("lorenz-hot-lstm", "lorenz-lstm", "genz-hot-lstm", "genz-lstm")
    metric: ClassVar[Metric] = Metric(name="RMSE", better="lower")
    weights_hint: ClassVar[str] = "Train them: tenfold train --method plain. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 24,
        "batch_size": 200,
        "optimizer": "adamw",
        "lr": 0.005,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "autocast": "off",
    }

    @property
    def system(self) -> str:
        """``lorenz`` or ``genz``."""
        return str(self.variant).partition("-")[0]

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override] # it depends on the variant
        """(steps of the past, numbers in a step)."""
        return (PAST, 3 if self.system == "lorenz" else 1)

    def architecture(self) -> nn.Module:
        """Return the network that the variant names."""
        kind: Any = str(self.variant).partition("-")[2]
        more = {"lags": 2, "order": 2, "ranks": 2} if kind == "hot-lstm" else {}
        return Forecaster(self.input_shape[1], HIDDEN[kind], horizon=HORIZONS[self.system], kind=kind, **more)

    def read(self, split: Split) -> TensorSet:
        """Return series (samples, past + horizon, numbers in a step); labels have no meaning."""
        make = {"lorenz": lorenz, "genz": genz}[self.system]
        series = make(SAMPLES[split], PAST + HORIZONS[self.system], seeded(0, len(split)))  # a constant seed
        return TensorSet(series, torch.zeros(len(series), dtype=torch.long))

    def loss(self) -> Callable[[nn.Module, Any, Any], Tensor]:
        """Return the mean squared error."""
        return squared_error

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False) -> Any:
        """Return ((past, truth, taught), truth) of one epoch, with a share of taught steps that falls with epochs."""
        labelled = super().train_batches(epoch, batch_size=batch_size, seed=seed, hold_out=hold_out)
        return _Taught(labelled, FALLS**epoch, (seed, epoch, _TAUGHT))

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> MappedBatches[Tensor]:
        """Return the past of sampled series."""
        return MappedBatches(super().calibration_batches(samples, batch_size=batch_size, seed=seed), _past)

    def unlabeled_batches(self, epoch: int, samples: int, *, batch_size: int, seed: int) -> MappedBatches[Any]:
        """Return the past of sampled series, without labels."""
        batches = super().unlabeled_batches(epoch, samples, batch_size=batch_size, seed=seed)
        return MappedBatches(batches, lambda batch: (_past(batch[0]), None))

    def validation_batches(self, samples: int | None = None, *, batch_size: int, seed: int = 0) -> Any:
        """Return (past, truth) of the validation part."""
        return MappedBatches(super().validation_batches(samples, batch_size=batch_size, seed=seed), _apart)

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> Any:
        """Return (past, truth) of the test set."""
        return MappedBatches(super().test_batches(samples, batch_size=batch_size), _apart)

    def evaluate(
        self,
        model: nn.Module,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> float:
        """Return the root of the mean squared error over all steps of the horizon."""
        by_step = self.errors(model, split=split, limit=limit, batch_size=batch_size, progress=progress)
        return float(by_step.square().mean().sqrt())

    def errors(
        self,
        model: nn.Module,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return the root of the mean squared error of each step of the horizon."""
        read = self.test_batches if split == "test" else self.validation_batches
        batches: SizedBatches[Any] = read(limit, batch_size=batch_size)
        device, dtype, total, done = device_of(model), dtype_of(model), None, 0
        with evaluating(model):
            for past, truth in batches:
                forecast: Tensor = call_model(model, to_device(past, device, dtype)).cpu().double()
                found = (forecast - truth).square().mean(2).sum(0)
                total, done = found if total is None else total + found, done + len(past)
                if progress is not None:
                    progress(done, int(getattr(batches, "samples", 0)))
        return (torch.zeros(0) if total is None else total / done).sqrt()


class _Taught:
    """Batches ((past, truth, taught), truth), seeded."""

    def __init__(self, batches: SizedBatches[tuple[Tensor, Tensor]], share: float, seeds: tuple[int, ...]) -> None:
        self.batches, self.share, self.seeds = batches, share, seeds

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        generator = seeded(*self.seeds)
        for batch in self.batches:
            past, truth = _apart(batch)
            yield (past, truth, taught_steps(truth.shape[:2], self.share, generator)), truth


def squared_error(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    """Return the mean squared error of a forecast."""
    return F.mse_loss(call_model(model, inputs), targets)


def _past(series: Tensor) -> Tensor:
    return series[:, :PAST]


def _apart(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    series, _ = batch
    return series[:, :PAST], series[:, PAST:]
