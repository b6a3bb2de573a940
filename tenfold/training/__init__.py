"""Recover accuracy: fine-tuning that can be interrupted at any time and resumed to the same end; training to low rank.

Any other training loop works as well: the result of ``apply`` is an ordinary module.
"""

from tenfold.records.tuning import EpochRecord, TuneConfig, TuneResult
from tenfold.training.as_dense import as_dense
from tenfold.training.batches import Batches
from tenfold.training.cached_logits import CachedLogits
from tenfold.training.distillation import Distillation
from tenfold.training.finetune import finetune
from tenfold.training.losses import SensitivityPenalty
from tenfold.training.low_rank.admm import Admm, AdmmConfig
from tenfold.training.low_rank.bayesian import BayesianRanks
from tenfold.training.low_rank.learned_ranks import LcConfig, LearnedRanks
from tenfold.training.low_rank.priors import BayesianConfig
from tenfold.training.low_rank.svgd import Ensemble, log_likelihood
from tenfold.training.low_rank.train_admm import LowRankConfig, LowRankResult, train_admm
from tenfold.training.low_rank.train_bayesian import BayesianResult, ranks_plan, train_bayesian
from tenfold.training.optimizer import parameter_groups
from tenfold.training.snapshot import TrainingFolder
from tenfold.training.tune_progress import RichProgress, TuneEvents, TuneProgress

__all__ = [
    "Admm",
    "AdmmConfig",
    "Batches",
    "BayesianConfig",
    "BayesianRanks",
    "BayesianResult",
    "CachedLogits",
    "Distillation",
    "Ensemble",
    "EpochRecord",
    "LcConfig",
    "LearnedRanks",
    "LowRankConfig",
    "LowRankResult",
    "RichProgress",
    "SensitivityPenalty",
    "TrainingFolder",
    "TuneConfig",
    "TuneEvents",
    "TuneProgress",
    "TuneResult",
    "as_dense",
    "finetune",
    "log_likelihood",
    "parameter_groups",
    "ranks_plan",
    "train_admm",
    "train_bayesian",
]
