"""What factorizing a layer costs the network, predicted from unlabeled data, on one scale for all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tenfold.decompositions import Moments, error_curve
from tenfold.errors import PlanError
from tenfold.formats import FORMATS
from tenfold.ranks import RankProblem

Curve = Callable[[NDArray[np.int64]], NDArray[np.float64]]


def with_damage(problems: Sequence[RankProblem], moments: Mapping[str, Moments]) -> list[RankProblem]:
    """Return the problems, told what each format and rank would do to the network.

    With gradients in ``Moments.output_gram`` the damage is tr(G Δ C Δᵀ), the second-order change of the loss from which
    the gradients are; these add up over layers. Without them it is the share E‖y−ŷ‖²/E‖y−ȳ‖² of the output that is
    missed, every layer as important as any other.

    Args:
        problems: of the layers to decide on.
        moments: of the inputs of all these layers, by path.

    Raises:
        PlanError: a layer without moments, or gradients for some layers only.
    """
    missing = [p.path for p in problems if p.path not in moments]
    if missing:
        msg = (
            f"there are no moments of layer {missing[0]!r} ({len(missing)} in all): collect them, or keep these layers"
        )
        raise PlanError(msg)
    if len({moments[p.path].output_gram is None for p in problems}) > 1:
        msg = "some moments know what the network minds and some do not: their damages are not on one scale"
        raise PlanError(msg)
    return [dataclasses.replace(p, damage_at=_damage_at(p, moments[p.path]), metric=moments[p.path]) for p in problems]


def _damage_at(problem: RankProblem, moments: Moments) -> Callable[[str], Curve]:
    # With the problem's spectra, so that plans made anew for the same weights and data do not fit the curves again.
    known = known_curves(problem, moments)

    def damage_at(format: str) -> Curve:
        if format not in known:
            known[format] = layer_curve(problem, format, moments)
        return known[format]

    return damage_at


def known_curves(problem: RankProblem, moments: Moments) -> dict[str, Curve]:
    """Return the curves that a problem remembers, by format, to look up and to add to: those under these very moments.

    The moments are remembered with them. Their id alone would not do: others may have it once these are gone.
    """
    cache = problem._cache  # noqa: SLF001 - the memory of a problem is for those who plan
    of, curves = cache.get("damage", (None, {}))
    if of is not moments:
        curves = {}
        cache["damage"] = (moments, curves)
    return curves  # type: ignore[no-any-return]


def layer_curve(problem: RankProblem, format: str, moments: Moments) -> Curve:
    """Return the function from ranks (n, names) to the damage (n,) of a layer; see ``with_damage``."""
    weight = problem.load_weight()
    curve = error_curve(weight, problem.spec, FORMATS.get(format), moments)
    if moments.output_gram is not None:
        return curve
    flat = weight.detach().double().flatten(2)
    power = float(moments.errors(flat, flat)[1].sum())
    return lambda ranks: curve(ranks) / (power or 1.0)
