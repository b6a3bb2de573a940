"""Warnings where an outcome is not what was hoped for: slower, later than planned, or no longer the same model."""

from __future__ import annotations

from torch import nn

from tenfold.errors import AgreementWarning, warn
from tenfold.planning.latency_budget import FastPlan
from tenfold.profiling import Comparison
from tenfold.records import Agreement, Recipe
from tenfold.surgery.batchnorm import BATCH_NORMS


def warn_if_late(fast: FastPlan, times: Comparison) -> None:
    """Warn where the finished model measures slower than the plan did when it met its budget."""
    found, planned = times.speedups["after"], fast.speedup
    if doubt := found.in_doubt or planned.in_doubt:
        msg = f"whether the latency budget is met is in doubt: the speed-up is {doubt}. Measure again."
        warn(msg)
    elif not fast.met or found.high < planned.low:
        msg = (
            f"the model measures {found.ratio:.2f} times faster ({found.low:.2f} to {found.high:.2f}), planned were "
            f"{planned.ratio:.2f}: the latency budget is {'missed' if not fast.met else 'in doubt'}. Measure again on "
            "a quiet machine, or lower the budget."
        )
        warn(msg)


def warn_if_low(agreed: Agreement, fitted: int, *, tuned: bool) -> None:
    """Warn where a compressed model no longer does what the original does, or where the outputs cannot tell.

    Args:
        agreed: as measured.
        fitted: number of samples that it was fitted to.
        tuned: whether it has been trained since.
    """
    if agreed.is_equal:
        msg = (
            f"the outputs equal the original's to the last bit on {agreed.where()}: they do not depend on what was "
            "changed, which says nothing of its quality. Random weights do that, whose signal fades on its way, and "
            "inputs that a model does not take apart. Load trained weights, and data of its kind."
        )
        warn(msg, AgreementWarning)
    if not agreed.is_low or not agreed.can_be_judged:
        return
    what = (
        f"is {agreed.relative_error:.0%} off the original's outputs"
        if agreed.top1 is None
        else f"decides as the original does for only {agreed.top1:.0%}"
    )
    ways = [f"more data ({fitted} samples were fitted to)", "a higher budget"]
    ways.append("longer training" if tuned else "training it: tune=")
    msg = f"the compressed model {what} on {agreed.where()}. What helps: {', '.join(ways[:-1])}, or {ways[-1]}."
    warn(msg, AgreementWarning)


def warn_without_data(model: nn.Module) -> None:
    """Warn where weights alone say little: statistics of batch norms no longer fit, and depthwise layers lose most."""
    modules = list(model.modules())
    norms = sum(isinstance(m, BATCH_NORMS) for m in modules)
    depthwise = sum(getattr(m, "groups", 1) == getattr(m, "in_channels", 0) > 1 for m in modules)
    found = [_counted(norms, "batch norm")] * bool(norms) + [_counted(depthwise, "depthwise layer")] * bool(depthwise)
    if found:
        msg = (
            f"compressed by the weights alone: a network with {' and '.join(found)} loses far less when it is fitted "
            "to data, a few hundred unlabeled samples: pass data=."
        )
        warn(msg)


def warn_if_slower(times: Comparison, recipe: Recipe) -> None:
    """Warn where the smaller model takes longer than the original in the runtime that it is for."""
    found = times.speedups.get("after")
    if found is None or found.high >= 1:
        return
    ways = "a latency budget" if recipe.runtime else "a latency budget, or runtime=, the one that will run it"
    factor = f"at least {1 / found.high:.2f}" if found.doubt else f"{1 / found.ratio:.2f}"
    interval = f" ({found.doubt})" if found.doubt else f" ({1 / found.high:.2f} to {1 / found.low:.2f})"
    msg = (
        f"the compressed model takes {factor} times as long as the original in {recipe.target}{interval}: it is "
        f"smaller, not faster. Plan by the clock: {ways}."
    )
    warn(msg)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
