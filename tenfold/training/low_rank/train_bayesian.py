"""Train tensor trains under a low-rank prior, prune them to the ranks it leaves, and fine-tune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold.allocation import Override, choose
from tenfold.formats import FORMATS
from tenfold.formats.train import TrainFormat
from tenfold.layers import FactorizedLayer
from tenfold.planning import tabulate
from tenfold.records import Plan, Profile, Recipe
from tenfold.records.tuning import TuneConfig, TuneResult
from tenfold.training.batches import Batches
from tenfold.training.finetune import finetune
from tenfold.training.loop import Evaluate, Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.low_rank.bayesian import BayesianRanks
from tenfold.training.low_rank.priors import BayesianConfig
from tenfold.training.snapshot import TrainingFolder
from tenfold.training.tune_progress import TuneProgress


@dataclass(frozen=True, eq=False)
class BayesianResult:
    """Ranks found by training under a prior.

    Attributes:
        ranks: by path of the layer, one for each bond.
        before: the initial ranks.
        training: under the prior; its losses contain the prior, which is a density and may be negative.
        tuning: of the pruned model; None without.
        history: the ranks after each epoch under the prior, of this call.
    """

    ranks: dict[str, tuple[int, ...]]
    before: dict[str, tuple[int, ...]]
    training: TuneResult
    tuning: TuneResult | None
    history: tuple[dict[str, tuple[int, ...]], ...]


def train_bayesian(
    model: nn.Module,
    batches: Batches,
    config: TuneConfig,
    ranks: BayesianConfig,
    *,
    tune: TuneConfig | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | TrainingFolder | None = None,
) -> BayesianResult:
    """Train a model in place to the most probable cores (MAP), and prune it to the ranks they need.

    Hawkins and Zhang 2019, arXiv 1905.10478; Hawkins, Liu and Zhang 2020, arXiv 2010.08689. Indices that are dropped
    during the training are held at zero; at its end the cores are sliced. With a folder, an interrupted run resumes, as
    in ``finetune``.

    Args:
        model: with layers that are tensor trains (see ``BayesianRanks``); trained and pruned in place.
        batches: as in ``finetune``.
        config: training under the prior, without weight decay: the prior takes its place.
        ranks: the prior.
        tune: of the pruned model without the prior, with a new optimizer; None for none.
        loss: as in ``finetune``, a mean over samples.
        evaluate: as in ``finetune``.
        folder: where to store the epochs of both trainings.

    Raises:
        PlanError: no layer is a tensor train.
        TenfoldError: see ``finetune``.

    Example:
        >>> import torch
        >>> from tenfold.layers import TTLinear
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Sequential(TTLinear(16, 4, 4, cores=2)), torch.randn(64, 16)
        >>> data = [(x, (x[:, 0] > 0).long())] * 10
        >>> prior = BayesianConfig(samples=64, warmup=20, ramp=50)
        >>> result = train_bayesian(model, data, TuneConfig(epochs=20, optimizer="adamw", lr=0.02), prior)
        >>> result.before["0"], result.ranks["0"] == model[0].ranks
        ((4,), True)
    """
    folder, run = TrainingFolder.of(folder), _Run(model, ranks)
    before, history = run.ranks.ranks(), list[dict[str, tuple[int, ...]]]()
    training = finetune(
        run,
        batches,
        config.replace(weight_decay=0.0),
        loss=run.ranks.loss(model, loss or cross_entropy(config.label_smoothing)),
        evaluate=evaluate and (lambda _: evaluate(model)),
        folder=folder and folder.part("prior", ranks.model_dump_json()),
        progress=TuneProgress(lambda _: history.append(run.ranks.ranks())),
    )
    run.ranks.advance_(model)  # dropped entries moved a last time with the last step
    left = run.ranks.prune_(model)
    tuning = None
    if tune is not None:
        own = folder and folder.part("tuning")
        tuning = finetune(model, batches, tune, loss=loss, evaluate=evaluate, folder=own)
    return BayesianResult(left, before, training, tuning, tuple(history))


def ranks_plan(model: nn.Module, dense: nn.Module, profile: Profile, *, seed: int = 0) -> Plan:
    """Return the plan that gives a dense model the ranks of the factorized layers of ``model``.

    For a model that a plan factorized and ``train_bayesian`` pruned: the plan states the result, and can be read,
    changed and applied.

    Args:
        model: with factorized layers.
        dense: the model they came from, with the same paths.
        profile: of the dense model.
        seed: of every algorithm that draws random numbers.
    """
    ranks: dict[str, dict[str, dict[str, int]]] = {}  # by format and path
    for path, layer in model.named_modules():
        if isinstance(layer, FactorizedLayer) and issubclass(FORMATS.get(layer.format), TrainFormat):
            ranks.setdefault(layer.format, {})[path] = dict(layer.rank)
    recipe = Recipe(rule={"name": "fixed"}, formats=tuple(ranks) or ("tensor_train",), keep_ends=False, seed=seed)
    table = tabulate(dense, profile, recipe)
    for format, own in ranks.items():
        rule = {"name": "fixed", "ranks": own}
        part = tabulate(dense, profile, recipe.replace(rule=rule, formats=(format,)))
        layers = tuple(part.layer(layer.path) if layer.path in own else layer for layer in table.layers)
        table = table.replace(layers=layers, algorithms={**table.algorithms, **part.algorithms})
    chosen = {path: Override(format=format) for format, own in ranks.items() for path in own}
    others = {layer.path: Override() for layer in table.eligible if layer.path not in chosen}
    plan = choose(table, overrides={**chosen, **others})
    reasons = dict.fromkeys(chosen, "rank found by the low-rank prior")
    reasons |= dict.fromkeys(others, "the prior is on tensor trains only")
    explained = (layer.replace(reason=reasons.get(layer.path, layer.reason)) for layer in plan.layers)
    return plan.replace(layers=tuple(explained), recipe=recipe.replace(rule={"name": "bayesian"}))


class _Run(nn.Module):
    """The model and its prior as one module, so that a snapshot holds both."""

    def __init__(self, model: nn.Module, config: BayesianConfig) -> None:
        super().__init__()
        self.model = model
        self.ranks = BayesianRanks(model, config)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.model(*args, **kwargs)
        return found
