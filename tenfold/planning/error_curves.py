"""Error and distortion of a layer as functions of the rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.decompositions import Moments, error_curve
from tenfold.formats import FORMATS
from tenfold.planning.eligible import EligibleLayer
from tenfold.tensors import plain_arithmetic, singular_values

Ranks = NDArray[np.int64]
Curve = Callable[[Ranks], NDArray[np.float64]]

BY_DATA = "what the network's output loses, by the data"
BY_WEIGHT = "relative squared errors of the weights"


@plain_arithmetic()
def spectra_of(layer: EligibleLayer, format: str, weight: Tensor) -> dict[str, NDArray[np.float64]]:
    """Return for each rank name the singular values, descending, of its unfolding, pooled over groups."""
    unfoldings = FORMATS.get(format).unfoldings(weight, layer.spec)
    return {k: singular_values(m).square().sum(0).sqrt().cpu().double().numpy() for k, m in unfoldings.items()}


def weight_curve(layer: EligibleLayer, format: str, weight: Tensor) -> Curve:
    """Return the function from ranks (n, names) to an estimate (n,) of the relative squared error ‖W − Ŵ‖²/‖W‖².

    It is the share of the squares that the unfoldings' spectra lose, at most 1: exact for formats with one unfolding
    (Eckart & Young 1936), an upper bound for Tucker-2, at most twice the optimum (De Lathauwer et al. 2000). Of formats
    whose error no spectrum bounds (CP) it is that of quick fits.
    """
    kind = FORMATS.get(format)
    if not kind.svd_bounds_error:
        return error_curve(weight, layer.spec, kind)
    spectra = spectra_of(layer, format, weight)
    tails = [tail_shares(spectra[name]) for name in kind.rank_names]

    def lost(ranks: Ranks) -> NDArray[np.float64]:
        parts = [tail[np.minimum(ranks[:, k], len(tail) - 1)] for k, tail in enumerate(tails)]
        return np.asarray(np.minimum(np.sum(parts, axis=0), 1.0))

    return lost


def distortion_curve(layer: EligibleLayer, format: str, weight: Tensor) -> Curve:
    """Return the function from ranks (n, names) to what factorizing the layer costs the network (n,).

    By the weights alone it is ``weight_curve``. With output Gram matrices it is tr(G Δ A Δᵀ), the second-order change
    of the loss from which the gradients are, or what that is on samples that were not fitted, where ``held_out`` of the
    moments knows; these add up over layers. With input moments only, it is the share
    E‖y−ŷ‖²/E‖y−ȳ‖² of the output that is missed, every layer as important as any other.
    """
    moments = layer.moments
    if moments is None:
        return weight_curve(layer, format, weight)
    return by_data(error_curve(weight, layer.spec, FORMATS.get(format), moments), moments, weight)


def by_data(curve: Curve, moments: Moments, weight: Tensor) -> Curve:
    """Return the distortion that an error by moments stands for: see ``distortion_curve``."""
    if moments.output_gram is not None:
        held_out = moments.held_out
        return curve if held_out is None else lambda ranks: held_out(curve(ranks))
    flat = weight.detach().double().flatten(2)
    power = float(moments.errors(flat, flat)[1].sum())
    return lambda ranks: curve(ranks) / (power or 1.0)


def tail_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the squares beyond each rank, from 0 on.

    Summed from the far end, where the small ones are: so they are exact.
    """
    scale = values.max(initial=0.0)
    if scale == 0:
        return np.zeros(len(values) + 1)
    squares = (values / scale) ** 2
    tails = np.append(squares[::-1].cumsum()[::-1], 0.0)
    return np.asarray(tails / tails[0])
