"""From a dense model to a factorized one by way of weights that were trained to be of low rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import TuningError
from tenfold.records import Plan
from tenfold.surgery import reestimate_batchnorm_, with_errors
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.tracing.contexts import device_of, same_random_numbers
from tenfold.tracing.inputs import to_device
from tenfold.training.batches import Batches, as_pair, at_epoch, seed_epoch
from tenfold.training.config import EpochRecord, TuneConfig, TuneResult
from tenfold.training.finetune import finetune
from tenfold.training.loop import Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.low_rank.admm import Admm, AdmmConfig, Residual
from tenfold.training.low_rank.projection import PlanProjection, Projection, weight_only
from tenfold.training.progress import TuneProgress

Evaluate = Callable[[nn.Module], float]
NORM_BATCHES = 100
CEILING = 0.3  # of the highest penalty, in units of 1/lr: gradient steps with momentum diverge at about 1.4


@dataclass(frozen=True, eq=False)
class Towards:
    """A dense model after training towards low rank.

    Attributes:
        model: dense, its weights nearly of low rank.
        admm: the state at the end; ``admm.projected(model)`` shows the images.
        history: one record per epoch; ``score`` is that of the model with the images in place of the weights.
        residuals: by path, one per epoch.
        scores: of the model itself, one per epoch, where there was an ``evaluate``.
    """

    model: nn.Module
    admm: Admm
    history: tuple[EpochRecord, ...]
    residuals: dict[str, tuple[Residual, ...]]
    scores: tuple[float, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return the monitors as plain values, for a record: by epoch and over all layers."""
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
    """What training towards low rank came to.

    Attributes:
        model: factorized as the plan says, and tuned if that was asked for.
        plan: the plan that was carried out; its relative errors are those of the trained weights.
        towards: the dense model on the way, with all monitors.
        tuning: of the factorized model; None without.
    """

    model: nn.Module
    plan: Plan
    towards: Towards
    tuning: TuneResult | None = None


def train_towards(  # noqa: PLR0913 - a training with all its choices
    model: nn.Module,
    projection: Plan | Projection,
    batches: Batches,
    config: TuneConfig | None = None,
    admm: AdmmConfig | None = None,
    *,
    update_every: int = 1,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: TuneProgress | None = None,
) -> Towards:
    """Return a copy of a dense model whose weights were trained to lie near those of low rank; ``model`` stays.

    A ``finetune`` with the penalty of ``Admm``, and an update after every epoch. Weights, images, multipliers and
    strengths are stored in one file per epoch, so that a run that was killed goes on to the same end.

    Args:
        model: dense in the layers in question.
        projection: a plan, whose formats and ranks are to be reached; or any ``Projection``.
        batches: as in ``finetune``.
        config: how to train; a learning rate as in the last third of the original training, and more epochs than
            tuning takes: 10 to 60.
        admm: how hard to pull; by default the pull rises a hundredfold over the epochs.
        update_every: epochs between updates.
        loss: as in ``finetune``, called with the dense model; the penalty is added to it.
        evaluate: score of a model, told in each record for the model with the images in place.
        folder: where to store the epochs, and which to go on from.
        identity: what the run is about, besides ranks and settings of the pull, which are always part of it.
        on_epoch: told of each epoch.
        progress: told of each step.

    Raises:
        PlanError: a layer that cannot be trained towards what is planned.
        TenfoldError: see ``finetune``.
    """
    config = config or TuneConfig()
    if config.ema is not None:
        msg = f"ema={config.ema} would average weights that are drawn elsewhere: leave it to the tuning afterwards"
        raise TuningError(msg)
    updates = max(config.epochs // update_every, 1)
    admm = admm or AdmmConfig(updates=updates)
    if admm.ceiling is None and config.optimizer == "sgd":
        admm = admm.replace(ceiling=CEILING / config.lr)
    run = _Run(copy.deepcopy(model), projection, admm, config.epochs)
    told = finetune(
        run,
        batches,
        config,
        loss=run.loss_with_penalty(loss or cross_entropy(config.label_smoothing)),
        evaluate=run.after_epoch(evaluate, update_every),
        folder=folder,
        identity="; ".join(filter(None, (identity, run.admm.projection.identity, f"{admm!r} every {update_every}"))),
        on_epoch=_told(on_epoch, scored=evaluate is not None),
        progress=progress,
    )
    return run.outcome(told, scored=evaluate is not None)


def train_admm(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    config: TuneConfig | None = None,
    admm: AdmmConfig | None = None,
    *,
    tune: TuneConfig | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    **options: Any,
) -> LowRankResult:
    """Return a model factorized as planned, after its dense weights were trained towards the ranks of the plan.

    Decomposing a trained network loses much, because it never was of low rank; factors trained from scratch learn
    badly. So the dense network learns to be of low rank first (Yin et al. 2021, arXiv 2107.12422), is replaced by its
    factors when there is hardly anything left to lose, gets its batch norm re-estimated, and is tuned.

    Args:
        model: dense in the layers that the plan factorizes; stays as it is.
        plan: formats and ranks to reach, of any registered format.
        batches: as in ``finetune``.
        config: training towards low rank, see ``train_towards``.
        admm: how hard to pull.
        tune: of the factorized model; None for none.
        loss: as in ``finetune``, for both trainings.
        evaluate: score of a model, for both.
        folder: where to store the epochs of both; the same call goes on where it was cut off.
        identity: what the run is about, in any words.
        options: ``update_every``, ``on_epoch`` and ``progress`` of ``train_towards``.

    Raises:
        PlanError: a layer that cannot be trained towards what is planned.
        TenfoldError: see ``finetune``.

    Example:
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> from tenfold.ranks import rule_from
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(64, 16)
        >>> wanted = plan(net, profile(net, x[:1]), rule=rule_from("fixed", ranks={"0": 4}))
        >>> found = train_admm(net, wanted, [(x, (x[:, 0] > 0).long())] * 20, TuneConfig(epochs=10, lr=0.1))
        >>> found.plan.layer("0").rel_error < 0.1
        True
    """
    plan, config = weight_only(plan), config or TuneConfig()
    common: dict[str, Any] = {"loss": loss, "evaluate": evaluate}
    where = folders(folder)
    towards = train_towards(model, plan, batches, config, admm, folder=where[0], identity=identity, **common, **options)
    return replace_and_tune(towards, plan, batches, config, tune, folder=where[1], identity=identity, **common)


def replace_and_tune(
    towards: Towards,
    plan: Plan,
    batches: Batches,
    config: TuneConfig,
    tune: TuneConfig | None,
    *,
    folder: Path | None = None,
    identity: str = "",
    **options: Any,
) -> LowRankResult:
    """Return the trained model with factors in place of its weights, batch norm re-estimated, and tuned if asked."""
    known = towards.admm.projection  # with the factors to start from, where there are any
    small = (known if isinstance(known, PlanProjection) else PlanProjection(plan)).factorize(towards.model)
    _renew_norms(small, batches, config)
    plan = with_errors(plan, small)
    told = None
    if tune is not None:
        told = finetune(small, batches, tune, folder=folder, identity=identity, **options)
    return LowRankResult(small, plan, towards, told)


class _Run(nn.Module):
    """The model and all that belongs to its training, as one module: so that a snapshot holds it whole."""

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
        """Return what the model returns."""
        return self.model(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Return the weights that are drawn to low rank: decay would draw them elsewhere."""
        return {f"model.{path}.weight" if path else "model.weight" for path in self.admm.paths}

    def loss_with_penalty(self, loss: Loss) -> Loss:
        """Return the loss of the dense model plus the penalty."""

        def total(run: nn.Module, inputs: Any, targets: Any) -> Tensor:
            del run
            return loss(self.model, inputs, targets) + self.admm.penalty(self.model)

        return total

    def after_epoch(self, evaluate: Evaluate | None, every: int) -> Evaluate:
        """Return what is done before an epoch is stored: update, take note, and score the images."""

        def end(run: nn.Module) -> float:
            del run
            epoch = int(self.epoch)
            self.epoch += 1
            if (epoch + 1) % every == 0:
                self.admm.update(self.model)
            found = self.admm.residuals.values()
            self.trace[epoch] = torch.tensor([[getattr(r, n) for r in found] for n in ("primal", "dual", "rho")])
            if evaluate is None:
                return nan
            self.scores[epoch] = evaluate(self.model)
            with self.admm.projected(self.model):
                return evaluate(self.model)

        return end

    def outcome(self, told: TuneResult, *, scored: bool) -> Towards:
        """Return the trained model with its monitors."""
        done = len(told.history)
        history = told.history if scored else tuple(_unscored(epoch) for epoch in told.history)
        rows = self.trace[:done].tolist()
        residuals = {
            path: tuple(Residual(row[0][i], row[1][i], row[2][i]) for row in rows)
            for i, path in enumerate(self.admm.paths)
        }
        return Towards(self.model, self.admm, history, residuals, tuple(self.scores[:done].tolist()) if scored else ())


def _unscored(epoch: EpochRecord) -> EpochRecord:
    """Return the record without the score that nobody gave."""
    return epoch.replace(score=None)


def _told(on_epoch: Callable[[EpochRecord], None] | None, *, scored: bool) -> Callable[[EpochRecord], None] | None:
    """Return what is told of each epoch: of scores only where there are any."""
    if on_epoch is None or scored:
        return on_epoch
    return lambda epoch: on_epoch(_unscored(epoch))


def _renew_norms(model: nn.Module, batches: Batches, config: TuneConfig) -> None:
    """Estimate batch norm anew from the epoch after the last, as it would come."""
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return
    device = device_of(model)
    with same_random_numbers(device):
        seed_epoch(device, config.seed, config.epochs)
        data: Iterable[Any] = at_epoch(batches, config.epochs)
        reestimate_batchnorm_(model, (to_device(as_pair(b)[0], device) for b in islice(data, NORM_BATCHES)))


def folders(folder: str | Path | None) -> tuple[Path | None, Path | None]:
    """Return where both trainings are stored."""
    return (None, None) if folder is None else (Path(folder) / "towards", Path(folder) / "tuning")
