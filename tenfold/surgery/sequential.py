"""Carry out a plan front to back, every layer making up for what the compressed ones before it have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tenfold.calibration.collect import collect_moments
from tenfold.calibration.moment_sums import MomentSums
from tenfold.decompositions import Decomposition, Moments, algorithm_for, default_algorithm, fit_layer
from tenfold.errors import DataError, naming_layer
from tenfold.layers import FactorizedLayer, spec_of
from tenfold.records import LayerPlan, Plan
from tenfold.surgery.apply import apply
from tenfold.surgery.batchnorm import BATCH_NORMS
from tenfold.surgery.fuse_batchnorm import check_pairs, fuse_pairs_
from tenfold.surgery.modules import find, put
from tenfold.surgery.replacement import check_planned, factorizable_spec, geometry, layer_of, refuse_tied
from tenfold.surgery.shortcut_correction import branch_of, targets
from tenfold.surgery.unroll_rnn import unroll_rnns
from tenfold.tracing.inputs import token_mask
from tenfold.tracing.replay import Forward, Replay
from tenfold.tracing.samples import count_samples

Progress = Callable[[int, int], None]

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
        forward: runs the model on one batch; ``call_model`` by default.
    """

    positions: int | None = 64
    ridge: float = 1e-4
    correct_shortcuts: bool = True
    seed: int = 0
    max_width: int | None = None
    forward: Forward | None = None


def apply_sequentially(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    *,
    target: nn.Module | None = None,
    output_grams: Mapping[str, Tensor] | None = None,
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

    Args:
        model: the dense model, or one that is factorized in part; stays as it is.
        plan: which layers to factorize, into what, at which rank.
        batches: unlabeled inputs as ``call_model`` takes them, on the device of the model. They are gone through many
            times: a list, not an iterator.
        target: whose outputs are to be met, where ``model`` was compressed from it before: a model with layers of the
            same shapes at the same paths. ``model`` itself if None.
        output_grams: output Gram matrices by path, which weigh the errors of a layer's outputs: see
            ``Moments.output_gram``.
        config: how layers are fitted.
        progress: called with (layers done, layers in all).

    Raises:
        PlanError: a layer of the plan is not in the model, or cannot be factorized as the plan says.
        DataError: no batches, or a layer that the forward never reaches.
    """
    if not isinstance(batches, Sequence) or not batches:
        msg = "the calibration batches are gone through many times: pass a list with at least one batch"
        raise DataError(msg)
    config = config or SequentialFit()
    model = unroll_rnns(model, plan.unrolled)
    _check(model, plan)
    blind = tuple(layer for layer in plan.factorized if _looks_up(find(model, layer.path)))
    original = model if target is None else unroll_rnns(target, plan.unrolled)
    dense, new = (
        Replay(original, batches, forward=config.forward, changing=False),
        _with_looked_up(model, plan.replace(layers=blind, fused={}), batches, output_grams or {}, config.forward),
    )
    changing = Replay(new, batches, forward=config.forward)
    wanted = {layer.path: layer for layer in plan.factorized if layer not in blind}
    ordered, samples = sorted(wanted, key=changing.start), count_samples(batches)
    for done, path in enumerate(ordered):
        old: Any = find(model, path)
        (spec, weight), bias = geometry(old, path), getattr(old, "bias", None)
        branch = branch_of(new, changing.trace, path) if config.correct_shortcuts else None
        if changing.trace.calls[path] == 1:
            sums = MomentSums(config.max_width, config.seed)
            for i, (x, y) in enumerate(targets(dense, changing, path, branch)):
                wanted_output = y if bias is None else y - bias.detach().view(-1, *[1] * spec.axes)
                drawn = config.seed * 1_000_003 + done * 1009 + i
                sums.add(x, spec, wanted_output, positions=config.positions, seed=drawn, mask=token_mask(batches[i]))
            metric = sums.moments(path)
        else:  # it runs several times: what enters it depends on itself
            own = {path: spec}
            metric = collect_moments(
                new,
                batches,
                own,
                dense=original,
                positions=config.positions,
                seed=config.seed,
                widest=config.max_width,
                forward=config.forward,
            )[path]
        follower = changing.trace.follower(path)
        norm: Any = None if follower is None else new.get_submodule(follower)
        if bias is None and not _takes_mean(norm):
            metric = metric.uncentered()  # nothing could take the shift of the mean
        gram = (output_grams or {}).get(path)
        if gram is None and branch is not None:
            gram = branch.importance(spec)
        metric = metric.replace(output_gram=gram)
        with naming_layer(path):
            algorithm = _algorithm(wanted[path], config.ridge, _ridge_of_few(metric, samples), plan.seed)
            rank = wanted[path].rank or {}
            fit = fit_layer(weight, str(wanted[path].format), rank, algorithm, spec=spec, moments=metric)
        if bias is None and fit.bias_shift is not None and _takes_mean(norm):
            norm.running_mean.sub_(fit.bias_shift.to(norm.running_mean))
        new = put(new, {path: layer_of(fit, old, algorithm)})
        if progress is not None:
            progress(done + 1, len(ordered))
    return fuse_pairs_(new, plan.fused)


def _check(model: nn.Module, plan: Plan) -> None:
    for layer in plan.layers:
        find(model, layer.path)
    check_pairs(model, plan.fused)
    refuse_tied(model, plan.factorized)
    for layer in plan.factorized:
        check_planned(layer, factorizable_spec(find(model, layer.path), layer.path))


def _looks_up(module: nn.Module) -> bool:
    """Whether a layer takes indices."""
    spec = module.spec if isinstance(module, FactorizedLayer) else spec_of(module)[0]
    return spec is not None and spec.kind == "embedding"


def _with_looked_up(
    model: nn.Module, plan: Plan, batches: Sequence[Any], outputs: Mapping[str, Tensor], forward: Forward | None
) -> nn.Module:
    """Return a new model with the embeddings of the plan in place, each row fitted as it is asked for."""
    specs = {layer.path: factorizable_spec(find(model, layer.path), layer.path) for layer in plan.layers}
    found = collect_moments(model, batches, specs, forward=forward) if specs else {}
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
