"""Base of all algorithms: frozen objects that are their own configuration, with one ``fit(problem)``."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from tenfold.decompositions.covariance import Covariance, Sketch, add_ridge, mean_variance
from tenfold.errors import TenfoldError
from tenfold.formats import FORMATS, Factorization, Rank
from tenfold.records import LayerSpec
from tenfold.registry import Registry

if TYPE_CHECKING:
    from tenfold.decompositions.curves import CurveProblem, ErrorCurve

ComputeDtype = Literal["auto", "float32", "float64"]
FormatT = TypeVar("FormatT", bound=Factorization)


@dataclass(frozen=True, eq=False)
class FitProblem:
    """A batch of weights to factorize in one format at one rank: all that an algorithm is given.

    The groups of a layer are elements of the batch, so that algorithms know nothing of groups.

    Attributes:
        weight: (batch, out, in, *kernel), finite, in the dtype to compute in, each scaled so that its largest entry is
            1 (or all are zero).
        spec: geometry of the layer; stride and padding do not matter here.
        format: the format to find factors of.
        rank: complete and valid.
        covariance: C (batch, n, n) of the input patches, n = in·prod(kernel): algorithms with ``uses_covariance``
            minimise tr(Δ C Δᵀ), Δ = weight − approximation. None stands for the identity. Of very wide layers it is a
            ``Sketch``, of which ``A @ covariance`` is the product as with a tensor.
        start: factors of the same weights in this format, at any rank, for algorithms with ``supports_start``; or None.
        output_gram: G (batch, out, out), not singular, for algorithms with ``weighs_outputs``: they minimise
            tr(G Δ C Δᵀ). None stands for the identity; for all others the weight is given in coordinates where it is.
    """

    weight: Tensor
    spec: LayerSpec
    format: type[Factorization]
    rank: Rank
    covariance: Covariance | None = None
    start: Factorization | None = None
    output_gram: Covariance | None = None

    def format_as(self, kind: type[FormatT]) -> type[FormatT]:
        """Return the format as a subclass of ``kind``.

        Raises:
            TypeError: it is another one, which the algorithm should not claim to support.
        """
        if not issubclass(self.format, kind):
            msg = f"the algorithm finds factors of {kind.__name__} formats, not of {self.format.name()}"
            raise TypeError(msg)
        return self.format


@dataclass(frozen=True)
class Factors:
    """The result of an algorithm for a batch of weights: tensors by field name of the format, batch first."""

    tensors: Mapping[str, Tensor | None]
    n_iter: int = 1
    converged: bool = True
    note: str = ""


@dataclass(frozen=True)
class Decomposition(abc.ABC):
    """An algorithm that finds the factors of a format. Its fields are its configuration; a subclass is final.

    Attributes:
        dtype: what it computes in; ``auto`` is float64 for float64 weights and float32 for all others.
        seed: of all random numbers.
    """

    dtype: ComputeDtype = "auto"
    seed: int = 0

    # What subclasses say of themselves, without an annotation: settings have one, and are fields.
    formats: ClassVar[tuple[type[Factorization], ...]] = ()  # finds factors of these and of their subclasses
    uses_covariance: ClassVar[bool] = False  # minimises the error of the output: see CovarianceDecomposition
    weighs_outputs: ClassVar[bool] = False  # takes ``output_gram``: its last factor has a structure to keep
    supports_start: ClassVar[bool] = False  # what it finds depends on the start, and it can continue from known factors
    slow: ClassVar[bool] = False  # takes hundreds of sweeps, even of small weights: the laws try it on fewer
    structured: ClassVar[bool] = (
        False  # its factors obey more than their rank, for others to absorb: they may be further
    )
    initializer_only: ClassVar[bool] = False  # may miss a weight of some rank at that rank, or its error rise with rank

    @classmethod
    def supports(cls, format: type[Factorization]) -> bool:
        """Whether this algorithm finds factors of that format: one of its ``formats``, unless it says otherwise."""
        return issubclass(format, cls.formats)

    @abc.abstractmethod
    def fit(self, problem: FitProblem) -> Factors:
        """Return the factors of a batch of weights; a problem's covariance and start are ignored if not supported."""

    def error_curve(self, problem: CurveProblem) -> ErrorCurve:
        """Return the error at any ranks of one layer, for planning: by default between fits at about a dozen ranks.

        Override it where the error has a closed form, or where fits at nested ranks come cheap.
        """
        return problem.between_fits(self)

    @property
    def covariance_ridge(self) -> float:
        """What is added to the covariance, as a share of its mean variance; 0 for algorithms that use none."""
        return 0.0

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

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """Return a copy with some settings changed; those that this algorithm does not have are left out."""
        known = {f.name for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: v for k, v in settings.items() if k in known})


@dataclass(frozen=True)
class CovarianceDecomposition(Decomposition):
    """Base of the algorithms that minimise the error of the layer's output, given the covariance of its input patches.

    They compute in float64, because covariances are squares, and add a ridge to the covariance.

    Attributes:
        ridge: added to the covariance, as a share of the mean variance.
    """

    dtype: ComputeDtype = "float64"
    ridge: float = 1e-5

    uses_covariance: ClassVar[bool] = True

    @property
    def covariance_ridge(self) -> float:
        """The ridge."""
        return self.ridge

    def regularized(self, problem: FitProblem) -> Covariance:
        """Return the covariance (batch, n, n) to measure with, scaled to a mean variance of 1 and never singular."""
        if problem.covariance is None:
            width = problem.weight[0, 0].numel()
            return torch.eye(width).to(problem.weight).expand(len(problem.weight), -1, -1)
        covariance = problem.covariance.to(problem.weight)
        level = mean_variance(covariance)
        level = torch.where(level > 0, level, torch.ones_like(level))
        ridge = max(self.ridge, 1e-9)
        if isinstance(covariance, Sketch):
            return add_ridge(covariance.scaled(1 / level), ridge)
        scaled = covariance / level[:, None, None]
        raised = torch.where(mean_variance(scaled) > 0, ridge, 1.0)  # as ``add_ridge``, without a copy of a wide one
        scaled.diagonal(dim1=-2, dim2=-1).add_(raised.unsqueeze(-1))
        return scaled


DECOMPOSITIONS: Registry[Decomposition] = Registry("decomposition")


def default_algorithm(format: str, seed: int = 0, *, data_aware: bool = False) -> Decomposition:
    """Return the default algorithm of a format; with ``data_aware`` the one that uses the covariance, if any."""
    kind = FORMATS.get(format)
    name = (data_aware and kind.data_aware_algorithm) or kind.default_algorithm
    return DECOMPOSITIONS.get(name)(seed=seed)


def algorithm_for(
    format: str,
    choice: Decomposition | Mapping[str, Any] | str | None = None,
    seed: int = 0,
    *,
    data_aware: bool = False,
) -> Decomposition:
    """Return the algorithm that a user or a plan chose for a format, or the default one.

    Args:
        format: name of the format.
        choice: the algorithm, its name, its ``to_dict()``, or None for ``default_algorithm``.
        seed: of the algorithm, unless the choice says another one.
        data_aware: whether there are moments of the inputs, which choose among the defaults.

    Raises:
        UnknownNameError: no algorithm of that name.
        TenfoldError: a setting that the algorithm does not have.
    """
    match choice:
        case None:
            return default_algorithm(format, seed, data_aware=data_aware)
        case Decomposition():
            return choice
        case str():
            return DECOMPOSITIONS.get(choice)(seed=seed)
        case _:
            return Decomposition.from_dict({"seed": seed, **choice})
