"""TT-SVD: tensor trains by one truncated SVD for each bond; and what their unfoldings tell of the error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors, FitProblem, default_algorithm
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, Floats, Memo, Ranks, tails
from tenfold.decompositions.roots import Whitening
from tenfold.formats import FORMATS
from tenfold.formats.train import TrainFormat
from tenfold.tensors import gram, trains

# A curve takes a few fits along the family, of few sweeps.
_FITS, _SWEEPS = 5, 2
_FLOOR = 1e-9


@DECOMPOSITIONS.register("tt_svd")
@dataclass(frozen=True)
class TTSVD(Decomposition):
    """Truncated SVDs from the first bond to the last: at most √(bonds) from the optimum, and exact at full rank.

    Oseledets 2011 (SIAM J. Sci. Comput. 33), algorithm 1. The cores get equal norms.
    """

    formats = (TrainFormat,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the cores of the runs."""
        format, weight, spec, rank = problem.format_as(TrainFormat), problem.weight, problem.spec, problem.rank
        sizes, bonds = format.merged(spec, rank)
        tensor = format.to_tensor(weight, spec).reshape(len(weight), *sizes)
        cores = trains.tt_balance(trains.tt_svd(tensor, bonds, batch_dims=1))
        return Factors({**format.named_cores(spec, rank, cores), **format.beside(weight, spec)})

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the curve of trains: see ``train_curve``."""
        return train_curve(problem, self)


def train_curve(problem: CurveProblem, algorithm: Decomposition) -> ErrorCurve:
    """Return the errors of trains: what the unfoldings of all bonds drop tells one rank from another.

    The sum of these tails bounds the error of TT-SVD, with the inputs whitened mode by mode. A few fits along the
    family tell what it comes to under the real covariance. Where two bonds are those of Tucker-2 (``tucker2_ranks``),
    its curve knows better.
    """
    if problem.moments is None:
        return problem.between_fits(algorithm)
    spec, format, weight = problem.spec, problem.format, problem.weight.double()
    if not issubclass(format, TrainFormat):
        msg = f"{format.name()} is no tensor train"
        raise TypeError(msg)
    white = (
        Whitening.of(problem.covariance, format.input_modes(spec)).whiten(weight) if format.splits_inputs else weight
    )
    dropped = []
    for matrix in format.unfoldings(white, spec).values():
        wide = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
        lost = tails(torch.linalg.eigvalsh(gram(wide)))
        dropped.append(lost / (lost[0] or 1.0))
    power = problem.moments.distortion(weight.flatten(2), torch.zeros_like(weight.flatten(2)))

    def losses(ranks: Ranks) -> Floats:
        return np.stack([lost[ranks[:, k]] for k, lost in enumerate(dropped)], axis=1)

    if format.tucker2_ranks is not None:
        places = [format.rank_names.index(name) for name in format.tucker2_ranks]
        others = [k for k in range(len(format.rank_names)) if k not in places]
        tucker2 = dataclasses.replace(problem, format=FORMATS.get("tucker2"))
        pair = default_algorithm("tucker2", data_aware=True).error_curve(tucker2)
        return lambda ranks: np.asarray(pair(ranks[:, places]) + power * losses(ranks)[:, others].sum(1))

    quick = algorithm.with_settings({"n_iter": _SWEEPS})

    def attained() -> Floats:
        """Return the logarithms of the bounds of some ranks, ascending, and of the shares that their fits miss."""
        family = [list(rank.values()) for rank in format.rank_family(spec)]
        places = np.unique(np.linspace(0, len(family) - 1, _FITS).round().astype(int))
        rows = np.array([family[at] for at in places])
        bounds = np.sum([lost[rows[:, k]] for k, lost in enumerate(dropped)], axis=0)
        errors = np.array([problem.fitted(quick, row) for row in rows.tolist()]) / (power or 1.0)
        order = np.argsort(bounds)
        return np.stack([np.log(bounds[order] + _FLOOR), np.maximum.accumulate(np.log(errors[order] + _FLOOR))])

    known = Memo(attained)
    return lambda ranks: np.asarray(np.exp(np.interp(np.log(losses(ranks).sum(1) + _FLOOR), *known())) * power)
