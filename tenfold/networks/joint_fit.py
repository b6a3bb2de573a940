"""Fit one bank of kernels to those of many trained layers, by what all of them lose of their outputs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from tenfold.decompositions import Moments, Sketch
from tenfold.decompositions.roots import sqrt_and_inverse_sqrt
from tenfold.errors import WeightError
from tenfold.networks.kernel_bank import KernelBank

_RIDGE = 1e-5


@dataclass(frozen=True, eq=False)
class BankProblem:
    """Kernels to approximate together, and how their errors count: Σ_l tr(G_l Δ_l C_l Δ_lᵀ), in float64.

    Attributes:
        weights: (L, out, in, *kernel).
        covariances: C_l (L, n, n) of the input patches, n = in·K; None where the weight alone counts.
        grams: G_l (L, out, out) of the gradients at the outputs; None with the covariances.
    """

    weights: Tensor
    covariances: Tensor | None = None
    grams: Tensor | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor], moments: Sequence[Moments] | None = None) -> Self:
        """Return the problem of layers with these weights, and with the moments of their inputs.

        Moments with targets draw each layer to the regression of these; without an ``output_gram`` outputs count alike.

        Raises:
            WeightError: kernels of several shapes, or moments that were sketched.
        """
        if len({tuple(weight.shape) for weight in weights}) != 1:
            msg = f"kernels of one shape share a bank, not {sorted({tuple(weight.shape) for weight in weights})}"
            raise WeightError(msg)
        own = torch.stack([weight.detach().double() for weight in weights])
        if moments is None:
            return cls(own)
        squares, grams, targets = [], [], []
        for weight, known in zip(own, moments, strict=True):
            square = known.covariance(_RIDGE)
            if isinstance(square, Sketch):
                msg = "moments of a shared kernel were sketched: calibrate with a larger sketch_above"
                raise WeightError(msg)
            squares.append(square[0])
            gram = torch.eye(len(weight))[None] if known.output_gram is None else known.ridged_gram()
            grams.append((gram.dense() if isinstance(gram, Sketch) else gram)[0].double())
            targets.append(known.regression_target(weight.flatten(1)[None], _RIDGE)[0].view_as(weight))
        return cls(torch.stack(targets), torch.stack(squares).double(), torch.stack(grams))

    def error(self, weights: Tensor) -> Tensor:
        """Return the share of what counts that is lost with these weights in place of the kernels."""
        return self._power(self.weights - weights) / self._whole

    def errors(self, weights: Tensor) -> list[float]:
        """Return the distortion tr(G Δ C Δᵀ) of each layer."""
        delta = (self.weights - weights).flatten(2)
        return [float(each) for each in self._each(delta)]

    @cached_property
    def _whole(self) -> Tensor:
        return self._power(self.weights).clamp_min(torch.finfo(torch.float64).tiny)

    def _power(self, delta: Tensor) -> Tensor:
        return self._each(delta.flatten(2)).sum()

    def _each(self, flat: Tensor) -> Tensor:
        if self.covariances is None or self.grams is None:
            return flat.square().sum((1, 2))
        return ((self.grams @ flat) * (flat @ self.covariances)).sum((1, 2))

    @cached_property
    def roots(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Square roots of what all layers' outputs, and input channels, count on average, each with its inverse."""
        _, out, inner, *_ = self.weights.shape
        if self.covariances is None or self.grams is None:
            eyes = [torch.eye(n, dtype=torch.float64) for n in (out, inner)]
            return (eyes[0], eyes[0]), (eyes[1], eyes[1])
        taps = self.covariances.shape[-1] // inner
        blocks = self.covariances.unflatten(-1, (inner, taps)).unflatten(1, (inner, taps))
        channels = blocks.diagonal(dim1=2, dim2=4).mean((0, -1))
        # Each layer counts by the other side of its error, as in a Kronecker product.
        scale = self.covariances.diagonal(dim1=1, dim2=2).mean(1)
        outputs = (self.grams * scale[:, None, None]).mean(0)
        first, second = sqrt_and_inverse_sqrt(outputs), sqrt_and_inverse_sqrt(channels)
        return first, second

    def whitened(self) -> BankProblem:
        """Return the problem for outputs and input channels of which all count nearly alike."""
        (out, out_back), (inner, inner_back) = self.roots
        weights = torch.einsum("po,loi...->lpi...", out, self.weights)
        weights = torch.einsum("qi,lpi...->lpq...", inner, weights)
        if self.covariances is None or self.grams is None:
            return BankProblem(weights)
        taps = self.covariances.shape[-1] // len(inner)
        spread = torch.kron(inner_back, torch.eye(taps, dtype=torch.float64))
        grams = out_back @ self.grams @ out_back
        return BankProblem(weights, spread @ self.covariances @ spread, grams)


def fit_bank_(bank: KernelBank, problem: BankProblem, *, steps: int = 100) -> float:
    """Fit the factors of a bank in place, and return the share of what counts that is lost.

    The start is the HOSVD, or TT-SVD, of the kernels with outputs and input channels whitened by what they count over
    all layers. Then all factors descend together on the exact error, by L-BFGS (Liu & Nocedal 1989) in float64. The
    result is never worse than the start.

    Args:
        bank: of kernels of the shape of the problem; its own dtype and device stay.
        problem: what is lost when.
        steps: iterations at most; 0 stays at the start.

    Raises:
        WeightError: a problem of another shape.
    """
    if tuple(problem.weights.shape) != bank.full_shape:
        msg = f"the bank is for kernels {bank.full_shape}, the problem has {tuple(problem.weights.shape)}"
        raise WeightError(msg)
    white = problem.whitened()
    kind = type(bank)
    layers, out, inner, *kernel = bank.full_shape
    wide = kind(layers, out, inner, kernel, bank.ranks, dtype=torch.float64)
    wide.fill_(white.weights)
    start = {name: value.clone() for name, value in wide.state_dict().items()}
    least = float(white.error(wide.weights()).detach())
    if steps and least > 0:
        lost = _descended(wide, white, steps)
        if not lost < least:
            wide.load_state_dict(start)
        least = min(least, lost)
    wide.transform_(problem.roots[0][1], problem.roots[1][1])
    _copy(wide, bank)
    return least


def _descended(bank: KernelBank, problem: BankProblem, steps: int) -> float:
    """Descend in place; return the error."""
    parameters = list(bank.parameters())
    search = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = problem.error(bank.weights())
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)
    search.zero_grad()
    return float(problem.error(bank.weights()).detach())


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    known: Mapping[str, Tensor] = source.state_dict()
    for name, value in target.state_dict().items():
        value.copy_(known[name])
