"""Tucker-CP: Tucker-2 of the kernel, then stable CP of its small core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, Decomposition, Factors
from tenfold.decompositions.correction import Objective
from tenfold.decompositions.cp_epc import CPEPC
from tenfold.decompositions.tucker import HOOI
from tenfold.formats import FORMATS, Factorization, Rank, Tucker2
from tenfold.records import LayerSpec


@DECOMPOSITIONS.register("tucker_cp")
@dataclass(frozen=True)
class TuckerCPFit(Decomposition):
    """Orthonormal frames by HOOI, then CP of the core with error preserving correction (TKD-CPD; Phan et al. 2020).

    The core is small, so that its CP is found fast, and the frames do not amplify noise. Settings of the CP are those
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

    costly: ClassVar[bool] = True

    @classmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether the format is Tucker-CP."""
        return format is FORMATS.get("tucker_cp")

    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return frames where a side is not at full rank, and the factors of what they leave of the kernel."""
        del format
        tucker = HOOI(seed=self.seed).fit(weight, spec, Tucker2, {"out": rank["out"], "in": rank["in"]})
        core = tucker.tensors["core"]
        if core is None:
            msg = "hooi returned no core"
            raise TypeError(msg)
        stable = CPEPC(
            seed=self.seed,
            slack=self.slack,
            objective=self.objective,
            sweeps=self.sweeps,
            tol=self.tol,
            rounds=self.rounds,
        ).fit_terms(core.flatten(3), rank["rank"])
        names = ("out_factor", "in_factor", "taps")
        factors: dict[str, Tensor | None] = dict(zip(names, stable.factors, strict=True))
        factors |= {"out_frame": tucker.tensors["out_factor"], "in_frame": tucker.tensors["in_factor"]}
        done = tucker.converged and stable.converged
        return Factors(factors, tucker.n_iter + stable.n_iter, done, stable.note)
