"""Choose inputs of a layer and refit the others into them: optimal brain surgeon, many removals at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Factors, FitProblem
from tenfold.decompositions.covariance import NEGLIGIBLE, Covariance, Sketch
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, Floats
from tenfold.decompositions.roots import solve_spd
from tenfold.formats.tucker1 import Tucker1

# So many inputs are removed between two updates of all the others, and chosen among so many times as many: the ones
# whose removal costs least then. Their own costs are kept up to date after each removal.
_BLOCK = 64
_AMONG = 4

# Rows of a weight whose squares are summed at once.
_ROWS = 64


@DECOMPOSITIONS.register("column_selection")
@dataclass(frozen=True)
class ColumnSelection(CovarianceDecomposition):
    """Greedy removal of inputs, with the least-squares refit of those that stay: the inner factor is a choice of them.

    Minimises tr(G Δ C Δᵀ), Δ = W − A S, S rows of the identity. For a choice S the best A is W C[:,S] C[S,S]⁻¹
    (Nyström: MoDeGPT, Lin et al. 2024, arXiv 2408.09632). Inputs go one by one, the one first whose removal costs
    least after the refit: ‖G^½ Wⱼ‖²/[C⁻¹]ⱼⱼ (optimal brain surgeon: Hassibi & Stork 1993), whereupon W and C⁻¹ are
    those of the others. The choices are nested: one sweep gives the errors at all sizes. Of a convolution an input is a
    channel with all of its taps. It is the algorithm of widths (``mlp_width``, ``conv_width``), where the layers before
    have to be able to leave the others out.

    Attributes:
        ridge: added to the covariance, as a share of the mean variance.
    """

    formats = (Tucker1,)
    structured: ClassVar[bool] = True

    def fit(self, problem: FitProblem) -> Factors:
        """Return the refitted weights of the chosen inputs, and their choice as rows of the identity."""
        weight, rank = problem.weight, problem.rank["rank"]
        covariance = _dense(self.regularized(problem)).to(weight)
        chosen = [_Sweep(w, c).down_to(rank) for w, c in zip(weight, covariance, strict=True)]
        parts = [_refitted(w, c, s, rank) for w, c, s in zip(weight, covariance, chosen, strict=True)]
        core, choice = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return Factors({"core": core.contiguous(), "in_factor": choice})

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return what each size misses, all from one sweep."""
        covariance = _dense(problem.covariance)
        lost = np.sum([_Sweep(w, c).curve() for w, c in zip(problem.kernel, covariance, strict=True)], axis=0)
        return lambda ranks: np.asarray(lost[np.minimum(ranks[:, 0], len(lost) - 1)])


class _Sweep:
    """Removal of inputs of one weight (out, in, *kernel) under a covariance (in·taps, in·taps), not singular.

    What is removed changes places with what stays at the end, so that the others lie together and nothing is copied.
    """

    def __init__(self, weight: Tensor, covariance: Tensor) -> None:
        self.taps = weight[0, 0].numel()
        self.left = torch.arange(weight.shape[1], device=weight.device)
        self.weight = weight.flatten(1).clone()
        self.inverse = _inverse(covariance)
        self.lost = [0.0]  # by number of inputs that are gone

    def down_to(self, size: int) -> Tensor:
        """Return which inputs stay when there are no more than ``size``, in their order."""
        while len(self.left) > size:
            self._remove(min(_BLOCK, len(self.left) - size))
        return self.left.sort().values

    def curve(self) -> Floats:
        """Return the error (in + 1,) at every number of inputs that stay, from 0 on."""
        self.down_to(0)
        return np.asarray(self.lost[::-1])

    def _remove(self, count: int) -> None:
        """Remove some inputs, and make up for them in the others."""
        scores = _scores(_own_grams(self.weight, self.taps), _blocks(self.inverse, self.taps))
        order = self.left.argsort()
        near = order[scores[order].argsort(stable=True)][: _AMONG * count]
        places = _places(near, self.taps)
        self._to_the_end(near[self._order(self.weight[:, places], self.inverse[places[:, None], places], count)])
        kept = len(self.left) - count
        rest, out = slice(kept * self.taps), slice(kept * self.taps, None)
        across = self.inverse[out, rest]
        turned = solve_spd(self.inverse[out, out], across)
        weight, inverse = self.weight[:, rest], self.inverse[rest, rest]
        self.weight = weight.addmm_(self.weight[:, out], turned, alpha=-1)
        self.inverse = inverse.addmm_(across.mT, turned, alpha=-1)
        self.left = self.left[:kept]

    def _to_the_end(self, gone: Tensor) -> None:
        """Exchange inputs with those of the last that are not among them."""
        kept = len(self.left) - len(gone)
        last = torch.arange(kept, len(self.left), device=gone.device)
        first, second = gone[gone < kept], last[~torch.isin(last, gone)]
        here, there = torch.cat([first, second]), torch.cat([second, first])
        self.left[here] = self.left[there]
        here, there = _places(here, self.taps), _places(there, self.taps)
        self.weight[:, here] = self.weight[:, there]
        self.inverse[here] = self.inverse[there]
        self.inverse[:, here] = self.inverse[:, there]

    def _order(self, weight: Tensor, inverse: Tensor, count: int) -> Tensor:
        """Return which of some inputs to remove, one after the other, from what is known of these alone."""
        gram, inverse, taps = weight.mT @ weight, inverse.clone(), self.taps
        here, gone = torch.arange(len(gram) // taps, device=gram.device), []
        for _ in range(count):
            scores = _scores(_blocks(gram, taps)[here], _blocks(inverse, taps)[here])
            place = int(scores.argmin())
            self.lost.append(self.lost[-1] + max(float(scores[place]), 0.0))
            gone.append(int(here[place]))
            here = torch.cat([here[:place], here[place + 1 :]])
            own = slice(gone[-1] * taps, (gone[-1] + 1) * taps)
            turned = solve_spd(inverse[own, own], inverse[own])  # (taps, n): what the others take over
            across = gram[:, own] - turned.mT @ (gram[own, own] / 2)
            mixed = across @ turned
            gram.sub_(mixed).sub_(mixed.mT)
            inverse.addmm_(inverse[:, own].clone(), turned, alpha=-1)
        return torch.tensor(gone, device=gram.device)


def _inverse(covariance: Tensor) -> Tensor:
    """Return C⁻¹, large but finite where rounding has left no variance: such inputs go first, and cost nothing."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed):
        return torch.cholesky_inverse(lower)
    values, vectors = torch.linalg.eigh(covariance)
    least = NEGLIGIBLE * values[-1] if values[-1] > 0 else values.new_ones(())
    inverse: Tensor = (vectors / values.maximum(least)) @ vectors.mT
    return inverse


def _scores(gram: Tensor, inverse: Tensor) -> Tensor:
    """Return what removing each input would cost (n,), tr(Wⱼ [C⁻¹]ⱼⱼ⁻¹ Wⱼᵀ), from blocks (n, taps, taps) of both."""
    if gram.shape[-1] == 1:
        return (gram / inverse).flatten()
    scores: Tensor = solve_spd(inverse, gram).diagonal(dim1=-2, dim2=-1).sum(-1)
    return scores


def _own_grams(weight: Tensor, taps: int) -> Tensor:
    """Return the Gram matrices (n, taps, taps) of the columns (out, n·taps) of each input."""
    if taps == 1:  # products of many single columns would copy each of them first
        norms = weight.new_zeros(weight.shape[1])
        for rows in weight.split(_ROWS):  # which then stay in the cache
            norms += rows.square().sum(0)
        return norms[:, None, None]
    apart = weight.unflatten(1, (-1, taps))
    return torch.einsum("ois,oit->ist", apart, apart)


def _blocks(square: Tensor, taps: int) -> Tensor:
    """Return the blocks (n, taps, taps) on the diagonal of a matrix (n·taps, n·taps)."""
    apart: Tensor = square.unflatten(0, (-1, taps)).unflatten(2, (-1, taps))
    return apart.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _places(inputs: Tensor, taps: int) -> Tensor:
    """Return the rows of some inputs in a matrix with ``taps`` rows for each."""
    return (inputs[:, None] * taps + torch.arange(taps, device=inputs.device)).flatten()


def _refitted(weight: Tensor, covariance: Tensor, chosen: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best weight (out, rank, *kernel) on the chosen inputs, and the choice (rank, in).

    A rank above the number of inputs leaves rows of zeros.
    """
    out, inner, *kernel = weight.shape
    places = _places(chosen, weight[0, 0].numel())
    flat = weight.flatten(1)
    if len(chosen) < inner:
        flat = solve_spd(covariance[places][:, places], covariance[places] @ flat.mT).mT
    core, choice = weight.new_zeros(out, rank, *kernel), weight.new_zeros(rank, inner)
    core[:, : len(chosen)] = flat.view(out, len(chosen), *kernel)
    choice[torch.arange(len(chosen)), chosen] = 1.0
    return core, choice


def _dense(covariance: Covariance) -> Tensor:
    return covariance.dense() if isinstance(covariance, Sketch) else covariance
