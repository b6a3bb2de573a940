"""From options to a rule, formats, and a plan."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from tenfold.cli.terminal import Misuse
from tenfold.errors import TenfoldError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tenfold.cli.options import Data, Decide
    from tenfold.cli.sources import Opened
    from tenfold.decompositions import Decomposition
    from tenfold.ranks import RankRule
    from tenfold.records import Candidates, Plan, Profile


def plan_choices(decide: Decide, seed: int) -> dict[str, Any]:
    """Return the arguments for ``planning.plan`` and ``compress`` that the options stand for."""
    from tenfold.planning import DEFAULT_FORMATS
    from tenfold.records import Budget

    formats = tuple(names_in(decide.format)) or DEFAULT_FORMATS
    return {
        "rule": rule_of(decide),
        "budget": Budget.parse(decide.budget or ""),
        "formats": formats,
        "algorithms": algorithms_of(decide.algorithm, formats, seed),
        "keep": tuple(decide.keep or ()),
        "keep_ends": decide.keep_ends,
        "seed": seed,
    }


def plan_of(
    decide: Decide, opened: Opened, profile: Profile, choices: dict[str, Any], *, latency_batch: int = 1
) -> Plan:
    """Return the plan that is read from a file, with its costs computed anew, or made by these ``choices``."""
    return decided(decide, opened, profile, choices, latency_batch=latency_batch)[0]


def decided(
    decide: Decide, opened: Opened, profile: Profile, choices: dict[str, Any], *, latency_batch: int = 1
) -> tuple[Plan, Callable[[], Candidates | None]]:
    """Return the plan, as ``plan_of`` does, and what returns what it chose from; that is None of a plan from a file."""
    from tenfold.pipeline import decide as make
    from tenfold.planning import candidates_for, close_idle, recost
    from tenfold.records import Plan

    if decide.plan is not None:
        refuse_choices(decide)
        return recost(Plan.load(decide.plan), profile), lambda: None
    plan, fast = make(opened.model, profile, opened.inputs(latency_batch), fold=decide.fold, **choices)
    found = partial(candidates_for, opened.model, profile, plan, fast, **choices)
    return plan if opened.given is None else close_idle(plan, opened.given), found


def open_networks(decide: Decide, opened: Opened) -> Opened:
    """Return the source with its recurrent networks open, as ``compress`` opens them, for a plan."""
    from tenfold.planning import open_for_plan
    from tenfold.records import Budget, Plan

    plan = None if decide.plan is None else Plan.load(decide.plan)
    budget = Budget.parse(decide.budget or "")
    model = open_for_plan(opened.model, plan=plan, keep=tuple(decide.keep or ()), budget=budget)
    return dataclasses.replace(opened, model=model, given=opened.model)


def with_data(choices: dict[str, Any], opened: Opened, profile: Profile, data: Data, seed: int) -> dict[str, Any]:
    """Return the choices with what unlabeled data say of the layers, as ``compress`` finds it, whatever the rule.

    A rule may choose by it, and the algorithms in the plan follow from it. Only where a table stands for what the data
    say of the damage are they not looked at.
    """
    from tenfold.calibration import calibrate, called_layers
    from tenfold.cli.recovering import calibration

    batches = calibration(opened, data, seed)
    if batches is None or data.use_data == "norms" or "damages" in choices:
        return choices
    return choices | {"moments": calibrate(opened.model, list(batches), called_layers(profile), seed=seed)}


def refuse_choices(decide: Decide) -> None:
    """Raise a usage error if a plan from a file is to be carried out and choices are made as well."""
    given = [
        name
        for name, value in (
            ("--budget", decide.budget),
            ("--rule", decide.rule),
            ("--set", decide.settings),
            ("--rank", decide.rank),
            ("--format", decide.format),
            ("--algorithm", decide.algorithm),
            ("--keep", decide.keep),
            ("--keep-ends", decide.keep_ends),
        )
        if value not in (None, [])
    ]
    if given:
        msg = f"--plan decides everything; leave {', '.join(given)} out, or edit the plan."
        raise Misuse(msg)


def rule_of(decide: Decide) -> RankRule:
    """Return the rank rule with its settings.

    Raises:
        TenfoldError: no such rule or setting, or a value that it does not take.
    """
    from tenfold.ranks import rule_from

    name = decide.rule or ("fixed" if decide.rank else "global")
    settings = dict(_setting(text) for text in decide.settings or ())
    if decide.rank:
        settings["ranks"] = dict(_rank(text) for text in decide.rank)
    try:
        return rule_from(name, **settings)
    except TypeError as error:
        msg = f"the rule {name} does not take {', '.join(f'{k}={v!r}' for k, v in settings.items())}: {error}"
        raise TenfoldError(msg) from error


def algorithms_of(texts: list[str] | None, formats: Sequence[str], seed: int) -> dict[str, Decomposition]:
    """Return the algorithms of ``FORMAT=NAME``, by format.

    Raises:
        UnknownNameError: no such format or algorithm.
        Misuse: not of that form, a format named twice or not in use, or an algorithm that does not find its factors.
    """
    from tenfold.decompositions import DECOMPOSITIONS
    from tenfold.formats import FORMATS

    found: dict[str, Decomposition] = {}
    for text in texts or ():
        format, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not format or not name or format in found:
            msg = f"cannot read --algorithm {text!r}: write FORMAT=NAME, such as tucker2=hosvd, each format once."
            raise Misuse(msg)
        kind, algorithm = FORMATS.get(format), DECOMPOSITIONS.get(name)
        if not algorithm.supports(kind):
            finders = [n for n, d in DECOMPOSITIONS.items() if d.supports(kind)]
            msg = f"{name} does not find {format} factors. Use {' or '.join(finders)}."
            raise Misuse(msg)
        if format not in formats:
            msg = f"--algorithm {text}: {format} is not among the formats {', '.join(formats)}; name it with --format."
            raise Misuse(msg)
        found[format] = algorithm(seed=seed)
    return found


def names_in(texts: list[str] | None) -> list[str]:
    """Return the names in options that may be repeated or hold several, divided by commas."""
    return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]


def _setting(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``, the value read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        msg = f"cannot read --set {text!r}: write NAME=VALUE, such as rel_error=0.3."
        raise Misuse(msg)
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return name.strip(), value


def _rank(text: str) -> tuple[str, int | dict[str, int]]:
    """Return pattern and rank of ``PATTERN=24`` or ``PATTERN=out:24,in:20``."""
    pattern, equals, value = text.rpartition("=")
    try:
        if not equals or not pattern:
            raise ValueError
        if ":" not in value:
            return pattern, int(value)
        pairs = (part.split(":") for part in value.split(","))
        return pattern, {name.strip(): int(number) for name, number in pairs}
    except ValueError:
        msg = f"cannot read --rank {text!r}: write PATTERN=24, or PATTERN=out:24,in:20 for ranks by name."
        raise Misuse(msg) from None
