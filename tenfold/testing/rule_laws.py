"""Laws that a rank rule obeys, whatever its idea of importance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import torch

from tenfold.allocation import Choice, Keep, Limits, RankRule, ThresholdRule, total_cost
from tenfold.errors import BudgetError
from tenfold.formats import FORMATS
from tenfold.planning.eligible import EligibleLayer
from tenfold.records import Cost, LayerOptions, LayerSpec
from tenfold.testing.format_laws import dense_layer
from tenfold.testing.laws import expect, law
from tenfold.testing.tables import SideBySide
from tenfold.testing.weights import random_bias, random_weight

Found = TypeVar("Found")


def small_layers() -> SideBySide:
    """Return layers of many shapes to decide on, each called twice: spectra steep, flat and degenerate."""
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
    layers = {
        name: dense_layer(spec, _weight(spec, decay), random_bias(spec, torch.float32))
        for name, spec, _, decay in table
    }
    return SideBySide(layers, {name: shape for name, _, shape, _ in table}, calls=2)


def _conv(inner: int, out: int, groups: int = 1) -> LayerSpec:
    return LayerSpec(
        kind="conv", in_channels=inner, out_channels=out, kernel=(3, 3), padding=(1, 1), groups=groups, bias=True
    )


def _weight(spec: LayerSpec, decay: float | None) -> torch.Tensor:
    """Return a weight whose inputs matter less and less by ``decay``; constant at 0, zero at None."""
    weight = random_weight(spec, torch.float32)
    if not decay:
        return torch.full_like(weight, 0.0 if decay is None else 0.5)
    flat = weight.flatten(1)
    return (flat * decay ** torch.arange(flat.shape[1]).div(4)).view_as(weight)


def check_choices(rule: RankRule) -> None:
    """Raise LawBroken unless every choice is a rank that exists, saves something and tells its reason."""
    model = small_layers()
    for formats in (None, *((name,) for name in FORMATS.names())):
        with law(9, rule, formats or "all formats"):
            layers = _layers(rule, formats)
        if layers is None:
            return  # the rule needs more than layers
        every = _all_limits(layers)
        for limits in (None, *(every if formats is None else every[3:4])):
            with law(9, rule, formats or "all formats", limits or "no budget"):
                choices = _asked(partial(rule.select, layers, limits))
                if choices is None:
                    continue
                expect(len(choices) == len(layers), f"{len(choices)} choices for {len(layers)} layers")
                for layer, choice in zip(layers, choices, strict=True):
                    _expect_saving(model.eligible(layer.path, formats), layer, choice)
                expect(rule.select(layers, limits) == choices, "the rule decides otherwise when asked again")


def _expect_saving(known: EligibleLayer, layer: LayerOptions, choice: Choice) -> None:
    if isinstance(choice, Keep):
        expect(bool(choice.reason), f"{layer.path} is kept without a reason")
        return
    rows = sum(len(options) for options in layer.options)
    expect(1 <= choice.row <= rows, f"{layer.path}: row {choice.row} is outside of 1..{rows}")
    options, option = layer.place(choice.row)
    expect(options.format in known.formats, f"{layer.path}: {options.format} is not among {known.formats}")
    most, rank = FORMATS.get(options.format).max_rank(known.spec), options.rank(option)
    inside = set(rank) == set(most) and all(1 <= rank[k] <= most[k] for k in most)
    expect(inside, f"{layer.path}: {options.format} at {rank} is outside of 1..{most}")
    after = options.cost(option)
    expect(after == known.cost_at(options.format, rank), f"{layer.path} costs something else at {rank} than {after}")
    expect(after.below(layer.before), f"{layer.path} grows from {layer.before} to {after}")
    expect(bool(choice.note), f"{layer.path} is factorized without a reason")


def aiming(rule: RankRule) -> RankRule:
    """Return the rule as it aims at budgets: without a number of its own, which would hold beside them."""
    return rule.without_number() if isinstance(rule, ThresholdRule) else rule


def check_budget(rule: RankRule) -> None:
    """Raise LawBroken unless a budget is met, and one more step of every layer's rank would break it.

    A rule that cannot aim at a budget says so with a BudgetError, and so does one whose budget is out of reach.
    """
    model, rule = small_layers(), aiming(rule)
    with law(10, rule):
        layers = _layers(rule)
    if layers is None:
        return  # the rule needs more than layers
    for limits in _all_limits(layers):
        with law(10, rule, limits):
            choices = _asked(partial(rule.select, layers, limits))
            if choices is None:
                continue
            cost = total_cost(layers, choices)
            for name, limit in limits.items():
                expect(getattr(cost, name) <= limit, f"{name} is {getattr(cost, name)} over the limit {limit:.6g}")
            more = sum(map(_one_step_up, [model.eligible(own.path) for own in layers], layers, choices), Cost())
            seen = ", ".join(f"{name} could be {getattr(more, name)} of {limit:.6g}" for name, limit in limits.items())
            expect(any(getattr(more, name) > limit for name, limit in limits.items()), f"too much is dropped: {seen}")
    with law(10, rule, "a budget that nothing can meet"):
        promised = _asked(partial(rule.select, layers, {"macs": 10.0}))
        expect(promised is None, "10 MACs for all layers were promised")
    with law(10, rule, "a budget that is met already"):
        whole = sum(layer.before.macs for layer in layers)
        choices = rule.select(layers, {"macs": float(whole)})
        expect(total_cost(layers, choices).macs <= whole, "the layers grow")


def _one_step_up(known: EligibleLayer, layer: LayerOptions, choice: Choice) -> Cost:
    """Return the larger cost of: every rank one higher, the next member of the family; dense where nothing is saved."""
    if isinstance(choice, Keep):
        return known.cost
    options, option = layer.place(choice.row)
    kind, rank, now = FORMATS.get(options.format), options.rank(option), options.cost(option)
    most = kind.max_rank(known.spec)
    steps = [known.cost_at(options.format, {k: min(v + 1, most[k]) for k, v in rank.items()})]
    family = (known.cost_at(options.format, member) for member in kind.rank_family(known.spec))
    steps += [cost for cost in family if now.below(cost)][:1]
    largest = Cost(params=max(c.params for c in steps), macs=max(c.macs for c in steps))
    return largest if largest.below(known.cost) else known.cost


def _all_limits(layers: Sequence[LayerOptions]) -> list[Limits]:
    total = sum((layer.before for layer in layers), Cost())
    kinds = (("macs",), ("params",), ("macs", "params"))
    return [{name: share * getattr(total, name) for name in names} for share in (0.9, 0.6, 0.35) for names in kinds]


def _layers(rule: RankRule, formats: tuple[str, ...] | None = None) -> tuple[LayerOptions, ...] | None:
    """Return what the small layers could become; None for a rule that needs scores, which layers alone have none of.

    In one format that is what it is among all formats, unless a rule has them searched one after the other.
    """
    if formats is not None and "fitted_error" in rule.columns:
        return _asked(lambda: small_layers().table(rule, formats).eligible)
    layers = _asked(lambda: _in_all(type(rule), json.dumps(vars(rule), sort_keys=True), tuple(FORMATS.names())))
    if formats is None or layers is None:
        return layers
    own = (layer.replace(options=tuple(o for o in layer.options if o.format in formats)) for layer in layers)
    return tuple(layer for layer in own if layer.options)


@lru_cache(maxsize=16)
def _in_all(kind: type[RankRule], settings: str, formats: tuple[str, ...]) -> tuple[LayerOptions, ...]:
    """Return the options of the small layers in all formats: once for all laws that ask."""
    return small_layers().table(kind(**json.loads(settings)), formats).eligible


def _asked(question: Callable[[], Found]) -> Found | None:
    """Return the answer; None where the rule needs scores or a budget, or cannot aim at one."""
    try:
        return question()
    except BudgetError as error:
        expect(len(str(error)) > 20, "a BudgetError does not tell what to do")
        return None


RULE_LAWS: dict[str, Callable[[RankRule], None]] = {"choices": check_choices, "budget": check_budget}
