"""Carry out a plan front to back, every layer making up for what the compressed ones before it have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tenfold.calibration.collect import collect_moments
from tenfold.calibration.moment_sums import MomentSums, sketch_rows
from tenfold.calibration.shares import Share, over_all, together_of
from tenfold.decompositions import Decomposition, Moments, Sketch, algorithm_for, default_algorithm, fit_layer
from tenfold.decompositions.covariance import Covariance, is_tall
from tenfold.decompositions.dense_inputs import DenseInputs
from tenfold.errors import CalibrationWarning, DataError, naming_layer, warn
from tenfold.formats import split_groups
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.progress import counter
from tenfold.records import LayerPlan, LayerSpec, Plan
from tenfold.surgery.apply import FIT_LAYERS, apply, apply_
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.surgery.config_note import note_in_config_
from tenfold.surgery.fuse_batchnorm import check_pairs, fuse_pairs_
from tenfold.surgery.modules import find, put
from tenfold.surgery.narrow import absorb_, check_units
from tenfold.surgery.replacement import check_planned, factorizable_spec, geometry, layer_of, refuse_tied
from tenfold.surgery.separate import separate
from tenfold.surgery.shortcut_correction import Branch, branch_of, targets
from tenfold.tensors import normal_tensors
from tenfold.tensors.free_memory import give_back
from tenfold.tracing.masks import token_mask
from tenfold.tracing.repeated_runs import Forward
from tenfold.tracing.replay import Replay
from tenfold.tracing.samples import count_samples

Progress = Callable[[int, int], None]

_OTHER_ROWS = "it sees other rows than in the original"
_FEW = 0.1  # ridge where there is a row for each unknown


@dataclass(frozen=True)
class SequentialFit:
    """How layers are fitted one after the other.

    Attributes:
        positions: output positions read from each map of a convolution and batch; None for all.
        ridge: draws the weights to the dense ones where the data say little, as a share of the mean variance; of
            algorithms that the plan does not name. Few rows get more than that in any case.
        correct_shortcuts: let layers at the end of a residual branch make up for their shortcuts.
        seed: of the draw of positions.
        max_width: inputs wider than this are sketched, see ``moment_bytes``; 8192 by default.
        max_cache: bytes of activations that are held of each of the two models; beyond that they are computed again.
        forward: runs the model on one batch; ``call_model`` by default.
        before: how many layers of the network were fitted before, where the model is one block of it.
    """

    positions: int | None = 64
    ridge: float = 1e-4
    correct_shortcuts: bool = True
    seed: int = 0
    max_width: int | None = None
    max_cache: int = 4 << 30
    forward: Forward | None = None
    before: int = 0


@normal_tensors()
def apply_sequentially(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    *,
    target: nn.Module | None = None,
    entered: Sequence[Any] | None = None,
    output_grams: Mapping[str, Covariance] | None = None,
    config: SequentialFit | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Return a new model in which the plan is carried out front to back, fitted to unlabeled batches; no training.

    Each layer is fitted in closed form to what the layer of ``model`` puts out, given what now enters it from the
    layers compressed before (asymmetric reconstruction: Zhang et al. 2015, arXiv 1505.06798). So errors do not pile up.
    The shift of its mean goes into the bias, or into the mean of the batch norm that alone follows; the other
    statistics of batch norms stay, because the outputs are drawn to those of the dense model. Embeddings come first,
    each on its own: what they look up is the same in both models, and how often, so there is nothing to make up for.

    Where the output of a layer, or of the batch norm after it, is added to a shortcut, the sum is what is fitted: the
    layer also makes up for what the shortcut has lost in the blocks before.

    All this takes for granted that a row is the same one in both models. So both draw the same random numbers, and the
    new one decides as the dense one does where rows are selected: routed to experts, sorted, dropped. A layer that sees
    other rows nevertheless is fitted on its own, by the moments of its inputs in the dense model; ``fit.alone`` of the
    layer says why.

    Args:
        model: the dense model, or one that is factorized in part; stays as it is.
        plan: which layers to factorize, into what, at which rank.
        batches: unlabeled inputs as ``call_model`` takes them, on the device of the model. They are gone through many
            times: a list, not an iterator.
        target: whose outputs are to be met, where ``model`` was compressed from it before: a model with layers of the
            same shapes at the same paths. ``model`` itself if None.
        entered: what enters the target in place of ``batches``, as in the original of a network of which ``model`` is
            one block, behind others that are compressed already; the same batches if None.
        output_grams: output Gram matrices by path, which weigh the errors of a layer's outputs: see
            ``Moments.output_gram``.
        config: how layers are fitted.
        progress: called with (layers done, layers in all); they are logged if None.

    Raises:
        PlanError: a layer of the plan is not in the model, or cannot be factorized as the plan says.
        DataError: no batches, or a layer that the forward never reaches.

    Warns:
        CalibrationWarning: layers were fitted on their own.
    """
    if not isinstance(batches, Sequence) or not batches:
        msg = "the calibration batches are gone through many times: pass a list with at least one batch"
        raise DataError(msg)
    config, progress = config or SequentialFit(), progress or counter(FIT_LAYERS)
    model = separate(model, plan.unrolled)
    _check(model, plan)
    blind = tuple(layer for layer in plan.factorized if _looks_up(find(model, layer.path)))
    original = model if target is None else separate(target, plan.unrolled)
    new = _with_looked_up(model, plan.replace(layers=blind, fused={}, units=()), batches, output_grams or {}, config)
    forward, limit, entered = config.forward, config.max_cache, batches if entered is None else entered
    dense = Replay(original, entered, forward=forward, limit=limit, changing=False, seed=config.seed)
    changing = Replay(new, batches, forward=forward, limit=limit, like=dense)
    fitting = _Fitting(model, plan, new, dense, changing, batches, entered, output_grams or {}, config)
    wanted = [layer for layer in plan.factorized if layer not in blind]
    for done, layer in enumerate(sorted(wanted, key=lambda layer: changing.start(layer.path))):
        fitting.fit(layer, config.before + done)
        progress(done + 1, len(wanted))
    if fitting.alone:
        path, why = next(iter(fitting.alone.items()))
        msg = (
            f"{len(fitting.alone)} of {len(wanted)} layers are fitted each on its own, not in order, for instance "
            f"{path!r}: {why}"
        )
        warn(msg, CalibrationWarning)
    pivots = {unit.pivot: find(model, unit.pivot) for unit in plan.narrowed}
    return note_in_config_(fuse_pairs_(absorb_(fitting.new, plan, pivots), plan.fused))


class _UnlikeError(Exception):
    """The rows that a layer sees in the new model are not those of the dense one."""


@dataclass
class _Fitting:
    """Puts the layers of a plan into ``new``, one after the other; ``alone`` are those that do not follow the others.

    ``source`` has the layers that are replaced, ``dense`` what is to be met, ``changing`` is the replay of ``new``.
    """

    source: nn.Module
    plan: Plan
    new: nn.Module
    dense: Replay
    changing: Replay
    batches: Sequence[Any]
    entered: Sequence[Any]
    output_grams: Mapping[str, Covariance]
    config: SequentialFit
    alone: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _samples(self) -> int:
        """How many samples the batches of all processes hold, which may lie on the disk."""
        return over_all(self.batches, count_samples(self.batches))

    def fit(self, layer: LayerPlan, number: int) -> None:
        """Fit a layer to the rows of the new model, or of the dense one where these are others."""
        try:
            self._follow(layer, number)
        except (_UnlikeError, DataError) as why:  # the latter where a batch takes another way unseen
            self.alone[layer.path] = str(why)
            self._fit_alone(layer, str(why))

    def _follow(self, layer: LayerPlan, number: int) -> None:
        path, old = layer.path, find(self.source, layer.path)
        spec, weight = geometry(old, path)
        branch = branch_of(self.new, self.changing, path) if self.config.correct_shortcuts else None
        bias = getattr(old, "bias", None)
        if branch is None and self._follows_from_inputs(spec, weight):
            metric = self._moments_of_inputs(path, spec)
        else:
            metric = self._moments(path, spec, branch, bias, number)
        follower = self.changing.follower(path)
        norm: Any = None if follower is None else self.new.get_submodule(follower)
        if bias is None and not _takes_mean(norm):
            metric = metric.uncentered()  # nothing could take the shift of the mean
        gram = self.output_grams.get(path)
        if gram is None and branch is not None:
            gram = branch.importance(spec)
        metric = metric.replace(output_gram=gram)
        give_back()
        with naming_layer(path):
            few = _ridge_of_few(metric, self._samples)
            algorithm = _algorithm(layer, self.config.ridge, few, self.plan.seed)
            fit = fit_layer(weight, str(layer.format), layer.rank or {}, algorithm, spec=spec, moments=metric)
        if bias is None and fit.bias_shift is not None and _takes_mean(norm):
            norm.running_mean.sub_(fit.bias_shift.to(norm.running_mean))
        self.new = put(self.new, {path: layer_of(fit, old, algorithm)})

    def _moments(self, path: str, spec: LayerSpec, branch: Branch | None, bias: Tensor | None, number: int) -> Moments:
        """Return the moments of what enters the layer now, beside its outputs in the dense model."""
        config = self.config
        sums = MomentSums(config.max_width, config.seed)

        def add() -> None:
            pairs = targets(self.dense, self.changing, path, branch)
            for i, (place, (x, y)) in enumerate(zip(self._places(path), pairs, strict=True)):
                if spec.out_shape(tuple(x.shape)) != tuple(y.shape):
                    raise _UnlikeError(_OTHER_ROWS)
                wanted = y if bias is None else y - bias.detach().view(-1, *[1] * spec.axes)
                step = self.batches.places[place] if isinstance(self.batches, Share) else i
                drawn = config.seed * 1_000_003 + number * 1009 + step
                mask = token_mask(self.batches[place], self.source)
                sums.add(x, spec, wanted, positions=config.positions, seed=drawn, mask=mask)

        self._summed(add, {sums: spec})
        return sums.moments(path)

    def _follows_from_inputs(self, spec: LayerSpec, weight: Tensor) -> bool:
        """Whether outputs are W x and so many that they had better not be computed."""
        tall = spec.kind == "linear" and is_tall(split_groups(weight, spec).flatten(2))
        return tall and self.dense.model is self.source and sketch_rows(spec, self.config.max_width) is None

    def _moments_of_inputs(self, path: str, spec: LayerSpec) -> Moments:
        """Return the moments of what enters the layer now, beside what enters it in the dense model."""
        sums, before = (MomentSums(self.config.max_width, self.config.seed) for _ in range(2))
        square = spec.replace(out_channels=spec.in_channels)

        def add() -> None:
            pairs = zip(self.changing.inputs(path), self.dense.inputs(path), strict=True)
            for place, (x, other) in zip(self._places(path), pairs, strict=True):
                if x.shape != other.shape:
                    raise _UnlikeError(_OTHER_ROWS)
                mask = token_mask(self.batches[place], self.source)
                sums.add(x, square, other, mask=mask)
                before.add(other, square, mask=mask)

        self._summed(add, {sums: square, before: square})
        found, own = sums.moments(path), before.moments(path)
        if found.cross is None or isinstance(own.input_second_moment, Sketch):
            msg = "inputs that are sketched have no cross moments"
            raise DataError(msg)
        known = DenseInputs(own.input_second_moment, own.mean, found.cross)
        return found.replace(cross=None, target_mean=None, target_power=None, before=known)

    def _summed(self, add: Callable[[], None], sums: Mapping[MomentSums, LayerSpec]) -> None:
        """Add the rows of this process to the sums, and those of the others; raise what any of them raises."""
        together = together_of(self.batches)
        if together is None:
            add()
            return
        try:
            add()
            failed = None
        except (_UnlikeError, DataError) as error:
            failed = str(error)
        for why in together.everyones(failed):
            if why is not None:
                raise _UnlikeError(why)
        for own, spec in sums.items():
            own.gather(together, spec)

    def _places(self, path: str) -> list[int]:
        """Return the batches that reach a layer, in both models alike."""
        lost = [decisions.adrift[path] for decisions in self.dense.decisions if path in decisions.adrift]
        if lost:
            raise _UnlikeError(lost[0])
        places = self.changing.places(path)
        if not places or places != self.dense.places(path):
            msg = "the batches reach it otherwise than in the original"
            raise _UnlikeError(msg)
        return places

    def _fit_alone(self, layer: LayerPlan, why: str) -> None:
        path, dense = layer.path, self.dense.model
        specs = {path: factorizable_spec(find(dense, path), path)}
        own = _dense_moments(dense, specs, self.entered, self.config)[path]
        metric = own.replace(output_gram=self.output_grams.get(path))
        self.new = apply_(self.new, self.plan.replace(layers=(layer,), fused={}, units=()), moments={path: metric})
        fitted: Any = find(self.new, path)
        fitted.fit = replace(fitted.fit, alone=why)


def _check(model: nn.Module, plan: Plan) -> None:
    for layer in plan.layers:
        find(model, layer.path)
    check_pairs(model, plan.fused)
    check_units(model, plan)
    refuse_tied(model, plan.factorized)
    for layer in plan.factorized:
        check_planned(layer, factorizable_spec(find(model, layer.path), layer.path))


def _looks_up(module: nn.Module) -> bool:
    """Whether a layer takes indices."""
    spec = module.spec if isinstance(module, FactorizedLayer) else spec_of(module)[0]
    return spec is not None and spec.kind == "embedding"


def _dense_moments(
    model: nn.Module, specs: Mapping[str, LayerSpec], batches: Sequence[Any], config: SequentialFit
) -> dict[str, Moments]:
    if not specs:
        return {}
    positions, widest = config.positions, config.max_width
    return collect_moments(
        model, batches, specs, positions=positions, seed=config.seed, widest=widest, forward=config.forward
    )


def _with_looked_up(
    model: nn.Module, plan: Plan, batches: Sequence[Any], outputs: Mapping[str, Covariance], config: SequentialFit
) -> nn.Module:
    """Return a new model with the embeddings of the plan in place, each row fitted as it is asked for."""
    specs = {layer.path: factorizable_spec(find(model, layer.path), layer.path) for layer in plan.layers}
    found = _dense_moments(model, specs, batches, config)
    return apply(model, plan, moments={path: own.replace(output_gram=outputs.get(path)) for path, own in found.items()})


def _takes_mean(norm: nn.Module | None) -> bool:
    return isinstance(norm, BATCH_NORMS) and norm.running_mean is not None


def _algorithm(layer: LayerPlan, ridge: float, few: float, seed: int) -> Decomposition:
    """Return the algorithm of a layer: the one that its plan names, unless another of the format knows the data.

    ``ridge`` is that of algorithms which the plan does not name, ``few`` the least of any.
    """
    given = algorithm_for(str(layer.format), layer.algorithm or None, seed, data_aware=True)
    if not (given.uses_covariance and layer.algorithm):
        aware = default_algorithm(str(layer.format), seed, data_aware=True)
        if not aware.uses_covariance:
            return given
        given = aware.with_settings({"ridge": ridge})
    return given.with_settings({"ridge": max(given.covariance_ridge, few)})


def _ridge_of_few(metric: Moments, samples: int) -> float:
    """Return the ridge that few rows need, which draws the fit to the dense weight.

    A regression on about as many rows as it has unknowns follows their noise, and errs more the nearer it is to fitting
    them all; on many rows this is below any ridge that is used. Rows of one sample resemble each other: n of them count
    as √n.
    """
    rows = min(samples, metric.count) * max(metric.count / samples, 1.0) ** 0.5
    return float(_FEW * min(1.0, metric.width / rows) ** 2)
