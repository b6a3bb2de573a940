"""Measure a model with one layer factorized: the error of the layer's output, the score, and what both depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.decompositions import Decomposition, Moments, algorithm_for, default_algorithm, fit_layer
from tenfold.errors import DataError
from tenfold.formats import Rank
from tenfold.layers import FactorizedLayer
from tenfold.planning.score import Score
from tenfold.records import SensitivityKey
from tenfold.surgery import find, put, reestimate_batchnorm_
from tenfold.surgery.replacement import factorizable_spec, geometry, layer_of, metric_for
from tenfold.tensors import digest, plain_arithmetic, untransformed
from tenfold.tracing.contexts import device_of, evaluating, layer_by_layer, same_random_numbers
from tenfold.tracing.inputs import call_model, digest_batches, tensors_in
from tenfold.tracing.masks import real_tokens, token_mask
from tenfold.tracing.samples import count_samples

Place = tuple[str, str]  # path, format


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and the conditions under which its layers are replaced, one alone; the model is left as it was.

    The fields are arguments of ``Sensitivity``; ``batches`` may be None where ``batchnorm`` is False.
    """

    model: nn.Module
    batches: Iterable[Any] | None
    moments: Mapping[str, Moments]
    algorithms: Mapping[str, Decomposition]
    batchnorm: bool
    seed: int
    evaluate: Score | None

    def algorithm(self, path: str, format: str) -> Decomposition:
        """Return what finds the factors of a layer in a format."""
        return self.algorithms.get(format) or default_algorithm(format, self.seed, data_aware=path in self.moments)

    def errors(self, place: Place, ranks: Sequence[Rank]) -> list[float]:
        """Return the relative errors of a layer's output at some ranks; one pass over the batches finds them all."""
        layers = [self._substitute(place, rank) for rank in ranks]
        if self.batches is None:
            return [layer.fit.rel_error if layer.fit is not None else 0.0 for layer in layers]
        return output_errors(self.model, place[0], layers, self.batches)

    def score(self, place: Place, rank: Rank) -> float:
        """Return the score of the model with only this layer replaced."""
        layer, batches = self._substitute(place, rank), self.batches if self.batchnorm else None
        with replaced(self.model, place[0], layer, batchnorm=batches) as changed:
            return self.score_of(changed)

    def score_of(self, model: nn.Module, *, original: bool = False) -> float:
        """Return the score of a model; of the ``original`` it has to be what its metric says.

        Raises:
            DataError: there is no ``evaluate``, or the score is not a finite number.
        """
        if self.evaluate is None:
            msg = "scoring needs evaluate=, a function of the model"
            raise DataError(msg)
        score = self.evaluate.of_original(model) if original else self.evaluate(model)
        if not math.isfinite(score):
            msg = f"evaluate returned {score}: a score must be a finite number"
            raise DataError(msg)
        return score

    def key(
        self, formats: Mapping[str, Sequence[str]], about: Mapping[str, str | int | float | None]
    ) -> SensitivityKey:
        """Return all that measurements depend on, as digests; goes through the batches once.

        Args:
            formats: in which each layer may be, by path.
            about: what the scores depend on besides.
        """
        return SensitivityKey(
            model=digest_model(self.model),
            samples=_samples(self.batches),
            data="" if self.batches is None else digest_batches(self.batches),
            seed=self.seed,
            batchnorm=self.batchnorm,
            moments=_digest_moments(self.moments),
            algorithms=self._algorithms(formats),
            about=dict(about),
        )

    def _substitute(self, place: Place, rank: Rank) -> FactorizedLayer:
        path, format = place
        module, algorithm = find(self.model, path), self.algorithm(path, format)
        made = substitute(module, format, rank, algorithm=algorithm, metric=self.moments.get(path))
        return made.train(module.training)

    def _algorithms(self, formats: Mapping[str, Sequence[str]]) -> dict[str, tuple[dict[str, Any], ...]]:
        """Return all algorithms in use, by format, as they are read from JSON."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path, own in formats.items():
            for format in own:
                settings = json.loads(json.dumps(self.algorithm(path, format).to_dict()))
                known = found.setdefault(format, [])
                known += [settings] if settings not in known else []
        return {format: tuple(sorted(known, key=str)) for format, known in found.items()}


def errors_of(bench: Bench, piece: tuple[Place, Sequence[Rank]]) -> list[float]:
    """Return what ``bench.errors`` says of a piece of work."""
    return bench.errors(*piece)


def score_of(bench: Bench, piece: tuple[Place, Rank]) -> float:
    """Return what ``bench.score`` says of a piece of work."""
    return bench.score(*piece)


def substitute(
    module: nn.Module,
    format: str,
    rank: Rank,
    *,
    algorithm: Decomposition | None = None,
    metric: Moments | None = None,
    seed: int = 0,
) -> FactorizedLayer:
    """Return the factorized layer that would stand in for a dense one, or for one that is factorized already.

    Args:
        module: the layer; stays as it is.
        format: name of the format.
        rank: ranks by name.
        algorithm: the format's default algorithm if None.
        metric: moments of the layer's inputs; the bias then makes up for the mean of what is missed.
        seed: of the default algorithm.

    Raises:
        PlanError: the layer is of a kind that no format serves.
        RankError: a rank outside of what the layer allows.
    """
    algorithm = algorithm_for(format, algorithm, seed, data_aware=metric is not None)
    with torch.no_grad():
        weight = module.factorization() if isinstance(module, FactorizedLayer) else geometry(module)[1]
        fit = fit_layer(
            weight, format, rank, algorithm, spec=factorizable_spec(module), moments=metric_for(module, metric)
        )
    return layer_of(fit, module, algorithm).requires_grad_(requires_grad=False)


@contextmanager
def replaced(
    model: nn.Module, path: str, layer: nn.Module, *, batchnorm: Iterable[Any] | None = None
) -> Iterator[nn.Module]:
    """Yield the model with this layer at ``path``; afterwards it is as before, its buffers included.

    Args:
        model: changed in place meanwhile.
        path: of the layer to replace.
        layer: what stands there meanwhile.
        batchnorm: batches on which batch norm is re-estimated meanwhile; None to leave it alone.
    """
    old = find(model, path)
    kept = {name: b.detach().clone() for name, b in model.named_buffers()} if batchnorm is not None else {}
    changed = put(model, {path: layer})
    try:
        if batchnorm is not None:
            reestimate_batchnorm_(changed, batchnorm)
        yield changed
    finally:
        put(changed, {path: old})
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])


def output_errors(model: nn.Module, path: str, substitutes: Sequence[nn.Module], batches: Iterable[Any]) -> list[float]:
    """Return for each substitute √(Σ‖y − ŷ‖² / Σ‖y − ȳ‖²): its output ŷ against the layer's own y, on real inputs.

    ȳ is the mean output of each channel. One pass serves all substitutes; the model itself runs untouched. Padding that
    the keyword ``attention_mask`` of a batch names does not count.

    Args:
        model: runs in evaluation mode, without gradients, and is as before afterwards.
        path: of the layer.
        substitutes: modules that take the same inputs as the layer.
        batches: inputs as ``call_model`` takes them, on the device of the model.

    Raises:
        DataError: no batches, or the forward never reaches the layer.

    Example:
        >>> import torch
        >>> model, same = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
        >>> same.load_state_dict(model[0].state_dict())
        <All keys matched successfully>
        >>> output_errors(model, "0", [same], [torch.randn(8, 4)])
        [0.0]
    """
    module = find(model, path)
    missed = [0.0] * len(substitutes)
    power = _Power()
    mask: Tensor | None = None

    def rows(output: Any) -> Tensor:
        return real_tokens(untransformed(next(tensors_in(output))).detach(), mask).double()

    def compare(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        outputs = [substitute(*args, **kwargs) for substitute in substitutes]
        with plain_arithmetic():
            wanted = rows(output)
            power.add(wanted, _channel_axis(module))
            for i, found in enumerate(outputs):
                missed[i] += float((wanted - rows(found)).square().sum())

    handle = module.register_forward_hook(compare, with_kwargs=True, prepend=True)  # hooks of the layer stay with it
    try:
        with evaluating(model), layer_by_layer(), same_random_numbers(device_of(model)):
            for batch in batches:
                mask = token_mask(batch, model)
                call_model(model, batch)
    finally:
        handle.remove()
    total = power.variance()
    return [(value / total) ** 0.5 if total > 0 else float(value > 0) for value in missed]


def _channel_axis(module: nn.Module) -> int:
    """Return the axis of the channels in a layer's output, from the end."""
    return -1 - len(getattr(module, "kernel_size", ()))


class _Power:
    """Running sums for Σ‖y − ȳ‖² per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None
        self.squares = 0.0

    def add(self, output: Tensor, axis: int) -> None:
        rows = output.movedim(axis, -1).flatten(0, -2)
        self.count += len(rows)
        total = rows.sum(0)
        self.sum = total if self.sum is None else self.sum + total
        self.squares += float(rows.square().sum())

    def variance(self) -> float:
        if self.sum is None:
            msg = "there are no calibration batches, or the forward never reaches the layer"
            raise DataError(msg)
        return max(self.squares - float(self.sum.square().sum()) / self.count, 0.0)


def digest_model(model: nn.Module) -> str:
    """Return a text that tells models with other weights, names or dtypes apart.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = digest_model(net)
        >>> _ = nn.init.zeros_(net.weight)
        >>> before == digest_model(net)
        False
    """
    return digest(model.state_dict(), type(model).__name__)


def _samples(batches: Iterable[Any] | None) -> int:
    """Return how many calibration samples there are."""
    if batches is None:
        return 0
    known = getattr(batches, "samples", None)
    return int(known) if known is not None else count_samples(batches)


def _digest_moments(moments: Mapping[str, Moments]) -> str:
    """Return what tells moments by path from all others; an empty text for none."""
    each = [f"{path} {moments[path].digest()}" for path in sorted(moments)]
    return digest({}, "\n".join(each)) if each else ""
