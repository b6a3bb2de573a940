"""Laws that a rank rule obeys, whatever its idea of importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tenfold.errors import BudgetError
from tenfold.formats import FORMATS, Rank, split_groups
from tenfold.ranks import Choice, Keep, Limits, OneKnobRule, RankProblem, RankRule, total_cost
from tenfold.records import Call, Cost, LayerSpec
from tenfold.testing.laws import expect, law
from tenfold.testing.weights import random_weight

SHARES = (0.9, 0.6, 0.35)


def problems(formats: Sequence[str] | None = None) -> tuple[RankProblem, ...]:
    """Return layers of many shapes to decide on, in the formats that serve them: spectra steep, flat and degenerate.

    Args:
        formats: names in order of preference; all that are registered if None.
    """
    table = (
        ("wide", _conv(12, 24), (1, 12, 8, 8), 1.0),
        ("square", _conv(16, 16), (1, 16, 6, 6), 0.6),
        ("narrow", _conv(24, 8), (1, 24, 6, 6), 0.9),
        ("grouped", _conv(16, 16, groups=2), (1, 16, 4, 4), 0.8),
        ("pointwise", LayerSpec(kind="conv", in_channels=24, out_channels=18, kernel=(1, 1)), (1, 24, 5, 5), 0.7),
        ("linear", LayerSpec(kind="linear", in_channels=30, out_channels=20, bias=True), (1, 30), 0.5),
        ("tiny", LayerSpec(kind="linear", in_channels=3, out_channels=2), (1, 3), 1.0),
        ("constant", LayerSpec(kind="linear", in_channels=20, out_channels=20), (1, 20), 0.0),
        ("zero", LayerSpec(kind="linear", in_channels=16, out_channels=16), (1, 16), None),
    )
    names = tuple(FORMATS.names() if formats is None else formats)
    found = (_problem(name, spec, shape, decay, names) for name, spec, shape, decay in table)
    return tuple(p for p in found if p.formats)


def _conv(inner: int, out: int, groups: int = 1) -> LayerSpec:
    return LayerSpec(
        kind="conv", in_channels=inner, out_channels=out, kernel=(3, 3), padding=(1, 1), groups=groups, bias=True
    )


def _problem(
    name: str, spec: LayerSpec, shape: tuple[int, ...], decay: float | None, formats: tuple[str, ...]
) -> RankProblem:
    """Return a layer whose inputs matter less and less by ``decay``; constant at 0, zero at None."""
    weight = random_weight(spec, torch.float32)
    if not decay:
        weight = torch.full_like(weight, 0.0 if decay is None else 0.5)
    else:
        flat = weight.flatten(1)
        weight = (flat * decay ** torch.arange(flat.shape[1]).div(4)).view_as(weight)
    call = Call(in_shape=shape, out_shape=spec.out_shape(shape), count=2)
    return RankProblem(
        path=name,
        spec=spec,
        formats=tuple(f for f in formats if FORMATS.get(f).unsupported_reason(spec) is None),
        calls=(call,),
        cost=Cost(params=spec.num_params, macs=2 * spec.macs(shape)),
        load_weight=lambda: split_groups(weight, spec),
    )


def check_choices(rule: RankRule) -> None:
    """Raise LawBroken unless every choice is a rank that exists, saves something and tells its reason."""
    for formats in (None, *((name,) for name in FORMATS.names())):
        layers = problems(formats)
        every = _all_limits(layers)
        for limits in (None, *(every if formats is None else every[3:4])):
            with law(9, rule, formats or "all formats", limits or "no budget"):
                choices = _select(rule, layers, limits)
                if choices is None:
                    continue
                expect(len(choices) == len(layers), f"{len(choices)} choices for {len(layers)} layers")
                for problem, choice in zip(layers, choices, strict=True):
                    _expect_saving(problem, choice)
                again = rule.select(layers, limits)
                expect(again == choices, "the rule decides otherwise when asked again")


def _expect_saving(problem: RankProblem, choice: Choice) -> None:
    if isinstance(choice, Keep):
        expect(bool(choice.reason), f"{problem.path} is kept without a reason")
        return
    expect(choice.format in problem.formats, f"{problem.path}: {choice.format} is not among {problem.formats}")
    most = FORMATS.get(choice.format).max_rank(problem.spec)
    inside = set(choice.rank) == set(most) and all(1 <= choice.rank[k] <= most[k] for k in most)
    expect(inside, f"{problem.path}: {choice.format} at {choice.rank} is outside of 1..{most}")
    after = problem.cost_at(choice.format, choice.rank)
    expect(after.below(problem.cost), f"{problem.path} grows from {problem.cost} to {after}")
    expect(bool(choice.note), f"{problem.path} is factorized without a reason")


def aiming(rule: RankRule) -> RankRule:
    """Return the rule as it aims at budgets: without a number of its own, which would hold beside them."""
    return rule.without_number() if isinstance(rule, OneKnobRule) else rule


def check_budget(rule: RankRule) -> None:
    """Raise LawBroken unless a budget is met, and one more step of every layer's rank would break it.

    A rule that cannot aim at a budget says so with a BudgetError, and so does one whose budget is out of reach.
    """
    layers, rule = problems(), aiming(rule)
    for limits in _all_limits(layers):
        with law(10, rule, limits):
            choices = _select(rule, layers, limits)
            if choices is None:
                continue
            cost = total_cost(layers, choices)
            for name, limit in limits.items():
                expect(getattr(cost, name) <= limit, f"{name} is {getattr(cost, name)} over the limit {limit:.6g}")
            more = sum((_one_step_up(p, c) for p, c in zip(layers, choices, strict=True)), Cost())
            seen = ", ".join(f"{name} could be {getattr(more, name)} of {limit:.6g}" for name, limit in limits.items())
            expect(any(getattr(more, name) > limit for name, limit in limits.items()), f"too much is dropped: {seen}")
    with law(10, rule, "a budget that nothing can meet"):
        try:
            rule.select(layers, {"macs": 10.0})
        except BudgetError:
            pass
        else:
            expect(kept=False, seen="10 MACs for all layers were promised")
    with law(10, rule, "a budget that is met already"):
        choices = rule.select(layers, {"macs": float(sum(p.cost.macs for p in layers))})
        expect(total_cost(layers, choices).macs <= sum(p.cost.macs for p in layers), "the layers grow")


def _one_step_up(problem: RankProblem, choice: Choice) -> Cost:
    """Return the larger cost of: every rank one higher, the next member of the family; dense where nothing is saved."""
    if isinstance(choice, Keep):
        return problem.cost
    kind = FORMATS.get(choice.format)
    most = kind.max_rank(problem.spec)
    up: Rank = {k: min(v + 1, most[k]) for k, v in choice.rank.items()}
    now = problem.cost_at(choice.format, choice.rank)
    steps = [problem.cost_at(choice.format, up)]
    steps += [cost for _, cost in problem.family(choice.format) if now.below(cost)][:1]
    params, macs = max(c.params for c in steps), max(c.macs for c in steps)
    return Cost(params=params, macs=macs) if Cost(params=params, macs=macs).below(problem.cost) else problem.cost


def _all_limits(layers: Sequence[RankProblem]) -> list[Limits]:
    total = sum((p.cost for p in layers), Cost())
    limits: list[Limits] = []
    for share in SHARES:
        limits += [{"macs": share * total.macs}, {"params": share * total.params}]
        limits.append({"macs": share * total.macs, "params": share * total.params})
    return limits


def _select(rule: RankRule, layers: Sequence[RankProblem], limits: Limits | None) -> tuple[Choice, ...] | None:
    """Return what the rule chooses; None where it cannot aim at a budget, or needs one."""
    try:
        return rule.select(layers, limits)
    except BudgetError as error:
        expect(len(str(error)) > 20, "a BudgetError does not tell what to do")
        return None


RULE_LAWS: dict[str, Callable[[RankRule], None]] = {"choices": check_choices, "budget": check_budget}
