"""What algorithms that sweep over the parts of a weight share, whatever the parts are: settings, and data or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tenfold.decompositions.metric import Square
from tenfold.decompositions.parts import Found
from tenfold.decompositions.parts_under import Layout, descend_under
from tenfold.decompositions.weighted import InDoubles
from tenfold.records import Shape

# Sweeps under the covariance are dear, and their error is that of a sample.
_LOOSER = 10


@dataclass(frozen=True)
class PartsALS(InDoubles):
    """Sweeps over parts, on the weight or on the output error.

    Attributes:
        n_iter: sweeps on the weight at most.
        tol: stop when twice in turn a sweep lowers the root of the objective by less than this share of it.
        penalty: weight of the squares of the terms, times the relative squared error so far.
        starts: of small weights, the one that is no random one among them.
        data_iter: sweeps under the covariance at most; these stop at ten times ``tol``.
        cg_steps: steps of conjugate gradients for each part in each of these.
    """

    n_iter: int = 200
    tol: float = 1e-4
    penalty: float = 3e-3
    starts: int = 8
    data_iter: int = 20
    cg_steps: int = 3

    costly: ClassVar[bool] = True

    def meet(
        self,
        weight: Tensor,
        covariance: Square | None,
        modes: Shape,
        layout: Layout,
        begin: Callable[[Tensor], Found],
    ) -> Found:
        """Return the parts near a weight (batch, out, in, *kernel), or near its output where there is a covariance.

        Args:
            weight: what to meet.
            covariance: of the inputs, or None.
            modes: of the inputs, see ``descend_under``.
            layout: of the parts.
            begin: returns the parts near a weight, for white inputs.
        """
        if covariance is None:
            return begin(weight)
        return descend_under(
            weight,
            self.ridged(weight, covariance),
            modes,
            layout,
            begin,
            n_iter=self.data_iter,
            tol=_LOOSER * self.tol,
            cg_steps=self.cg_steps,
        )
