"""Closed-form and alternating least squares on the error of the layer's output instead of that of its weight.

With x the centred input patches, C = E[x xᵀ] and ‖A‖²_C = tr(A C Aᵀ), the expected error of the output is
E‖(W−Ŵ)x‖² = ‖W−Ŵ‖²_C. All formats here are one problem: a kernel (out, c, k) is written as U · core ×_c V, where c are
the input channels of Tucker-2, or the pairs of channel and first tap of the spatial format; low rank has no V.
Given V, the best core and U come in closed form; given those, V is a linear least-squares problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tenfold.decompositions.base import DECOMPOSITIONS, CovarianceDecomposition, Factors, FitProblem
from tenfold.decompositions.covariance import Covariance, Sketch, blocks, channel_blocks, is_tall, sandwich
from tenfold.decompositions.curves import CurveProblem, ErrorCurve, Floats, Memo, interpolated, tails
from tenfold.decompositions.roots import Root, preconditioner, solve_spd, sqrt_and_inverse_sqrt
from tenfold.formats import Factorization, MatrixFormat, Tucker2
from tenfold.formats.interpolative import Interpolative
from tenfold.formats.low_rank import LowRank
from tenfold.formats.spatial import Spatial
from tenfold.records import LayerSpec
from tenfold.tensors import gram, leading_eigenvectors, symmetrize_, truncated_svd
from tenfold.tensors.conjugate_gradients import conjugate_gradients

# For curves few sweeps do: they rank the candidates, and the chosen one is decomposed with care.
_QUICK = {"n_iter": 3, "cg_steps": 4}


@DECOMPOSITIONS.register("whitened_svd")
@dataclass(frozen=True)
class WhitenedSVD(CovarianceDecomposition):
    """Truncated SVD of W C^½: the low-rank weight with the least output error, in closed form.

    As in SVD-LLM (Wang et al. 2025, arXiv 2403.07378) and BALF (2025, arXiv 2509.25136); found through the leading
    eigenvectors U of the output covariance W C Wᵀ as U Uᵀ W, which needs no inverse (the linear PCA of Zhang et al.
    2015, arXiv 1505.06798). Of very many outputs these are singular vectors of W C^½, found on the side of the inputs.
    Without a covariance this is the plain SVD. The factors of low_rank have equal norms.

    Attributes:
        ridge: added to the covariance, as a share of the mean variance.
    """

    formats = (LowRank, Interpolative)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the two factors."""
        matrix, covariance, rank = problem.weight.flatten(2), self.regularized(problem), problem.rank["rank"]
        if not is_tall(matrix):
            left = leading_eigenvectors(gram_under(matrix, covariance), rank)
        else:
            left = _leading_outputs(matrix, covariance, rank, self.seed)
        format = problem.format_as(MatrixFormat)
        value = format(problem.spec, **format.from_matrices(left, left.mT @ matrix, problem.spec))
        return Factors(value.balanced().tensors())

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the tails of the eigenvalues of the output covariance, which are exact."""
        matrix, covariance, moments = problem.weight.flatten(2), problem.covariance, problem.moments
        if not is_tall(matrix):
            square = gram_under(problem.kernel.flatten(2), covariance)
        elif moments is None:
            square = gram_of_inputs(problem.kernel.flatten(2), covariance)
        else:
            outputs = None if moments.output_gram is None else moments.to(matrix.device).ridged_gram()
            square = seen_from_inputs(gram_through(matrix, outputs), Root.of(covariance))
        lost = tails(torch.linalg.eigvalsh(square))
        return lambda ranks: lost[ranks[:, 0]]


@DECOMPOSITIONS.register("weighted_als")
@dataclass(frozen=True)
class WeightedALS(CovarianceDecomposition):
    """Alternating least squares on the output error, for Tucker-2 and spatial; the error never grows.

    The problem of Kalle et al. 2025 (arXiv 2511.04494). Core and output factor are found together, exactly, from the
    leading eigenvectors of the output covariance that the current input factor can explain; the input factor by
    preconditioned conjugate gradients on its normal equations, which are never formed. Starts from the HOSVD of the
    kernel whose channels are whitened.

    Attributes:
        n_iter: sweeps at most.
        tol: stop when the error falls by less than this share of E‖y−ȳ‖².
        cg_steps: steps of conjugate gradients in each sweep.
        ridge: added to the covariance, as a share of the mean variance.
    """

    n_iter: int = 20
    tol: float = 1e-4
    cg_steps: int = 6

    formats = (Tucker2, Spatial)

    def fit(self, problem: FitProblem) -> Factors:
        """Return the factors; the outer factors are orthonormal, a full-rank side of Tucker-2 has none."""
        spec, rank = problem.spec, problem.rank
        kernel = _kernel(problem.weight, spec, problem.format)
        batch, out, inner, _ = kernel.shape
        one_sided = issubclass(problem.format, MatrixFormat)
        r_out, r_in = (out, min(rank["rank"], inner)) if one_sided else (rank["out"], rank["in"])
        frame, kernel = _framed(kernel)
        solved = alternate(
            Weighted.of(kernel, self.regularized(problem).to(kernel)), min(r_out, kernel.shape[1]), r_in, self
        )
        u, core, v = solved.u, solved.core, solved.v
        if frame is not None:
            u, core = _unframed(frame, u, core, None if r_out == out else r_out)
            v = None if v is None else v.to(frame)
        if one_sided:
            first = torch.eye(inner).to(kernel).expand(batch, -1, -1) if v is None else v.mT
            second = core.reshape(batch, out, -1, *spec.kernel[1:])
            padded = {"first": first.reshape(batch, -1, inner // spec.kernel[0], spec.kernel[0]), "second": second}
            return Factors(padded, solved.sweeps, solved.converged)
        tensors = {"core": core.reshape(*core.shape[:3], *spec.kernel), "out_factor": u, "in_factor": v}
        return Factors(tensors, solved.sweeps, solved.converged)

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return what quick fits at a dozen input ranks miss, of Tucker-2 each with all output ranks, and in between.

        At each input rank one input factor is found, from which the errors at all output ranks follow.
        """
        _, kernel = _framed(_kernel(problem.kernel, problem.spec, problem.format))
        weighted = Weighted.of(kernel, problem.covariance)
        quick, power = self.with_settings(_QUICK), float(weighted.power.sum())
        out, most = weighted.kernel.shape[1:3]
        one_sided = issubclass(problem.format, MatrixFormat)

        def errors(r_in: int) -> Floats:
            # Output ranks near this one are the useful ones.
            r_out = out if one_sided else min(out, max(1, round(1.1 * r_in * out / most)))
            v = None if r_in >= most else alternate(weighted, r_out, r_in, quick).v
            _, explained = weighted.outputs(v)
            if one_sided:
                return np.array([max(power - float(explained.diagonal(dim1=-2, dim2=-1).sum()), 0.0)])
            return tails(torch.linalg.eigvalsh(explained), power)

        known = Memo(errors)
        if one_sided:
            return lambda ranks: interpolated(known, ranks[:, 0])[:, 0]
        return lambda ranks: interpolated(known, ranks[:, 1])[np.arange(len(ranks)), np.minimum(ranks[:, 0], out)]


def _kernel(weight: Tensor, spec: LayerSpec, format: type[Factorization]) -> Tensor:
    """Return the weight as (batch, out, c, k): the input factor acts on c."""
    if not issubclass(format, MatrixFormat):
        return weight.flatten(3)
    batch, out, inner = weight.shape[:3]
    return weight.reshape(batch, out, inner * spec.kernel[0], prod(spec.kernel[1:]))


def _framed(kernel: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return orthonormal columns (batch, out, c·k) and the kernel (batch, c·k, c, k) in their frame, of a tall kernel.

    The outputs of so few inputs span no more, so that the problem stays the same. Of others the kernel itself.
    """
    if not is_tall(kernel.flatten(2)):
        return None, kernel
    frame, inside = torch.linalg.qr(kernel.flatten(2))
    return frame, inside.unflatten(2, kernel.shape[2:]).double()


def _unframed(frame: Tensor, u: Tensor | None, core: Tensor, r_out: int | None) -> tuple[Tensor | None, Tensor]:
    """Return U (batch, out, r_out) and core of the outputs themselves, or None and the core where U is left out."""
    if r_out is None:
        whole = core if u is None else torch.einsum("bar,brck->back", u, core)
        return None, torch.einsum("boa,back->bock", frame, whole.to(frame.dtype))
    outer = frame if u is None else frame @ u.to(frame.dtype)
    idle = r_out - outer.shape[-1]  # more ranks than the outputs span
    return functional.pad(outer, (0, idle)), functional.pad(core.to(frame), (0, 0, 0, 0, 0, idle))


def gram_under(matrix: Tensor, covariance: Covariance) -> Tensor:
    """Return A C Aᵀ (batch, m, m), exactly symmetric."""
    square = sandwich(matrix, covariance)
    return symmetrize_(square)


def gram_of_inputs(matrix: Tensor, covariance: Covariance) -> Tensor:
    """Return C^½ AᵀA C^½ (batch, n, n) in float64, which has the eigenvalues of A C Aᵀ (batch, m, m)."""
    root = Root.of(covariance.double() if isinstance(covariance, Tensor) else covariance)
    return seen_from_inputs(gram_through(matrix), root)


def gram_through(matrix: Tensor, outputs: Covariance | None = None) -> Tensor:
    """Return Aᵀ G A (batch, n, n) in float64 of a tall A (batch, m, n), some rows at a time; G (batch, m, m) or I."""
    square = matrix.new_zeros(len(matrix), matrix.shape[2], matrix.shape[2], dtype=torch.float64)
    sketched = outputs.rows.shape[1] if isinstance(outputs, Sketch) else 0
    seen = square.new_zeros(len(square), sketched, matrix.shape[2])
    for rows in blocks(matrix):
        own = matrix[:, rows].double()
        if outputs is None:
            left = own
        elif isinstance(outputs, Sketch):
            left = own * outputs.rest[:, rows].unsqueeze(-1)
            seen += outputs.rows[:, :, rows] @ own
        else:
            left = outputs[:, rows] @ matrix.double()
        square.baddbmm_(left.mT, own)
    return square.baddbmm_(seen.mT, seen)


def seen_from_inputs(square: Tensor, root: Root) -> Tensor:
    """Return S K Sᵀ (batch, n, n) of K = Aᵀ A (batch, n, n), exactly symmetric: SᵀS is the covariance of the inputs."""
    square = root @ (root @ square).mT
    return symmetrize_(square)


def _leading_outputs(matrix: Tensor, covariance: Covariance, rank: int, seed: int) -> Tensor:
    """Return the leading eigenvectors (batch, m, rank) of A C Aᵀ, of a tall A (batch, m, n)."""
    if isinstance(covariance, Sketch):  # wide as well
        left = truncated_svd((Root.of(covariance) @ matrix.mT).mT, rank, seed=seed).u
    else:
        root = Root.of(covariance.double())
        leading = leading_eigenvectors(seen_from_inputs(gram_through(matrix), root), rank)
        left = matrix @ root.transposed(leading).to(matrix)
    # Orthonormal, also where outputs without power have left directions that are rounding.
    basis: Tensor = torch.linalg.qr(left).Q
    return basis


@dataclass(frozen=True, eq=False)
class Weighted:
    """A kernel and the covariance under which it is approximated, with what all sweeps need of both."""

    kernel: Tensor  # (batch, out, c, k)
    covariance: Covariance  # (batch, c·k, c·k)
    product: Tensor  # kernel · covariance: (batch, out, c, k)
    power: Tensor  # tr(W C Wᵀ): (batch,)
    channels: Tensor  # covariance of c alone, averaged over k: (batch, c, c)

    @classmethod
    def of(cls, kernel: Tensor, covariance: Covariance) -> Weighted:
        """Return the problem of approximating ``kernel`` (batch, out, c, k) under ``covariance`` (batch, c·k, c·k)."""
        taps = kernel.shape[-1]
        product = (kernel.flatten(2) @ covariance).view_as(kernel)
        power = (product * kernel).flatten(1).sum(-1)
        return cls(kernel, covariance, product, power, channel_blocks(covariance, taps))

    @cached_property
    def blocks(self) -> Tensor:
        """The covariance by pairs of taps (batch, k, k', c, c'), where V meets matrices; made for dense ones only."""
        dense = self.covariance.dense() if isinstance(self.covariance, Sketch) else self.covariance
        split = self.kernel.shape[2:]
        pairs: Tensor = dense.unflatten(-1, split).unflatten(1, split).permute(0, 2, 4, 1, 3).contiguous()
        return pairs

    @cached_property
    def lower_channels(self) -> Tensor:
        """Cholesky factor of ``channels``, to speed up conjugate gradients."""
        return preconditioner(self.channels, 1e-6)

    @cached_property
    def _white(self) -> tuple[Tensor, Tensor]:
        """The kernel for white channels, and the inverse root that it is brought back with."""
        root, inverse = sqrt_and_inverse_sqrt(self.channels)
        return torch.einsum("bock,bcd->bodk", self.kernel, root), inverse

    @cached_property
    def _white_outputs(self) -> Tensor:
        """All eigenvectors (batch, out, out) of the outputs of that kernel, the leading ones last."""
        vectors: Tensor = torch.linalg.eigh(gram(self._white[0].flatten(2))).eigenvectors
        return vectors

    def start(self, r_out: int, r_in: int) -> Tensor:
        """Return orthonormal columns (batch, c, r_in) that span the leading inputs of the channel-whitened kernel."""
        white, inverse = self._white
        if r_out < white.shape[1]:
            u = self._white_outputs[..., -r_out:].flip(-1)
            white = torch.einsum("bock,boa->back", white, u)
        lead = leading_eigenvectors(gram(white.transpose(1, 2).flatten(2)), r_in)
        basis: Tensor = torch.linalg.qr(inverse @ lead).Q
        return basis

    def explained(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return covariance (batch, m, m) and product (batch, out, m) seen through V, m = r_in·k."""
        product = torch.einsum("bock,bcr->bork", self.product, v).flatten(2)
        if isinstance(self.covariance, Sketch):
            return self.covariance.through(v), product
        half = self.blocks @ v[:, None, None]  # (batch, k, k', c, s)
        square = (v.mT[:, None, None] @ half).permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)
        return symmetrize_(square), product

    def outputs(self, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the best unconstrained core (batch, out, m) through V, and the output covariance that it explains."""
        if v is None:
            core, right = self.kernel.flatten(2), self.product.flatten(2)
        else:
            square, right = self.explained(v)
            core = solve_spd(square, right.mT).mT
        explained = core @ right.mT
        return core, symmetrize_(explained)


@dataclass
class _Solution:
    u: Tensor | None
    core: Tensor
    v: Tensor | None
    sweeps: int
    converged: bool
    errors: list[float]


def alternate(problem: Weighted, r_out: int, r_in: int, config: WeightedALS) -> _Solution:
    """Return U, core, V of the kernel, and the squared relative error before and after each sweep."""
    out, inner, taps = problem.kernel.shape[1:]
    v = problem.start(r_out, r_in) if r_in < inner else None
    total = torch.where(problem.power > 0, problem.power, torch.ones_like(problem.power))
    u, core, captured = _core_step(problem, v, r_out if r_out < out else None)
    errors = [float((1 - captured / total).clamp_min(0).max())]
    sweeps, converged = 1, v is None
    while v is not None and not converged and sweeps < config.n_iter:
        moved = torch.linalg.qr(_input_step(problem, u, core.unflatten(-1, (-1, taps)), v, config.cg_steps)).Q
        u, core, now = _core_step(problem, moved, r_out if r_out < out else None)
        worse = now < captured  # a weight of lower rank is met already: what is left to step along is rounding
        if bool(worse.any()):
            moved = torch.where(worse[:, None, None], v, moved)
            u, core, now = _core_step(problem, moved, r_out if r_out < out else None)
        v = moved
        errors.append(float((1 - now / total).clamp_min(0).max()))
        converged = bool((now - captured <= config.tol * total).all())
        captured, sweeps = now, sweeps + 1
    return _Solution(u, core.unflatten(-1, (-1, taps)), v, sweeps, converged, errors)


def _core_step(problem: Weighted, v: Tensor | None, rank: int | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the best U and core given V, and the output power that they explain."""
    core, square = problem.outputs(v)
    if rank is None:
        return None, core, square.diagonal(dim1=-2, dim2=-1).sum(-1)
    values, vectors = torch.linalg.eigh(square)
    u = vectors[..., -rank:].flip(-1)
    return u, u.mT @ core, values[..., -rank:].sum(-1)


def _input_step(problem: Weighted, u: Tensor | None, core: Tensor, v: Tensor, steps: int) -> Tensor:
    """Return V (batch, c, r_in) nearer to the least-squares solution given U and core, by conjugate gradients."""
    batch = len(core)
    rows = problem.product if u is None else torch.einsum("bock,boa->back", problem.product, u)
    right = torch.einsum("back,bark->bcr", rows, core)
    weights = torch.einsum("bark,bask->brs", core, core)

    # The core meets itself once and not in every step, which then takes c²·k²·r_in products instead of out·c²·k².
    paired = core.shape[2] <= core.shape[1] and not isinstance(problem.covariance, Sketch)
    pairs = torch.einsum("bark,basl->bklsr", core, core) if paired else core

    def normal(x: Tensor) -> Tensor:
        if paired:
            return ((problem.blocks @ x[:, None, None]) @ pairs).sum((1, 2))
        dense = torch.einsum("bark,bcr->back", core, x)
        moved = (dense.reshape(batch, core.shape[1], -1) @ problem.covariance).view_as(dense)
        return torch.einsum("back,bark->bcr", moved, core)

    lower_c = problem.lower_channels
    lower_r = preconditioner(weights, 1e-6)

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x, lower_c).mT, lower_r).mT

    result, _ = conjugate_gradients(normal, right, v, steps=steps, precondition=precondition)
    return result
