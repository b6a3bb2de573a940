"""What is said where no plan meets a latency budget: how near one came, what the time is left for, what else to try."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from tenfold.allocation.reasons import grouped_reasons, in_words, listed, share, ways_to_be_faster
from tenfold.records import LayerPlan

if TYPE_CHECKING:
    from tenfold.planning.latency_budget import FastPlan

_MOST = 5  # factorized layers are named; further ones are counted


def in_vain(best: FastPlan, wanted: float) -> str:
    """Return why a latency budget cannot be met, with all that was measured on the way to the best plan.

    Args:
        best: the plan that came nearest.
        wanted: share of the time that was asked for.
    """
    speedup = best.speedup
    if speedup.doubt:
        reached = f"whether any plan meets the latency budget of {wanted:.0%} was {speedup.in_doubt}"
    elif speedup.ratio <= 1:
        reached = f"no plan makes the model faster: the best measures {best.share:.1%} of its time"
    else:
        most_ms = ceil(1000 * best.share * best.timing.dense_ms) / 1000
        reached = (
            f"the latency budget of {wanted:.0%} is not met: the lowest that was reached, as measured, is "
            f"latency={ceil(1000 * best.share) / 1000:g} (max_latency_ms={most_ms:g}; 95 % interval of the share "
            f"{1 / speedup.high:.3f} to {1 / speedup.low:.3f})"
        )
    raised = "Keep the model as it is" if not speedup.doubt and speedup.ratio <= 1 else "Raise the budget"
    return f"{reached}. {_what_is_left(best)}. {raised}, or try: {'; '.join(_ways(best))}."


def _what_is_left(best: FastPlan) -> str:
    """Return what the plan spends its time on, the largest first, as shares of the time of the model as it is."""
    timing, plan = best.timing, best.plan
    whole = timing.forward_time().whole_ms
    now = {layer.path: timing.now_ms(timing.profile.layer(layer.path)) for layer in plan.layers}
    parts = [(whole * (1 - timing.layer_share), "activations, the interpreter and what else is no layer")]
    alone = [layer for layer in plan.factorized if layer.path not in plan.narrowed_paths]
    parts += [_factorized(layer, now[layer.path], best) for layer in alone]
    parts += [(unit.latency_after_ms or 0.0, f"in {unit.path} with {unit.words}") for unit in plan.narrowed]
    parts = sorted(parts, reverse=True)
    shown = [f"{share(ms, whole)} {words}" for ms, words in parts[:_MOST] if ms > 0]
    if rest := parts[_MOST:]:
        shown.append(f"{share(sum(ms for ms, _ in rest), whole)} in {len(rest)} further factorized layers")
    kept = [
        (layer.reason, now[layer.path])
        for layer in plan.layers
        if layer.action == "keep" and now[layer.path] and layer.path not in plan.narrowed_paths
    ]
    shown += [in_words(grouped_reasons(kept), whole)] if kept else []
    return f"What is left of the time: {'; '.join(shown)}"


def _factorized(layer: LayerPlan, now_ms: float, best: FastPlan) -> tuple[float, str]:
    """Return what a factorized layer takes, and how much faster it is than the dense one, with its interval."""
    ranks = ",".join(f"{name}={value}" for name, value in (layer.rank or {}).items())
    words = f"in {layer.path} as {layer.format} {ranks}"
    measured = best.layers.get(layer.path)
    if measured is None:
        return now_ms, words
    interval = f"95 % {measured.low:.2f} to {measured.high:.2f}"
    return now_ms / measured.ratio, f"{words}, {measured.ratio:.2f} times faster than dense ({interval})"


def _ways(best: FastPlan) -> list[str]:
    recipe = best.plan.recipe
    ways = [f"more formats than {listed(recipe.formats)}"]
    ways += [f"fewer layers than keep={listed(map(repr, recipe.keep))}"] if recipe.keep else []
    return ways + ways_to_be_faster(recipe, best.after.batch_size)
