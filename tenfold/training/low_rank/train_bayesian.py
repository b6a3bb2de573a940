"""From trains of generous ranks to the ranks that the data asks for: training under the prior, then without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold.formats import FORMATS
from tenfold.formats.train import TrainFormat
from tenfold.layers import FactorizedLayer
from tenfold.planning import plan as make_plan
from tenfold.ranks import Choice, Choose
from tenfold.records import Plan, Profile
from tenfold.training.batches import Batches
from tenfold.training.config import EpochRecord, TuneConfig, TuneResult
from tenfold.training.finetune import finetune
from tenfold.training.loop import Loss
from tenfold.training.losses import cross_entropy
from tenfold.training.low_rank.bayesian import BayesianRanks
from tenfold.training.low_rank.found_ranks import FoundRanks
from tenfold.training.low_rank.priors import BayesianConfig


@dataclass(frozen=True, eq=False)
class BayesianResult:
    """A model whose ranks were found in training.

    Attributes:
        ranks: by path of the layer, one for each bond that is left.
        before: the ranks to begin with.
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
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: str | Path | None = None,
    identity: str = "",
) -> BayesianResult:
    """Return what came of training a model in place to the most probable cores (MAP) and to the ranks they need.

    Hawkins and Zhang 2019, arXiv 1905.10478; Hawkins, Liu and Zhang 2020, arXiv 2010.08689. What falls out during the
    training is held at zero; at its end the cores are sliced. With a folder, a run that was cut off goes on, as in
    ``finetune``.

    Args:
        model: with layers that are tensor trains (see ``BayesianRanks``); trained and pruned in place.
        batches: as in ``finetune``.
        config: training under the prior; weight decay is left out, because the prior is in its place.
        ranks: the prior.
        tune: of the pruned model without the prior, with a new optimizer; None for none.
        loss: as in ``finetune``, a mean over samples.
        evaluate: as in ``finetune``.
        folder: where to store the epochs of both trainings.
        identity: as in ``finetune``.

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
        >>> found = train_bayesian(model, data, TuneConfig(epochs=20, optimizer="adamw", lr=0.02), prior)
        >>> found.before["0"], found.ranks["0"] == model[0].ranks
        ((4,), True)
    """
    base = loss or cross_entropy(config.label_smoothing)
    run = _Run(model, ranks)
    before, seen = run.ranks.ranks(), list[dict[str, tuple[int, ...]]]()

    def note(record: EpochRecord) -> None:
        del record
        seen.append(run.ranks.ranks())

    def score(running: nn.Module) -> float:
        del running
        assert evaluate is not None  # noqa: S101 - given only then
        return evaluate(model)

    under, after = (None, None) if folder is None else (Path(folder) / "prior", Path(folder) / "tuning")
    told = finetune(
        run,
        batches,
        config.replace(weight_decay=0.0),
        loss=run.ranks.loss(model, base),
        evaluate=score if evaluate else None,
        folder=under,
        identity=f"{identity} {ranks.model_dump_json()}",
        on_epoch=note,
    )
    run.ranks.advance_(model)  # what was dropped moved a last time with the last step
    left = run.ranks.prune_(model)
    tuned = None
    if tune is not None:
        tuned = finetune(model, batches, tune, loss=loss, evaluate=evaluate, folder=after, identity=identity)
    return BayesianResult(left, before, told, tuned, tuple(seen))


def ranks_plan(model: nn.Module, dense: nn.Module, profile: Profile, **choices: Any) -> Plan:
    """Return the plan that gives a dense model the ranks of the factorized layers of ``model``.

    For a model that a plan made factorized and ``train_bayesian`` pruned: the plan says what came out, and can be read,
    changed and applied.

    Args:
        model: with factorized layers.
        dense: the model that they came from, with the same paths.
        profile: of the dense model.
        choices: ``keep``, ``keep_ends`` and ``seed`` of ``plan``.
    """
    found: dict[str, Choice] = {
        path: Choose(layer.format, dict(layer.rank), "rank found by the low-rank prior")
        for path, layer in model.named_modules()
        if isinstance(layer, FactorizedLayer) and issubclass(FORMATS.get(layer.format), TrainFormat)
    }
    formats = tuple(dict.fromkeys(choice.format for choice in found.values() if isinstance(choice, Choose)))
    return make_plan(
        dense,
        profile,
        rule=FoundRanks("bayesian", found, "the prior is on tensor trains only"),
        formats=formats,
        **choices,
    )


class _Run(nn.Module):
    """The model and its prior as one module, so that a snapshot holds both."""

    def __init__(self, model: nn.Module, config: BayesianConfig) -> None:
        super().__init__()
        self.model = model
        self.ranks = BayesianRanks(model, config)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.model(*args, **kwargs)
        return found
