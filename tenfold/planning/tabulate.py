"""From a profile to an option table: what each layer could become, measured once; layer by layer, by workers if any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tenfold import __version__
from tenfold.allocation import RankRule, rule_of
from tenfold.allocation.rules.threshold import ErrorBound
from tenfold.decompositions import Moments, algorithm_for
from tenfold.errors import DataError, PlanError
from tenfold.files import check_writable
from tenfold.formats import FORMATS, Factorization
from tenfold.layers import is_quantized
from tenfold.planning.eligible import EligibleLayer, costs_of, eligible_layer, kept_reasons
from tenfold.planning.error_curves import BY_DATA, Curve
from tenfold.planning.error_curves import BY_WEIGHT as WEIGHT_ERRORS
from tenfold.planning.error_search import Errors, ErrorSearch
from tenfold.planning.rows import in_steps, liked_step, rows_of, without_idle_factors
from tenfold.planning.rule_columns import BY_WEIGHT, Scores, score_columns
from tenfold.planning.target import Target
from tenfold.planning.timing import Timing
from tenfold.planning.unit_options import unit_options
from tenfold.records import (
    FormatOptions,
    LayerOptions,
    LayerProfile,
    OptionTable,
    Profile,
    Recipe,
    chain_buffer_bytes,
)
from tenfold.records.store import JsonCache
from tenfold.runtime import Runtime
from tenfold.surgery import find, separated
from tenfold.tensors import plain_arithmetic

BY_SCORES = "what the score loses with each layer factorized alone, as measured"
STEP = "weigh options"


def tabulate(
    model: nn.Module,
    profile: Profile,
    recipe: Recipe | Mapping[str, Any] | str,
    *,
    moments: Mapping[str, Moments] | None = None,
    scores: Scores | None = None,
    timing: Timing | None = None,
    target: Target | None = None,
    runtime: Runtime | None = None,
) -> OptionTable:
    """Return what each layer of a model could become, at what cost, time and distortion; ``choose`` makes plans of it.

    This is all of planning that needs the model. Use it to try many budgets, or to keep what a plan was chosen from.

    Args:
        model: the model that was profiled; it may hold factorized layers, which can be compressed further.
        profile: what ``profile`` said of it.
        recipe: which formats and layers, and the rule whose rows and columns are wanted.
        moments: statistics of the layers' inputs, by path (see ``calibrate``): distortion is then what the network's
            output loses instead of what the weights lose, and the algorithms are those that know the data.
        scores: of the model with one layer replaced, which distortion is then measured by: a ``Sensitivity``.
        timing: how long the model and its layers take, for budgets of latency.
        target: the runtime whose ranks and formats are wanted.
        runtime: workers and progress.

    Raises:
        UnknownNameError: a format or a pattern that names nothing.
        PlanError: a layer without values, or output Gram matrices for some layers only.
        BudgetError: the rule needs scores and there are none.

    Example:
        >>> import torch
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> table = tabulate(net, profile(net, torch.zeros(1, 64)), {"formats": "low_rank"})
        >>> table.layers[0].path, table.layers[0].of("low_rank").ranks[:3].ravel().tolist()
        ('0', [4, 8, 12])
    """
    recipe, runtime = Recipe.of(recipe), runtime or Runtime()
    rule = rule_of(recipe.rule)
    kept = kept_reasons(model, profile, recipe, moments)
    if target is not None:
        kept |= {path: reason for path, reason in target.kept(recipe.formats).items() if not kept[path]}
    layers = [
        eligible_layer(model, layer, recipe.formats, None if moments is None else moments[layer.path], target)
        for layer in profile.layers
        if not kept[layer.path]
    ]
    if len({layer.moments.output_gram is None for layer in layers if layer.moments is not None}) > 1:
        msg = "some moments have output Gram matrices and some do not: their distortions are not on one scale"
        raise PlanError(msg)
    options = _weighed(layers, rule, scores, runtime)
    used = dict.fromkeys(own.format for every in options.values() for own in every)
    table = OptionTable(
        tenfold=__version__,
        model=profile.model,
        recipe=recipe,
        before=profile.cost,
        bytes=profile.bytes,
        layers=tuple(
            _layer(model, layer, kept[layer.path], options.get(layer.path, ()))
            for layer in profile.layers
            if layer.spec is not None or layer.params or layer.macs or is_quantized(find(model, layer.path))
        ),
        distortion=BY_SCORES if scores is not None else WEIGHT_ERRORS if moments is None else BY_DATA,
        algorithms={
            f: algorithm_for(f, recipe.algorithms.get(f), recipe.seed, data_aware=moments is not None).to_dict()
            for f in used
        },
        unrolled=separated(model),
        units=() if scores is not None else unit_options(model, profile, recipe, moments, target),
    )
    return table if timing is None else timing.time(table)


def _layer(model: nn.Module, layer: LayerProfile, reason: str, options: Sequence[FormatOptions]) -> LayerOptions:
    weights = (p.element_size() for p in find(model, layer.path).parameters() if p.is_floating_point())
    return LayerOptions(
        path=layer.path,
        aliases=layer.aliases,
        kind=str(layer.spec) if layer.spec is not None else layer.kind,
        before=layer.cost,
        itemsize=next(weights, 4),
        format=layer.format,
        rank=layer.rank,
        keep_reason=reason or None,
        options=tuple(options),
    )


@dataclass(frozen=True)
class _Work:
    """What all layers share: the rule, which of its columns scores fill, and the errors of earlier searches."""

    rule: RankRule
    by_scores: bool
    known: dict[str, Errors] = field(default_factory=dict)


def _weighed(
    layers: Sequence[EligibleLayer], rule: RankRule, scores: Scores | None, runtime: Runtime
) -> dict[str, list[FormatOptions]]:
    cache = None
    if runtime.cache is not None and "fitted_error" in rule.columns:
        check_writable(Path(runtime.cache))
        cache = JsonCache(Path(runtime.cache), {"version": 1, "what": "errors of trial fits"})
    work = _Work(rule, scores is not None, {} if cache is None else _known_errors(cache))
    pieces = layers if runtime.workers.is_local else [_alone(layer) for layer in layers]
    options: dict[str, list[FormatOptions]] = {}
    count = runtime.counter(STEP)
    for layer, (own, errors) in zip(layers, runtime.workers.map(_options, work, pieces), strict=True):
        options[layer.path] = own
        count(len(options), len(layers))
        if cache is not None and errors:
            cache.add(errors)
    ranks = {path: {o.format: o.ranks for o in own} for path, own in options.items()}
    measured = score_columns(rule.columns, ranks, rule, scores)
    return {
        path: [
            o.replace(columns={**o.columns, **measured[path][o.format]}) if measured[path][o.format] else o for o in own
        ]
        for path, own in options.items()
    }


def _with_fuller(layer: EligibleLayer, own: FormatOptions, curves: Mapping[str, Curve]) -> FormatOptions:
    """Return options with those that a plan takes instead of others."""
    ranks, becomes, notes = without_idle_factors(layer, own.format, own.ranks)
    step = liked_step(layer)
    liked = "" if step is None else f"; {layer.likes} works in blocks of {step} channels"
    notes = {row: notes.get(row, "") + liked for row in (range(len(own)) if step else notes)}
    if not becomes:
        return own.replace(notes=notes)
    columns = {name: curve(ranks) for name, curve in curves.items()}
    return own.replace(fuller=_costed(layer, own.format, ranks, columns), becomes=becomes, notes=notes)


def _costed(layer: EligibleLayer, format: str, ranks: Any, columns: Mapping[str, Any]) -> FormatOptions:
    params, macs = costs_of(layer, format, ranks)
    kind = FORMATS.get(format)
    columns = dict(columns)
    buffers = _buffer_bytes(layer, kind, ranks)
    if any(buffers):
        columns["buffer_bytes"] = np.array(buffers, dtype=np.float64)
    return FormatOptions(format=format, names=kind.rank_names, ranks=ranks, params=params, macs=macs, columns=columns)


def _buffer_bytes(layer: EligibleLayer, kind: type[Factorization], ranks: Any) -> list[int]:
    """Return what options store beside their parameters; nothing, if the coarsest has nothing."""
    found: list[int] = []
    for rank in ranks.tolist():
        chain = kind.structure(layer.spec, dict(zip(kind.rank_names, rank, strict=True)))
        found.append(chain_buffer_bytes(chain))
        if not any(found):
            break
    return found


def _known_errors(cache: JsonCache) -> dict[str, Errors]:
    """Return the errors of earlier trial fits, by key and rank: a search that was interrupted goes on there."""
    try:
        return {key: {r: float(e) for r, e in own.items()} for key, own in cache.load().items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        msg = f"{cache.path} is not a table of errors by rank: {error}. Choose another file, or delete this one."
        raise DataError(msg) from error


def _alone(layer: EligibleLayer) -> EligibleLayer:
    """Return a layer that holds its own weight and not the model, to be sent to a worker."""
    weight = layer.load_weight().detach().clone()
    return replace(layer, load_weight=lambda: weight)


@plain_arithmetic()
def _options(work: _Work, layer: EligibleLayer) -> tuple[list[FormatOptions], dict[str, Errors]]:
    """Return the options of a layer in every format, and the errors that a search found."""
    weight, rule = layer.load_weight(), work.rule
    rows = {format: rows_of(layer, format, weight, rule) for format in layer.formats}
    if not rule.by_name:
        rows = {format: (in_steps(layer, format, ranks), known) for format, (ranks, known) in rows.items()}
    search = ErrorSearch(layer, weight, rule, work.known) if isinstance(rule, ErrorBound) else None
    fitted = search.errors({f: own[0] for f, own in rows.items()}) if search and "fitted_error" in rule.columns else {}
    options = []
    for format, (ranks, given) in rows.items():
        computed = [] if work.by_scores or not len(ranks) else [name for name in rule.columns if name in BY_WEIGHT]
        curves = {name: BY_WEIGHT[name](layer, format, weight) for name in computed}
        columns = {**given, **{name: curve(ranks) for name, curve in curves.items()}}
        if not len(ranks):
            columns = dict.fromkeys(rule.columns, np.zeros(0)) | columns
        if fitted:
            columns["fitted_error"] = fitted[format]
        own = _costed(layer, format, ranks, columns)
        # Ranks that somebody gave by hand stay as they are.
        options.append(own if rule.by_name else _with_fuller(layer, own, curves))
    return options, {} if search is None else search.new
