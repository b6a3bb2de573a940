"""From a profile to a plan: what happens to every layer, and why. Everything clever happens here; applying is dull."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tenfold import __version__
from tenfold.decompositions import Decomposition, Moments, default_algorithm
from tenfold.errors import BudgetError, PlanError, naming_layer
from tenfold.formats import FORMATS
from tenfold.parallel import Workers
from tenfold.planning.ahead import compute_ahead
from tenfold.planning.damage import Curve
from tenfold.planning.merging import without_idle_stages
from tenfold.planning.timing import Timing
from tenfold.planning.undecided import Memory, kept_layers, problems_of
from tenfold.ranks import Choice, Choose, Keep, Limits, RankProblem, RankRule
from tenfold.records import Budget, Cost, LayerPlan, LayerProfile, Plan, Profile
from tenfold.registry import listed
from tenfold.surgery import unrolled_rnns

DEFAULT_FORMATS = ("tucker2", "low_rank", "spatial")
_SAID = dict.fromkeys(("rel_error", "damage", "latency_before_ms", "latency_after_ms"))


def plan(  # noqa: PLR0913 - the one verb that decides everything
    model: nn.Module,
    profile: Profile,
    *,
    rule: RankRule,
    formats: str | Sequence[str] = DEFAULT_FORMATS,
    keep: str | Sequence[str] = (),
    keep_ends: bool | None = None,
    budget: Budget | Mapping[str, float] | None = None,
    algorithms: Mapping[str, Decomposition] | None = None,
    moments: Mapping[str, Moments] | None = None,
    damages: Callable[[str, str], Curve] | None = None,
    timing: Timing | None = None,
    reasons: Mapping[str, str] | None = None,
    memory: Memory | None = None,
    workers: Workers | None = None,
    seed: int = 0,
) -> Plan:
    """Return what is to happen to every layer of the model: factorized, or kept with the reason.

    Args:
        model: the model that was profiled; it may hold factorized layers, which can be compressed further.
        profile: what ``profile`` said of it.
        rule: how much to keep; see ``tenfold.ranks``.
        formats: names of the formats to use, the preferred first: each layer gets the first that serves it.
        keep: layers to leave alone, as paths, globs or ``re:`` expressions.
        keep_ends: leave a first and a last layer alone that cost next to nothing; by default unless the rule names
            layers itself.
        budget: what the whole model may cost, such as ``{"macs": 0.5}``: a share up to 1, or an absolute above 1.
        algorithms: by format, instead of the format's default algorithm.
        moments: of the inputs of the layers, by path (see ``calibrate``): damage is then what the network's output
            loses instead of what the weights lose, and the algorithms are those that know the data.
        damages: returns for a path and a format the function from ranks (n, names) to the damage (n,) that the rule
            is to weigh, instead of what moments or weights say: ``Sensitivity.damage_at`` for one.
        timing: how long the model and its layers take, for a budget of latency.
        reasons: further layers to leave alone, by path, each with the reason that the plan is to show.
        memory: what earlier plans for the same weights computed of them (spectra), to be used and added to.
        workers: who computes what the rule weighs or searches, layer by layer; this process if None.
        seed: of every algorithm that draws random numbers.

    Raises:
        BudgetError: the budget cannot be read or cannot be met.
        UnknownNameError: a format or a pattern that names nothing.

    Example:
        >>> from tenfold.profiling import profile
        >>> from tenfold.ranks import rule_from
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> p = plan(net, profile(net, torch.zeros(1, 64)), rule=rule_from("ratio"), budget={"macs": 0.5})
        >>> p.layer("0").rank, p.after.macs / p.before.macs
        ({'rank': 16}, 0.5)
    """
    budget = Budget.of(dict(budget) if isinstance(budget, Mapping) else budget)
    formats, keep = listed(formats), listed(keep)
    ends = not rule.by_name if keep_ends is None else keep_ends
    kept = kept_layers(model, profile, formats, keep=keep, keep_ends=ends, moments=moments, reasons=reasons)
    undecided = [layer for layer in profile.layers if not kept[layer.path]]
    problems = problems_of(model, undecided, formats, moments=moments, damages=damages, memory=memory)
    if workers is not None and damages is None and rule.by_damage:
        compute_ahead(problems, moments, workers, step=getattr(rule, "step", None))
    if timing is not None and budget.latency is not None:
        problems = timing.time(problems)
    choices: dict[str, Choice] = {path: Keep(reason) for path, reason in kept.items() if reason}
    decides = rule if workers is None else rule.with_workers(workers)
    found = decides.select(problems, _limits(profile, problems, budget, timing))
    if not rule.by_name:  # ranks that somebody asked for stay
        found = tuple(without_idle_stages(p, c) for p, c in zip(problems, found, strict=True))
    choices |= {problem.path: choice for problem, choice in zip(problems, found, strict=True)}

    def find_algorithm(format: str) -> Decomposition:
        given = (algorithms or {}).get(format)
        return given or default_algorithm(format, seed, data_aware=moments is not None)

    costs = {p.path: _cost_after(p, choices[p.path]) for p in problems}
    layers = tuple(
        _layer_plan(layer, choices[layer.path], costs.get(layer.path, layer.cost), find_algorithm)
        for layer in profile.layers
        if layer.spec is not None or layer.params or layer.macs
    )
    return Plan(
        tenfold=__version__,
        model=profile.model,
        seed=seed,
        rule=rule.to_dict(),
        budget={k: v for k, v in budget if v is not None},
        before=profile.cost,
        after=_total(profile, layers),
        layers=layers,
        opened=unrolled_rnns(model),
    )


def recost(plan: Plan, profile: Profile) -> Plan:
    """Return the plan with its costs computed anew, after its ranks or actions were edited by hand.

    What was measured or predicted of layers that were edited goes: those whose fingerprint is not that of what is to be
    done, or whose parameters are others than the plan says.

    Raises:
        PlanError: the plan has a layer that the profile does not have, or has with another geometry, or one that its
            format cannot serve at its rank.
    """
    layers = []
    for planned in plan.layers:
        layer = planned
        try:
            known = profile.layer(layer.path)
        except KeyError as error:
            msg = f"the plan has a layer {layer.path!r} that the model does not have: was it made for another model?"
            raise PlanError(msg) from error
        after = known.cost
        if layer.action == "factorize":
            after = _cost_planned(layer, known)
        else:  # in the format that the layer has, whatever was planned before somebody decided to keep it
            layer = layer.replace(format=known.format, rank=known.rank, algorithm=None)
        if planned.edited or after.params != layer.after.params:
            layer = layer.replace(**_SAID, reason="edited after it was planned")
        layers.append(layer.replace(before=known.cost, after=after, fingerprint=None))
    after = _total(profile, layers)
    # An edit may have left the budget behind: then the plan no longer claims it.
    limits = {
        k: v
        for k, v in plan.budget.items()
        if k == "latency" or getattr(after, k) <= Budget.of({k: v}).allowance(profile.cost)[k]
    }
    return plan.replace(before=profile.cost, after=after, layers=tuple(layers), budget=limits)


def _cost_planned(layer: LayerPlan, known: LayerProfile) -> Cost:
    """Return what a layer will cost when it is factorized as planned."""
    if known.spec is None:
        msg = f"layer {layer.path!r} cannot be factorized: {known.note}"
        raise PlanError(msg)
    if layer.kind != str(known.spec):
        msg = f"layer {layer.path!r} is {layer.kind} in the plan and {known.spec} in the model: another model's plan"
        raise PlanError(msg)
    problem = RankProblem(layer.path, known.spec, (), known.calls, known.cost, lambda: torch.empty(0))
    with naming_layer(layer.path):
        FORMATS.get(str(layer.format)).check_rank(known.spec, layer.rank or {})
    return problem.cost_at(str(layer.format), layer.rank or {})


def _total(profile: Profile, layers: Sequence[LayerPlan]) -> Cost:
    """Return what the whole model costs once the layers cost what they are planned to."""
    saved_params = sum(layer.before.params - layer.after.params for layer in layers)
    saved_macs = sum(layer.before.macs - layer.after.macs for layer in layers)
    return Cost(params=profile.params - saved_params, macs=profile.macs - saved_macs)


def _limits(profile: Profile, problems: Sequence[RankProblem], budget: Budget, timing: Timing | None) -> Limits | None:
    """Return what the layers to decide on may cost together: the budget less all that stays as it is."""
    if not budget:
        return None
    limits: dict[str, float] = {}
    if budget.latency is not None:
        if timing is None:
            remedy = "pass timing=Timing.of(model, inputs, LatencyTable())"
            msg = f"the budget latency={budget.latency:g} needs latencies: {remedy}"
            raise BudgetError(msg)
        limits["latency"] = timing.allowance(budget, profile.cost, problems)
    for name, allowed in budget.replace(latency=None).allowance(profile.cost).items():
        total = getattr(profile.cost, name)
        fixed = total - sum(getattr(p.cost, name) for p in problems)
        if fixed > allowed:
            msg = (
                f"the budget {name}={allowed:,.0f} is below the {fixed:,} {name} of the layers that stay as they are "
                f"(of {total:,} in all). Raise the budget, allow more formats, or keep fewer layers."
            )
            raise BudgetError(msg)
        limits[name] = allowed - fixed
    return limits


def _cost_after(problem: RankProblem, choice: Choice) -> Cost:
    return problem.cost if isinstance(choice, Keep) else problem.cost_at(choice.format, choice.rank)


def _layer_plan(
    layer: LayerProfile, choice: Choice, after: Cost, find_algorithm: Callable[[str], Decomposition]
) -> LayerPlan:
    kind = str(layer.spec) if layer.spec is not None else layer.kind
    common: dict[str, Any] = {"path": layer.path, "aliases": layer.aliases, "kind": kind, "before": layer.cost}
    if isinstance(choice, Choose):
        rank = choice.rank
        if layer.spec is not None:
            rank = FORMATS.get(choice.format).check_rank(layer.spec, rank)  # lowered where the format cannot use it
        return LayerPlan(
            **common,
            action="factorize",
            format=choice.format,
            rank=rank,
            algorithm=find_algorithm(choice.format).to_dict(),
            reason=choice.note,
            damage=choice.damage,
            after=after,
        )
    return LayerPlan(**common, action="keep", format=layer.format, rank=layer.rank, reason=choice.reason, after=after)
