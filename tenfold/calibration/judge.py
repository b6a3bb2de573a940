"""Judge fits by samples that they have not seen: what the network's outputs lose there, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.gradients import GradientSums, Projection, channels_first
from tenfold.decompositions import HeldOutCurve, Moments
from tenfold.decompositions.covariance import Covariance, is_tall
from tenfold.decompositions.curves import CurveProblem, Floats, tails
from tenfold.decompositions.roots import Root
from tenfold.decompositions.weighted_als import gram_of_inputs, gram_under
from tenfold.formats import split_groups
from tenfold.formats.low_rank import LowRank
from tenfold.layers import dense_weight
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, squarable
from tenfold.tracing.inputs import batch_size_of

_ROWS = 64  # directions that are worked on at a time: of very many outputs each is long


@dataclass(frozen=True, eq=False)
class NestedFits:
    """The best low-rank fits of one layer at all ranks by its moments: R⁻¹ V_r V_rᵀ R W for nested V_r, RᵀR = G.

    Attributes:
        spec: geometry of the layer.
        mean: outputs at the mean input (groups, out/groups, 1, 1), which a shifted bias keeps as it is.
        into: Vᵀ R (groups, k, out/groups), leading rows first, k ≤ out/groups: coordinates of an output error.
        dual: Vᵀ R⁻ᵀ, the coordinates of a gradient.
        predicted: distortions (k + 1,) of ranks 0, 1, ... by the moments.
    """

    spec: LayerSpec
    mean: Tensor
    into: Tensor
    dual: Tensor
    predicted: Floats

    @classmethod
    def of(cls, layer: nn.Module, spec: LayerSpec, moments: Moments) -> NestedFits:
        """Return the fits of a layer by its moments."""
        with torch.no_grad():
            weight = split_groups(dense_weight(layer).detach(), spec)
        problem = CurveProblem(weight, spec, LowRank, moments)
        values, vectors = _output_directions(problem.kernel.flatten(2), problem.covariance)
        del problem  # which holds the weight in float64
        dual = into = vectors.mT
        root = moments.output_root()
        if root is not None and moments.output_gram is not None:
            dual, gram = root.solve(vectors).mT, moments.ridged_gram()
            into = torch.cat([(part.double() @ gram).to(dual) for part in dual.split(_ROWS, dim=1)], dim=1)  # RᵀR is G
        mean = (weight.double().flatten(2) @ moments.mean.unsqueeze(-1)).unsqueeze(-1)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            mean = mean + bias.detach().double().view_as(mean)
        return cls(spec, mean.float(), into.float(), dual.float(), tails(values))

    def lost(self, output: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """Return Σ gᵀ(y − ŷ) over the positions of each sample at ranks 0, 1, ...: (samples, k + 1)."""
        y = channels_first(output, self.spec) - self.mean.to(output.dtype)
        g = channels_first(gradient, self.spec)
        rows = y.shape[2]
        each = samples if rows % samples == 0 else rows  # windows, steps and the like may be folded into the first axis
        y, g = (t.unflatten(2, (each, -1)).flatten(3).permute(2, 0, 1, 3) for t in (y, g))
        parts = ((self.into.to(y.dtype) @ y) * (self.dual.to(g.dtype) @ g)).sum((1, 3))
        left = parts.double().flip(-1).cumsum(-1).flip(-1)
        return torch.cat([left, torch.zeros_like(left[:, :1])], dim=1)


class Judge(GradientSums):
    """A context that sums, besides gradients, what nested fits of layers cost the outputs of the network.

    To first order in the layer's error, a sample's outputs change by Σ Jₚ eₚ over the positions p of the layer's
    output; a random projection of them by Σ gₚᵀ eₚ with the gradients g of that projection. Its mean square over
    samples is the distortion itself: unlike tr(G Δ C Δᵀ) it takes neither positions nor inputs and gradients to be
    independent.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, LayerSpec],
        moments: Mapping[str, Moments],
        *,
        seed: int = 0,
        widest: int | None = None,
    ) -> None:
        super().__init__(model, specs, seed=seed, widest=widest)
        self._fits = {
            path: NestedFits.of(model.get_submodule(path), specs[path], own)
            for path, own in moments.items()
            if own.output_gram is not None
        }
        self._now: dict[str, Tensor] = {}
        self._lost: dict[str, Tensor] = {}
        self._size = 1

    def gathering(self, path: str, spec: LayerSpec, output: Tensor) -> Callable[[Tensor], None]:
        """Return what is called with the gradient at an output of a layer."""
        add = super().gathering(path, spec, output)
        fits = self._fits.get(path)
        if fits is None:
            return add
        kept = output.clone()  # an activation in place may follow

        @plain_arithmetic()
        def judge(gradient: Tensor) -> None:
            add(gradient)
            if not self.differentiating:
                return
            lost = fits.lost(squarable(kept), squarable(gradient.detach()), self._size)
            before = self._now.get(path)
            self._now[path] = lost if before is None or before.shape != lost.shape else before + lost

        return judge

    def add_part(self, model: nn.Module, part: Any, drawn: Projection) -> None:
        """Run some samples of a batch forward, and backward from their share of its projection."""
        self._size = batch_size_of(part) or 1
        self._now.clear()
        super().add_part(model, part, drawn)
        for path, lost in self._now.items():
            square = lost.square().sum(0)
            self._lost[path] = self._lost[path] + square if path in self._lost else square
        self._now.clear()

    def curves(self) -> dict[str, HeldOutCurve]:
        """Return the curve of each layer that a gradient reached."""
        return {
            path: HeldOutCurve.of(self._fits[path].predicted, (square / self._samples).cpu().numpy(), self._samples)
            for path, square in self._lost.items()
        }


def _output_directions(matrix: Tensor, covariance: Covariance) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (groups, k), ascending, of A C Aᵀ (m, m) and its eigenvectors (groups, m, k), descending.

    Of a tall A (groups, m, n) those of the side of the inputs, k = n, in float32: beyond them all eigenvalues are 0.
    """
    if not is_tall(matrix):
        values, vectors = torch.linalg.eigh(gram_under(matrix, covariance))
        return values, vectors.flip(-1)
    values, turn = torch.linalg.eigh(gram_of_inputs(matrix, covariance))
    kept = values > values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny) * 1e-12
    scale = kept / torch.where(kept, values, torch.ones_like(values)).sqrt()
    inside = Root.of(covariance).times_(matrix.mT.float().contiguous()).mT  # A C^½, up to a rotation
    return values, (inside @ (turn * scale.unsqueeze(-2)).to(inside)).flip(-1)
