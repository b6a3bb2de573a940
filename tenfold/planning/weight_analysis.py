"""What to keep of a model's weights so that its report can show spectra and errors without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tenfold import __version__
from tenfold.errors import TenfoldError
from tenfold.formats import FORMATS
from tenfold.planning.eligible import EligibleLayer, eligible_layer
from tenfold.planning.error_curves import spectra_of, weight_curve
from tenfold.records import Analysis, CurvePoint, LayerAnalysis, LayerPlan, Plan, Profile, Spectrum

VALUES, POINTS, DIGITS = 48, 24, 4  # so that 200 layers stay far below a megabyte


def analyse(model: nn.Module, profile: Profile, plan: Plan, *, fits: bool = False) -> Analysis:
    """Return spectra and error–cost curves of the layers that a plan factorizes.

    Both are of the weights alone, whatever the plan went by. Layers that cannot be decomposed are left out.

    Args:
        model: before the plan is carried out.
        profile: what ``profile`` said of it.
        plan: what was decided.
        fits: whether layers in formats whose error no spectrum bounds (CP) get a curve too: that of quick fits, which
            take a second per layer.

    Example:
        >>> import torch
        >>> from tenfold.planning import plan
        >>> from tenfold.profiling import profile
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> cost = profile(net, torch.zeros(1, 64))
        >>> found = analyse(net, cost, plan(net, cost, {"rule": "ratio", "budget": "macs=0.5"}))
        >>> [layer.path for layer in found.layers], found.layers[0].spectra["rank"].values[0]
        (['0', '2'], 1.0)
    """
    found = (_layer(model, profile, layer, fits=fits) for layer in plan.factorized)
    return Analysis(tenfold=__version__, layers=tuple(layer for layer in found if layer is not None))


def _layer(model: nn.Module, profile: Profile, layer: LayerPlan, *, fits: bool) -> LayerAnalysis | None:
    format = str(layer.format)
    try:
        known = eligible_layer(model, profile.layer(layer.path), [format])
        weight = known.load_weight()
        spectra = {name: _spectrum(v) for name, v in spectra_of(known, format, weight).items() if len(v)}
        curve = _curve(known, format, weight) if fits or FORMATS.get(format).svd_bounds_error else ()
        return LayerAnalysis(path=layer.path, format=format, spectra=spectra, curve=curve) if spectra else None
    except (KeyError, TenfoldError):  # a picture less is no reason to lose a run
        return None


def _spectrum(numbers: NDArray[np.float64]) -> Spectrum:
    scaled = numbers / (numbers.max(initial=0.0) or 1.0)
    kept = _spread(len(numbers), VALUES)
    return Spectrum(index=tuple(i + 1 for i in kept), values=tuple(_short(scaled[i]) for i in kept))


def _curve(layer: EligibleLayer, format: str, weight: Tensor) -> tuple[CurvePoint, ...]:
    family = FORMATS.get(format).rank_family(layer.spec)
    names = FORMATS.get(format).rank_names
    kept = [(family[i], layer.cost_at(format, family[i])) for i in _spread(len(family), POINTS)]
    squared = weight_curve(layer, format, weight)(np.array([[rank[name] for name in names] for rank, _ in kept]))
    return tuple(
        CurvePoint(rank=dict(rank), cost=cost, error=_short(float(max(lost, 0.0)) ** 0.5))
        for (rank, cost), lost in zip(kept, squared, strict=True)
    )


def _spread(count: int, most: int) -> Sequence[int]:
    """Return at most so many places among ``count``, evenly spread, both ends among them."""
    if count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
