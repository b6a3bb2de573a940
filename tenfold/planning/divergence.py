"""How much errors of each layer matter, measured: what the outputs diverge by where one layer is a little reduced.

The distortion of a layer at all of its options is a curve that its own moments give. What they cannot give exactly is
the height: gradients see the outputs to second order, and one projection of them for each batch. One measurement at
one option of the layer says it (LEMS, "Advancing SVD-based LLM compression via layer-wise error model search", 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from tenfold.allocation import rule_of
from tenfold.decompositions import Decomposition, Moments
from tenfold.formats import FORMATS
from tenfold.planning.single_layer import replaced, substitute
from tenfold.profiling import Original
from tenfold.records import FormatOptions, LayerOptions, OptionTable, UnitOptions
from tenfold.runtime import Runtime
from tenfold.surgery import find
from tenfold.tensors import plain_arithmetic
from tenfold.tracing import copied

BY_DIVERGENCE = "what the network's outputs diverge by, as measured with each layer alone a little reduced"
STEP = "measure divergences"

_REDUCED = 0.9  # of the layer's cost is left where it is measured
_LEAST = 1e-5  # of the median divergence is the least that a layer is taken to have: rounding must make none free
_KEPT = 1 << 30  # bytes of the original's outputs


def by_divergence(
    table: OptionTable,
    model: nn.Module,
    batches: Sequence[Any],
    *,
    moments: Mapping[str, Moments],
    runtime: Runtime | None = None,
) -> OptionTable:
    """Return a table whose distortions are scaled, layer by layer, to measured divergences of the network's outputs.

    Each layer alone takes the best option that removes a tenth of it; the mean KL divergence of the outputs from
    those of the original, or the squared relative error of outputs that are no scores of classes, is what the
    distortion of that option becomes, and all others of the layer with it. The plan's distortion is then a prediction
    in these units. Use it where gradients mislead: outputs that are far from linear in the errors (deep language
    models), few samples, forwards without gradients. It takes a forward of all batches for each layer.

    Args:
        table: whose rule compares distortions; another one is returned as it is.
        model: that the table is of; unchanged.
        batches: inputs that nothing was fitted to, on the device of the model.
        moments: by which the layers are fitted, by path.
        runtime: progress.

    Raises:
        DataError: the outputs cannot be compared.
    """
    if "distortion" not in rule_of(table.recipe.rule).columns:
        return table
    measured = _measured(table, model, batches, moments, runtime or Runtime())
    least = _LEAST * median(divergence for _, divergence in measured.values()) if measured else 0.0
    factors = {path: max(found, least) / told for path, (told, found) in measured.items() if told > 0}
    usual = median(factors.values()) if factors else 1.0
    layers = tuple(_scaled(layer, factors.get(layer.path, usual)) for layer in table.layers)
    units = tuple(_unit_scaled(own, factors.get(own.unit.pivot, usual)) for own in table.units)
    return table.replace(layers=layers, units=units, distortion=BY_DIVERGENCE)


@plain_arithmetic()
def _measured(
    table: OptionTable, model: nn.Module, batches: Sequence[Any], moments: Mapping[str, Moments], runtime: Runtime
) -> dict[str, tuple[float, float]]:
    """Return for each layer with options what its moments predict and what was measured, at the same option."""
    original, twin = Original(model, batches, limit=_KEPT), copied(model)
    chosen = {layer.path: mildest(layer) for layer in table.layers if any(len(own) for own in layer.options)}
    found = {}
    for path, (own, row) in chosen.items():
        algorithm = Decomposition.from_dict(table.algorithms[own.format])
        made = substitute(find(model, path), own.format, own.rank(row), algorithm=algorithm, metric=moments.get(path))
        with replaced(twin, path, made) as changed:
            found[path] = float(own.columns["distortion"][row]), original.agreement(changed).divergence
        runtime.report(STEP, len(found), len(chosen))
    return found


def mildest(layer: LayerOptions) -> tuple[FormatOptions, int]:
    """Return the option at which a layer is measured: the best that is at least a tenth cheaper, else the largest.

    Formats whose factors have a closed form come first: fits of others take long at large ranks.
    """
    what = "params" if layer.before.params else "macs"
    most = _REDUCED * getattr(layer.before, what)

    def order(own: FormatOptions, row: int) -> tuple[bool, bool, float]:
        cost, lost = float(getattr(own, what)[row]), float(own.columns["distortion"][row])
        return FORMATS.get(own.format).svd_bounds_error, cost <= most, -lost if cost <= most else cost

    return max(((own, row) for own in layer.options for row in range(len(own))), key=lambda at: order(*at))


def _scaled(layer: LayerOptions, factor: float) -> LayerOptions:
    return layer.replace(options=tuple(_times(own, factor) for own in layer.options))


def _unit_scaled(unit: UnitOptions, factor: float) -> UnitOptions:
    """Return a unit scaled as its pivot is, by whose moments its distortions are."""
    return unit if unit.options is None else unit.replace(options=_times(unit.options, factor))


def _times(own: FormatOptions, factor: float) -> FormatOptions:
    columns = {name: np.multiply(c, factor) if name == "distortion" else c for name, c in own.columns.items()}
    return own.replace(columns=columns, fuller=None if own.fuller is None else _times(own.fuller, factor))
