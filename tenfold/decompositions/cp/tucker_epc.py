"""Tucker-CP: Tucker-2 of the kernel, then stable CP of its small core."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors, FitProblem, default_algorithm
from tenfold.decompositions.cp.correction import Objective
from tenfold.decompositions.cp.epc import CPEPC
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, Floats, Ranks, tails
from tenfold.decompositions.tucker import HOOI
from tenfold.formats import FORMATS, Tucker2
from tenfold.formats.tucker_cp import TuckerCP
from tenfold.tensors import gram


@DECOMPOSITIONS.register("tucker_cp")
@dataclass(frozen=True)
class TuckerEPC(Decomposition):
    """Orthonormal bases by HOOI, then CP of the core with error preserving correction (TKD-CPD; Phan et al. 2020).

    The core is small, so that its CP is found fast, and the bases do not amplify noise. Settings of the CP are those
    of ``cp_epc``, to be applied to the error within the core.

    Attributes:
        slack: the squared error of the core's CP may be this many times what least squares reached.
        objective: ``sensitivity`` or ``norms``.
        sweeps: of each correction, at most.
        tol: stop a correction when a sweep lowers the objective by less than this share.
        rounds: least squares and correction in turn, at most this often.
    """

    slack: float = 1.02
    objective: Objective = "sensitivity"
    sweeps: int = 200
    tol: float = 1e-3
    rounds: int = 1

    slow = True

    formats = (TuckerCP,)

    def fit(self, problem: FitProblem) -> Factors:
        """Return frames where a side is not at full rank, and the factors of what they leave of the kernel."""
        channels = {"out": problem.rank["out"], "in": problem.rank["in"]}
        tucker = HOOI(seed=self.seed).fit(dataclasses.replace(problem, format=Tucker2, rank=channels, start=None))
        core = tucker.tensors["core"]
        if core is None:
            msg = "hooi returned no core"
            raise TypeError(msg)
        stable = CPEPC().with_settings(vars(self)).fit_tensor(core.flatten(3), problem.rank["rank"])
        names = ("out_factor", "in_factor", "taps")
        factors: dict[str, Tensor | None] = dict(zip(names, stable.factors, strict=True))
        factors |= {"out_frame": tucker.tensors["out_factor"], "in_frame": tucker.tensors["in_factor"]}
        converged = tucker.converged and stable.converged
        return Factors(factors, tucker.n_iter + stable.n_iter, converged, stable.note)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return an upper bound without moments: the tails that the frames drop, and the error of CP of the kernel.

        What the frames leave is at least as near to so many terms as the whole weight is. With moments, fits.
        """
        if problem.moments is not None:
            return problem.between_fits(self)
        *frames, _ = problem.format.rank_names
        unfoldings = problem.format.unfoldings(problem.weight.double(), problem.spec)
        spectra = [tails(torch.linalg.eigvalsh(gram(unfoldings[side]))) for side in frames]
        lost = [tail / max(float(tail[0]), 1e-300) for tail in spectra]
        terms = default_algorithm("cp3").error_curve(dataclasses.replace(problem, format=FORMATS.get("cp3")))

        def curve(ranks: Ranks) -> Floats:
            dropped = [tail[ranks[:, k]] for k, tail in enumerate(lost)]
            return np.minimum(terms(ranks[:, -1:]) + sum(dropped, np.zeros(len(ranks))), 1.0)

        return curve
