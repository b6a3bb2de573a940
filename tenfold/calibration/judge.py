"""Judge fits by samples that they have not seen: what the network's outputs lose there, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.gradients import GradientSums, Loss, Projection, SentBack, channels_first
from tenfold.calibration.last_layer import LastLayer
from tenfold.calibration.shares import Together
from tenfold.decompositions import HeldOutCurve, Moments
from tenfold.decompositions.covariance import Covariance, blocks, is_tall
from tenfold.decompositions.curves import CurveProblem, Floats, tails
from tenfold.decompositions.roots import Root
from tenfold.decompositions.weighted_als import gram_through, gram_under, seen_from_inputs
from tenfold.formats import split_groups
from tenfold.formats.low_rank import LowRank
from tenfold.layers import dense_weight
from tenfold.records import LayerSpec
from tenfold.tensors import plain_arithmetic, squarable

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
        weight: W (out, in) of a linear layer of very many outputs, whose errors are seen from its inputs: ``mean`` is
            that of the inputs x then, ``into`` Vᵀ R W, and ``dual`` is multiplied with the gradients Wᵀg there.
    """

    spec: LayerSpec
    mean: Tensor
    into: Tensor
    dual: Tensor
    predicted: Floats
    weight: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module, spec: LayerSpec, moments: Moments) -> NestedFits:
        """Return the fits of a layer by its moments."""
        with torch.no_grad():
            weight = split_groups(dense_weight(layer).detach(), spec)
        problem, flat = CurveProblem(weight, spec, LowRank, moments), weight.flatten(2)
        if is_tall(flat):
            into, dual, values = _from_inputs(flat, problem.covariance, moments)
            if spec.kind == "linear":
                inputs = spec.replace(out_channels=spec.in_channels)
                mean = moments.mean[..., None, None].float()
                return cls(inputs, mean, into.float(), dual.float(), tails(values), weight[0])
            dual = torch.cat([(flat[:, rows].double() @ dual.mT).float() for rows in blocks(flat)], dim=1).mT
        else:
            values, vectors = torch.linalg.eigh(gram_under(problem.kernel.flatten(2), problem.covariance))
            root = moments.output_root()
            dual = (vectors.flip(-1) if root is None else root.solve(vectors.flip(-1))).mT
        del problem  # which holds the weight in float64
        into = dual
        if moments.output_gram is not None:
            gram = moments.ridged_gram()
            into = torch.cat([(part.double() @ gram).to(dual) for part in dual.split(_ROWS, dim=1)], dim=1)  # RᵀR is G
        mean = (flat.double() @ moments.mean.unsqueeze(-1)).unsqueeze(-1)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            mean = mean + bias.detach().double().view_as(mean)
        return cls(spec, mean.float(), into.float(), dual.float(), tails(values))

    def lost(self, values: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """Return Σ gᵀ(y − ŷ) over the positions of each sample at ranks 0, 1, ...: (samples, k + 1).

        ``values`` are the outputs y of the layer and ``gradient`` is that at y; or both at its inputs, with ``weight``.
        """
        y = channels_first(values, self.spec) - self.mean.to(values.dtype)
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
        loss: Loss = "outputs",
        seed: int = 0,
        widest: int | None = None,
        last: LastLayer | None = None,
    ) -> None:
        super().__init__(model, specs, loss=loss, seed=seed, widest=widest, last=last)
        self._fits = {
            path: NestedFits.of(model.get_submodule(path), specs[path], own)
            for path, own in moments.items()
            if own.output_gram is not None
        }
        self._now: dict[str, Tensor] = {}
        self._lost: dict[str, Tensor] = {}

    def gathering(self, path: str, spec: LayerSpec, entered: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        """Return what is called with the gradient at an output of a layer, which came of what entered it."""
        add = super().gathering(path, spec, entered, output)
        fits = self._fits.get(path)
        if fits is None:
            return add
        kept = (output if fits.weight is None else entered).clone()  # an activation in place may follow

        @plain_arithmetic()
        def judge(gradient: Tensor) -> None:
            add(gradient)
            if not self.differentiating:
                return
            known = squarable(gradient.detach())
            self._judge(path, kept, known if fits.weight is None else known @ fits.weight.to(known))

        return judge

    def at_last(self, last: LastLayer, entered: Tensor, gradient: Tensor) -> None:
        """Judge the layer that is left out."""
        if last.path in self._fits:
            self._judge(last.path, entered, gradient)

    def _judge(self, path: str, values: Tensor, gradient: Tensor) -> None:
        lost = self._fits[path].lost(squarable(values), squarable(gradient), self._size)
        before = self._now.get(path)
        self._now[path] = lost if before is None or before.shape != lost.shape else before + lost

    def add_part(self, model: nn.Module, part: Any, drawn: Projection | SentBack) -> None:
        """Run some samples of a batch forward, and backward from their share of its projection."""
        self._now.clear()
        super().add_part(model, part, drawn)
        for path, lost in self._now.items():
            square = lost.square().sum(0)
            self._lost[path] = self._lost[path] + square if path in self._lost else square
        self._now.clear()

    def gather(self, together: Together) -> None:
        """Make these the sums of all processes, each of which calls this."""
        super().gather(together)
        self._lost = together.summed(self._lost)

    def curves(self) -> dict[str, HeldOutCurve]:
        """Return the curve of each layer that a gradient reached."""
        return {
            path: HeldOutCurve.of(self._fits[path].predicted, (square / self._samples).cpu().numpy(), self._samples)
            for path, square in self._lost.items()
        }


def _from_inputs(weight: Tensor, covariance: Covariance, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Return Vᵀ R W (groups, n, n), D with dual = D Wᵀ (groups, n, n), and the eigenvalues (groups, n), ascending.

    V are the eigenvectors of A C Aᵀ, the leading ones first, of a tall A = R W (groups, m, n): all from Aᵀ A = Wᵀ G W.
    """
    square = gram_through(weight, None if moments.output_gram is None else moments.ridged_gram())
    root = Root.of(covariance)
    values, turn = torch.linalg.eigh(seen_from_inputs(square, root))
    kept = values > values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny) * 1e-12
    scale = kept / torch.where(kept, values, torch.ones_like(values)).sqrt()
    dual = root.transposed(turn * scale.unsqueeze(-2)).flip(-1).mT  # V is A Dᵀ
    return dual @ square, dual, values
