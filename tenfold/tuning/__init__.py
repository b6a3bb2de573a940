"""Bring the accuracy back: fine-tuning that can be killed at any time and resumed to the same end.

Any other training loop does as well: the result of ``apply`` is an ordinary module.
"""

from tenfold.tuning.admm import Admm, AdmmConfig
from tenfold.tuning.admm_training import LowRankResult, train_admm, train_towards
from tenfold.tuning.answers import StoredAnswers
from tenfold.tuning.batches import Batches
from tenfold.tuning.bayesian_config import BayesianConfig
from tenfold.tuning.bayesian_ranks import BayesianRanks
from tenfold.tuning.bayesian_training import BayesianResult, ranks_plan, train_bayesian
from tenfold.tuning.config import EpochRecord, TuneConfig, TuneResult
from tenfold.tuning.distillation import Distillation
from tenfold.tuning.finetune import finetune
from tenfold.tuning.groups import parameter_groups
from tenfold.tuning.learned_ranks import LearnedRanks, train_lc
from tenfold.tuning.progress import RichProgress, TuneProgress
from tenfold.tuning.steadying import SensitivityPenalty
from tenfold.tuning.svgd import Ensemble, log_likelihood

__all__ = [
    "Admm",
    "AdmmConfig",
    "Batches",
    "BayesianConfig",
    "BayesianRanks",
    "BayesianResult",
    "Distillation",
    "Ensemble",
    "EpochRecord",
    "LearnedRanks",
    "LowRankResult",
    "RichProgress",
    "SensitivityPenalty",
    "StoredAnswers",
    "TuneConfig",
    "TuneProgress",
    "TuneResult",
    "finetune",
    "log_likelihood",
    "parameter_groups",
    "ranks_plan",
    "train_admm",
    "train_bayesian",
    "train_lc",
    "train_towards",
]
