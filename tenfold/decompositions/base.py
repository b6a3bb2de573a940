"""How factors are found: algorithms as frozen objects that are their own configuration, and ``decompose``."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tenfold.decompositions.metric import Moments, Square, ridged, roots
from tenfold.errors import RankError, TenfoldError, WeightError
from tenfold.formats import FORMATS, Factorization, Rank, split_groups
from tenfold.records import LayerSpec
from tenfold.registry import Registry
from tenfold.tensors import rel_error
from tenfold.tensors.kruskal import Stability

ComputeDtype = Literal["auto", "float32", "float64"]


@dataclass(frozen=True)
class Factors:
    """What an algorithm returns for a batch of weights: tensors by field name of the format, first axis the batch."""

    tensors: dict[str, Tensor | None]
    n_iter: int = 1
    converged: bool = True
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """A factorization with how well it met the weight.

    Attributes:
        value: the factors, in the dtype and on the device of the weight.
        rel_error: ‖W − Ŵ‖/‖W‖ of the factors as they are stored.
        n_iter: sweeps used; 1 for direct methods.
        converged: whether the stop rule was met before the sweeps ran out.
        note: what the algorithm chose by itself, such as the SVD method.
        output_error: with a metric, the share √(E‖y−ŷ‖²/E‖y−ȳ‖²) of the output that is missed with the bias shifted.
        bias_shift: with a metric, what to add to the bias (out,) so that the mean output is as it should be.
    """

    value: Factorization
    rel_error: float
    n_iter: int = 1
    converged: bool = True
    note: str = ""
    output_error: float | None = None
    bias_shift: Tensor | None = None

    @property
    def stability(self) -> Stability | None:
        """How far the terms of the factors cancel; None for formats whose factors cannot diverge."""
        return self.value.stability()


@dataclass(frozen=True)
class Decomposition(abc.ABC):
    """An algorithm that finds the factors of a format. Its fields are its configuration; a subclass is final.

    ``dtype`` is what it computes in: ``auto`` is float64 for float64 weights and float32 for all others.
    """

    dtype: ComputeDtype = "auto"
    seed: int = 0

    costly: ClassVar[bool] = False  # takes hundreds of sweeps, even of small weights: the laws try it on fewer
    rough: ClassVar[bool] = False  # a start for others: may miss a weight of some rank at that rank, or rise with rank

    @classmethod
    @abc.abstractmethod
    def serves(cls, format: type[Factorization]) -> bool:
        """Whether this algorithm finds factors of that format."""

    @abc.abstractmethod
    def fit(self, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank) -> Factors:
        """Return the factors of a batch of weights (batch, out, in, *kernel) at a complete, valid rank.

        The weights are finite, in the dtype to compute in, and scaled so that the largest entry of each is 1 (or all
        are zero). ``spec`` tells the geometry; stride and padding do not matter here.
        """

    def fit_from(
        self, start: Factorization | None, weight: Tensor, spec: LayerSpec, format: type[Factorization], rank: Rank
    ) -> Factors:
        """Return the factors of a batch of weights, as ``fit`` does, gone on from ``start`` where that helps.

        ``start`` holds factors of the same weights in this format, at any rank; None for none. Algorithms that find the
        same from everywhere do not need it.
        """
        del start
        return self.fit(weight, spec, format, rank)

    @classmethod
    def name(cls) -> str:
        """Return the name under which the algorithm is registered."""
        return next((n for n, c in DECOMPOSITIONS.loaded() if c is cls), cls.__name__)

    def to_dict(self) -> dict[str, Any]:
        """Return name and configuration as plain values, for a plan."""
        return {"name": self.name(), **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> Decomposition:
        """Return the algorithm that ``to_dict`` described.

        Raises:
            UnknownNameError: no algorithm of that name.
            TenfoldError: a setting that the algorithm does not have.
        """
        settings = dict(config)
        kind = DECOMPOSITIONS.get(str(settings.pop("name", "")))
        known = {f.name for f in dataclasses.fields(kind)}
        unknown = sorted(set(settings) - known)
        if unknown:
            msg = f"{kind.name()} has the settings {', '.join(sorted(known))}, not {', '.join(unknown)}"
            raise TenfoldError(msg)
        return kind(**settings)


@dataclass(frozen=True)
class AwareDecomposition(Decomposition):
    """An algorithm that minimises the error of the layer's output, given the covariance of its input patches."""

    ridge: float = 1e-5

    @abc.abstractmethod
    def fit(
        self,
        weight: Tensor,
        spec: LayerSpec,
        format: type[Factorization],
        rank: Rank,
        covariance: Square | None = None,
    ) -> Factors:
        """Return the factors of a batch of weights with the least tr(Δ C Δᵀ), Δ = weight − approximation.

        ``covariance`` C is (batch, n, n), n = in·prod(kernel); None stands for the identity. Of very wide layers it is
        a ``Sketch``: ``A @ covariance`` is the product with it as with a tensor, ``dense()`` makes the tensor.
        """


DECOMPOSITIONS: Registry[Decomposition] = Registry("decomposition")


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight to decompose: into which format, at which rank, by which algorithm, from which factors if any."""

    weight: Tensor
    spec: LayerSpec
    format: str
    rank: Rank
    algorithm: Decomposition
    metric: Moments | None = None
    start: Factorization | None = None


def default_algorithm(format: str, seed: int = 0, *, aware: bool = False) -> Decomposition:
    """Return the algorithm that a format names as its default; if ``aware``, as that which knows the data, if any."""
    kind = FORMATS.get(format)
    name = (aware and kind.aware_algorithm) or kind.default_algorithm
    return DECOMPOSITIONS.get(name)(seed=seed)


def decompose(
    weight: Tensor,
    format: str,
    rank: Rank,
    algorithm: Decomposition | str | None = None,
    *,
    spec: LayerSpec | None = None,
    metric: Moments | None = None,
    start: Factorization | None = None,
) -> Fit:
    """Return the best factorization of a weight that the algorithm finds at this rank.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype, on any device.
        format: name of a registered format.
        rank: ranks by name; a name left out stands for full rank.
        algorithm: or its name; the format's default algorithm if None; with a metric, the one that minimises the output
            error.
        spec: geometry of the layer that holds the weight; needed for groups, transposed convolutions and embeddings.
        metric: moments of the layer's inputs. An algorithm that does not know the data ignores them, but the fit tells
            its output error all the same.
        start: factors of the weight in this format at any rank, from which algorithms go on that depend on where they
            start (CP); others find the same without, and those that know the data begin by themselves.

    Raises:
        RankError: a rank outside of what the weight allows.
        WeightError: a weight with NaN or infinite entries, or one that the format refuses.

    Example:
        >>> fit = decompose(torch.eye(6)[:, :, None, None].expand(6, 6, 3, 3), "tucker2", {"out": 6, "in": 4})
        >>> round(fit.rel_error, 4)
        0.5774
    """
    if not isinstance(weight, Tensor):
        msg = f"the weight is a {type(weight).__name__}, not a tensor: pass torch.as_tensor(weight)"
        raise WeightError(msg)
    if not isinstance(rank, Mapping):
        msg = f"ranks go by name, such as {{'{FORMATS.get(format).rank_names[0]}': 8}}, not {rank!r}"
        raise RankError(msg)
    if spec is None:
        spec = spec_of_weight(weight)
    if isinstance(algorithm, str):
        algorithm = DECOMPOSITIONS.get(algorithm)()
    algorithm = algorithm or default_algorithm(format, aware=metric is not None)
    return decompose_many([Problem(weight, spec, format, rank, algorithm, metric, start)])[0]


def decompose_many(problems: Sequence[Problem]) -> list[Fit]:
    """Return one fit for each problem; weights of equal shape are decomposed together, which is faster when small."""
    prepared = [_prepare(p) for p in problems]
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, (problem, (weight, _)) in enumerate(zip(problems, prepared, strict=True)):
        # Large weights fill the machine alone; stacking those, or those with a metric or start, would only cost memory.
        own = problem.metric is not None or problem.start is not None
        alone = i if weight.numel() > _STACK_BELOW or own else -1
        key = (weight.shape, weight.dtype, weight.device, problem.format, repr(problem.rank), problem.algorithm, alone)
        batches.setdefault(key, []).append(i)
    fits: dict[int, Fit] = {}
    for members in batches.values():
        found = _fit_batch([problems[i] for i in members], [prepared[i] for i in members])
        fits.update(zip(members, found, strict=True))
    return [fits[i] for i in range(len(problems))]


_STACK_BELOW = 1 << 17
_TINY = 1e-30


def spec_of_weight(weight: Tensor) -> LayerSpec:
    """Return the geometry of a plain linear layer or convolution with this weight."""
    if not 2 <= weight.dim() <= 5:
        msg = f"a weight needs 2 to 5 axes (out, in, *kernel), not the shape {tuple(weight.shape)}"
        raise WeightError(msg)
    if 0 in weight.shape:
        msg = f"the weight is empty: shape {tuple(weight.shape)}"
        raise WeightError(msg)
    out, inner, *kernel = weight.shape
    return LayerSpec(kind="conv" if kernel else "linear", in_channels=inner, out_channels=out, kernel=tuple(kernel))


def _prepare(problem: Problem) -> tuple[Tensor, float]:
    """Return the weight with its groups apart, scaled to a largest entry of 1, and that scale; or refuse it."""
    weight, spec = problem.weight.detach(), problem.spec
    kind = FORMATS.get(problem.format)
    refusal = kind.refuses(spec)
    if refusal is not None:
        msg = f"{problem.format} does not serve {spec}: {refusal}"
        raise WeightError(msg)
    if not problem.algorithm.serves(kind):
        finders = [n for n, d in DECOMPOSITIONS.items() if d.serves(kind)]
        msg = f"{problem.algorithm.name()} does not find {problem.format} factors. Use {' or '.join(finders)}."
        raise RankError(msg)
    kind.check_rank(spec, problem.rank)
    if not weight.is_floating_point():
        msg = f"the weight has dtype {weight.dtype}: only floating point weights can be factorized"
        raise WeightError(msg)
    if weight.is_meta:
        msg = "the weight is on the meta device and has no values: load the model first"
        raise WeightError(msg)
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        msg = f"the weight has {bad} NaN or infinite entries of {weight.numel()}: repair the model or keep this layer"
        raise WeightError(msg)
    wide = torch.float64 if _wants_float64(problem) else torch.float32
    scale = float(weight.abs().max())
    # Subnormal entries would overflow the reciprocal of the scale, so such weights are lifted in float64.
    groups = split_groups(weight, spec).to(torch.float64 if 0 < scale < _TINY else wide)
    return (groups / (scale or 1.0)).to(wide), scale


def _wants_float64(problem: Problem) -> bool:
    dtype = problem.algorithm.dtype
    return dtype == "float64" or (dtype == "auto" and problem.weight.dtype == torch.float64)


def _fit_batch(problems: Sequence[Problem], prepared: Sequence[tuple[Tensor, float]]) -> list[Fit]:
    first = problems[0]
    kind = FORMATS.get(first.format)
    rank = kind.check_rank(first.spec, first.rank)
    groups = first.spec.groups
    if first.metric is not None:
        return [_fit_metric(first, first.metric, prepared[0], kind, rank)]
    stacked = prepared[0][0] if len(problems) == 1 else torch.cat([w for w, _ in prepared])
    begun = None if first.start is None else first.start.to(stacked).scaled(1 / (prepared[0][1] or 1.0))
    factors = first.algorithm.fit_from(begun, stacked, first.spec, kind, rank)
    fits = []
    for i, (problem, (weight, scale)) in enumerate(zip(problems, prepared, strict=True)):
        rows = slice(i * groups, (i + 1) * groups)
        own = {k: None if v is None else v[rows] for k, v in factors.tensors.items()}
        value = kind(problem.spec, **own).scaled(scale).to(problem.weight.dtype)
        refuse_overflow(value, problem.weight)
        stored = value.to(weight.dtype).scaled(1 / scale if scale > _TINY else 1.0)
        error = rel_error(stored.to_grouped(), weight if scale > _TINY else weight * scale)
        fits.append(Fit(value, error, factors.n_iter, factors.converged, factors.note))
    return fits


def _fit_metric(
    problem: Problem, metric: Moments, prepared: tuple[Tensor, float], kind: type[Factorization], rank: Rank
) -> Fit:
    """Return the fit of one weight, as good for the output as its algorithm makes it, and how good that is."""
    (weight, scale), spec, algorithm = prepared, problem.spec, problem.algorithm
    metric.check(spec.group_shape)
    metric = metric.to(weight.device)
    flat = weight.double().flatten(2) * scale
    if isinstance(algorithm, AwareDecomposition):
        goal = metric.goal(flat, algorithm.ridge)
        top = float(goal.abs().max()) or 1.0
        turns = metric.output is not None and isinstance(kind.structure(spec, rank)[-1], LayerSpec)
        root, inverse = roots(ridged(metric.output, _MINDED)) if turns and metric.output is not None else (None, None)
        wanted = (goal / top if root is None else root @ goal / top).view(weight.shape).to(weight.dtype)
        factors = algorithm.fit(wanted, spec, kind, rank, covariance=metric.covariance())
        value = kind(spec, **factors.tensors)
        if inverse is not None:
            *first, last = value.chain()
            turned = (inverse.to(last.dtype) @ last.flatten(2)).view_as(last)
            value = kind.from_chain(spec, rank, (*first, turned)).balanced()  # the turn has stretched its outputs
    else:
        begun = None if problem.start is None else problem.start.to(weight).scaled(1 / (scale or 1.0))
        factors, top = algorithm.fit_from(begun, weight, spec, kind, rank), scale
        value = kind(spec, **factors.tensors)
    value = value.scaled(top).to(problem.weight.dtype)
    refuse_overflow(value, problem.weight)
    stored = value.to(torch.float64).to_grouped().flatten(2)
    missed, power = metric.errors(flat, stored)
    total = float(power.sum())
    return Fit(
        value,
        rel_error(stored, flat),
        factors.n_iter,
        factors.converged,
        factors.note,
        output_error=(float(missed.sum()) / total) ** 0.5 if total > 0 else 0.0,
        bias_shift=metric.bias_shift(flat, stored).flatten(),
    )


# Outputs that the network does not mind at all still count a little, so that their weights stay determined.
_MINDED = 1e-3


def refuse_overflow(value: Factorization, weight: Tensor) -> None:
    """Raise WeightError if the factors of ``weight`` do not fit into their dtype."""
    if not all(torch.isfinite(t).all() for t in value.tensors().values()):
        dtype = next(iter(value.tensors().values())).dtype
        msg = (
            f"the {value.name()} factors overflow {dtype}: the weight's largest entry is "
            f"{float(weight.abs().max()):.3g}. Convert the model to float32 first."
        )
        raise WeightError(msg)
