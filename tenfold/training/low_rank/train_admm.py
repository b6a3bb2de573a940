"""Train a dense model to low rank (ADMM, LC), then replace its weights by factors and fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from tenfold.errors import TuningError
from tenfold.records import Plan, Record
from tenfold.records.tuning import EpochRecord, TuneConfig, TuneResult
from tenfold.surgery import reestimate_batchnorm_, with_errors
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.tensors.finite import check_finite
from tenfold.tracing import copied
from tenfold.tracing.contexts import device_of, same_random_numbers
from tenfold.tracing.inputs import to_device
from tenfold.training.batches import Batches, as_pair, at_epoch, seed_epoch
from tenfold.training.finetune import finetune
from tenfold.training.loop import Evaluate, Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.low_rank.admm import Admm, AdmmConfig, Residual
from tenfold.training.low_rank.projection import PlanProjection, Projection
from tenfold.training.snapshot import TrainingFolder
from tenfold.training.tune_progress import TuneProgress

NORM_BATCHES = 100
CEILING = 0.3  # of the highest penalty, in units of 1/lr: gradient steps with momentum diverge at about 1.4


class LowRankConfig(Record):
    """How to train to low rank.

    Attributes:
        train: training of the dense model: a learning rate as in the last third of the original training, and more
            epochs than fine-tuning takes: 10 to 60.
        admm: strength of the penalty; by default it rises a hundredfold over the epochs.
        update_every: epochs between updates of the low-rank images.
        tune: fine-tuning of the factorized model; None for none.

    Example:
        >>> LowRankConfig(train=TuneConfig(epochs=30), update_every=2).penalty().updates
        15
    """

    train: TuneConfig = TuneConfig()
    admm: AdmmConfig | None = None
    update_every: PositiveInt = 1
    tune: TuneConfig | None = None

    def penalty(self) -> AdmmConfig:
        """Return the settings of the penalty, with what follows from the training where nothing else is given."""
        admm = self.admm or AdmmConfig(updates=max(self.train.epochs // self.update_every, 1))
        if admm.ceiling is None and self.train.optimizer == "sgd":
            return admm.replace(ceiling=CEILING / self.train.lr)
        return admm


@dataclass(frozen=True, eq=False)
class LowRankTraining:
    """A dense model after training to low rank.

    Attributes:
        model: dense, its weights nearly of low rank.
        admm: the final state; ``admm.projected(model)`` shows the images.
        history: one record per epoch; ``score`` is that of the model with the images in place of the weights.
        residuals: by path, one per epoch.
        scores: of the model itself, one per epoch; empty without ``evaluate``.
    """

    model: nn.Module
    admm: Admm
    history: tuple[EpochRecord, ...]
    residuals: dict[str, tuple[Residual, ...]]
    scores: tuple[float, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return the curves over the epochs as plain values, for a record: residuals over all layers, scores."""
        rows = list(zip(*self.residuals.values(), strict=True))
        return {
            "epochs": len(self.history),
            "config": self.admm.config.model_dump(),
            "residual_mean": [sum(r.primal for r in row) / len(row) for row in rows],
            "residual_max": [max(r.primal for r in row) for row in rows],
            "projected_score": [epoch.score for epoch in self.history],
            "dense_score": list(self.scores),
            "seconds": sum(epoch.seconds for epoch in self.history),
        }


@dataclass(frozen=True, eq=False)
class LowRankResult:
    """Result of training to low rank.

    Attributes:
        model: factorized as the plan says, and fine-tuned if configured.
        plan: the plan that was carried out; its relative errors are those of the trained weights.
        training: the dense model before factorization, with its curves.
        tuning: of the factorized model; None without.
    """

    model: nn.Module
    plan: Plan
    training: LowRankTraining
    tuning: TuneResult | None = None


def train_admm(
    model: nn.Module,
    projection: Plan | Projection,
    batches: Batches,
    config: LowRankConfig | None = None,
    *,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | TrainingFolder | None = None,
    progress: TuneProgress | None = None,
) -> LowRankResult:
    """Train a copy of a dense model to low rank, factorize it, and fine-tune the factors.

    Decomposing a trained network loses much, because it never was of low rank; factors trained from scratch learn
    badly. So the dense network is trained to low rank first (Yin et al. 2021, arXiv 2107.12422), is factorized when
    hardly anything is left to lose, gets its batch norm re-estimated, and is fine-tuned.

    With ``LearnedRanks`` in place of a plan, the ranks are learned with the weights: the LC algorithm (Idelbayev and
    Carreira-Perpiñán, CVPR 2020), min loss(W) + λ Σ C(r) over W = Θ, rank Θ ≤ r, whose multipliers are β = −μU.

    Args:
        model: dense in the layers to factorize; left unchanged.
        projection: a plan, in any formats, or any other ``Projection``.
        batches: as in ``finetune``.
        config: ``LowRankConfig()`` by default.
        loss: as in ``finetune``, for both trainings.
        evaluate: score of a model, for both.
        folder: where to store the epochs of both; the same call resumes an interrupted run.
        progress: callbacks of both.

    Raises:
        PlanError: a layer that cannot be trained to what is planned.
        TenfoldError: see ``finetune``.

    Example:
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(64, 16)
        >>> target = plan(net, profile(net, x[:1]), {"rule": {"name": "fixed", "ranks": {"0": 4}}})
        >>> config = LowRankConfig(train=TuneConfig(epochs=10, lr=0.1))
        >>> result = train_admm(net, target, [(x, (x[:, 0] > 0).long())] * 20, config)
        >>> result.plan.layer("0").rel_error < 0.1
        True
    """
    config, folder = config or LowRankConfig(), TrainingFolder.of(folder)
    projection = PlanProjection(projection) if isinstance(projection, Plan) else copy.deepcopy(projection)
    own = folder and folder.part("towards")
    training = train_dense(
        model, projection, batches, config, loss=loss, evaluate=evaluate, folder=own, progress=progress
    )
    small = projection.factorize(training.model)
    _reestimate_batchnorm(small, batches, config.train)
    plan = with_errors(projection.plan_for(training.model), small)
    tuning = None
    if config.tune is not None:
        own = folder and folder.part("tuning")
        tuning = finetune(small, batches, config.tune, loss=loss, evaluate=evaluate, folder=own, progress=progress)
    return LowRankResult(small, plan, training, tuning)


def train_dense(
    model: nn.Module,
    projection: Projection,
    batches: Batches,
    config: LowRankConfig,
    *,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: TrainingFolder | None = None,
    progress: TuneProgress | None = None,
) -> LowRankTraining:
    """Train a copy of a dense model until its weights are nearly of low rank: the first half of ``train_admm``.

    A ``finetune`` with the penalty of ``Admm``, and an update after every epoch. Weights, images, multipliers and
    strengths are stored in one file per epoch, so that an interrupted run resumes to the same end.

    Raises:
        PlanError: a layer that cannot be trained to what is planned.
        TenfoldError: see ``finetune``.
    """
    train, admm = config.train, config.penalty()
    if train.ema is not None:
        msg = f"ema={train.ema} would average weights that are drawn elsewhere: leave it to the tuning afterwards"
        raise TuningError(msg)
    check_finite(model)
    run = _Run(copied(model), projection, admm, train.epochs)
    result = finetune(
        run,
        batches,
        train,
        loss=run.loss_with_penalty(loss or cross_entropy(train.label_smoothing)),
        evaluate=run.after_epoch(evaluate, config.update_every),
        folder=folder and folder.part("", projection.identity, f"{admm!r} every {config.update_every}"),
        progress=progress,
    )
    return run.outcome(result.history, scored=evaluate is not None)


class _Run(nn.Module):
    """The model and all state of its training as one module, so that a snapshot holds everything."""

    trace: Tensor
    scores: Tensor
    epoch: Tensor

    def __init__(self, model: nn.Module, projection: Plan | Projection, config: AdmmConfig, epochs: int) -> None:
        super().__init__()
        self.model = model
        self.admm = Admm(model, projection, config)
        count = len(self.admm.paths)
        self.register_buffer("trace", torch.zeros(epochs, 3, count))
        self.register_buffer("scores", torch.zeros(epochs, dtype=torch.float64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Return the weights that are trained to low rank: decay would draw them elsewhere."""
        return {f"model.{path}.weight" if path else "model.weight" for path in self.admm.paths}

    def loss_with_penalty(self, loss: Loss) -> Loss:
        def total(run: nn.Module, inputs: Any, targets: Any) -> Tensor:
            del run
            return loss(self.model, inputs, targets) + self.admm.penalty(self.model)

        return total

    def after_epoch(self, evaluate: Evaluate | None, every: int) -> Evaluate:
        """Return what runs before an epoch is stored: update, record the residuals, and score the images."""

        def end(run: nn.Module) -> float | None:
            del run
            epoch = int(self.epoch)
            self.epoch += 1
            if (epoch + 1) % every == 0:
                self.admm.update(self.model)
            residuals = self.admm.residuals.values()
            self.trace[epoch] = torch.tensor([[getattr(r, n) for r in residuals] for n in ("primal", "dual", "rho")])
            if evaluate is None:
                return None
            self.scores[epoch] = evaluate(self.model) or 0.0
            with self.admm.projected(self.model):
                return evaluate(self.model)

        return end

    def outcome(self, history: tuple[EpochRecord, ...], *, scored: bool) -> LowRankTraining:
        rows = self.trace[: len(history)].tolist()
        residuals = {
            path: tuple(Residual(row[0][i], row[1][i], row[2][i]) for row in rows)
            for i, path in enumerate(self.admm.paths)
        }
        scores = tuple(self.scores[: len(history)].tolist()) if scored else ()
        return LowRankTraining(self.model, self.admm, history, residuals, scores)


def _reestimate_batchnorm(model: nn.Module, batches: Batches, config: TuneConfig) -> None:
    """Re-estimate batch norm on the epoch that would come next."""
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return
    device = device_of(model)
    with same_random_numbers(device):
        seed_epoch(device, config.seed, config.epochs)
        data: Iterable[Any] = at_epoch(batches, config.epochs)
        reestimate_batchnorm_(model, (to_device(as_pair(b)[0], device) for b in islice(data, NORM_BATCHES)))
