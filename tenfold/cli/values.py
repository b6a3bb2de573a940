"""How the shell writes what a recipe holds: readers of option values, and completions of names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tenfold.cli.terminal import Misuse
from tenfold.patterns import as_patterns
from tenfold.records import Budget
from tenfold.records.families import FAMILIES
from tenfold.registry import as_names


@dataclass(frozen=True)
class Text:
    """An option that is written as text: how it reads in the help, and what it says of its field.

    Attributes:
        kind: ``str``, or ``list[str]`` where it can be repeated.
        metavar: its form.
        read: returns the value of the field, or of a mapping the part that the option gives.
        help: what it is for.
    """

    kind: Any
    metavar: str
    read: Callable[[Any], Any]
    help: str


def algorithms(texts: Sequence[str]) -> dict[str, str]:
    """Return algorithms by format from ``FORMAT=NAME``.

    Raises:
        Misuse: not of that form, or a format twice.
    """
    found: dict[str, str] = {}
    for text in as_names(texts):
        format, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not format or not name or format in found:
            msg = f"cannot read --algorithms {text!r}: write FORMAT=NAME, such as tucker2=hosvd, each format once."
            raise Misuse(msg)
        found[format] = name
    return found


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a rule from ``NAME=VALUE``, each value read as YAML.

    Raises:
        Misuse: not of that form.
    """
    import yaml

    from tenfold.records.parsing import parse

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            msg = f"cannot read --set {text!r}: write NAME=VALUE, such as rel_error=0.3."
            raise Misuse(msg)
        try:
            found[name.strip()] = parse(value)
        except ValueError as error:
            if not isinstance(error.__cause__, yaml.YAMLError):
                msg = f"cannot read --set {name.strip()}: {error}"
                raise Misuse(msg) from error
            found[name.strip()] = value  # text that means something in YAML
    return found


def ranks(texts: Sequence[str]) -> dict[str, Any]:
    """Return the rule ``fixed`` with ranks from ``PATTERN=24`` or ``PATTERN=out:24,in:20``.

    Raises:
        Misuse: not of that form.
    """
    found: dict[str, int | dict[str, int]] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            if not equals or not pattern:
                raise ValueError
            pairs = [part.split(":") for part in value.split(",")]
            found[pattern] = {n.strip(): int(rank) for n, rank in pairs} if ":" in value else int(value)
        except ValueError:
            msg = f"cannot read --rank {text!r}: write PATTERN=24, or PATTERN=out:24,in:20 for ranks by name."
            raise Misuse(msg) from None
    return {"name": "fixed", "ranks": found}


def budgets(texts: Sequence[str]) -> dict[str, str]:
    """Return budgets of parts from ``PATTERN:BUDGET``.

    Raises:
        Misuse: not of that form, or a part twice.

    Example:
        >>> budgets(["re:layer[12].*:macs=0.5,params=0.6"])
        {'re:layer[12].*': 'macs=0.5,params=0.6'}
    """
    found: dict[str, str] = {}
    for text in texts:
        pattern, colon, budget = (part.strip() for part in text.rpartition(":"))
        if not colon or not pattern or "=" not in budget or pattern in found:
            msg = f"cannot read --budget-of {text!r}: write PATTERN:BUDGET, such as 'neck.*:macs=0.5', each part once."
            raise Misuse(msg)
        found[pattern] = budget
    return found


# By field; a field that is written by several options names each of them.
TEXTS: dict[str, dict[str, Text]] = {
    "budget": {
        "budget": Text(
            str,
            "macs=0.5",
            str,
            "What the whole model may cost: shares of params, macs, bytes, latency up to 1; or max_params, max_macs, "
            "max_bytes, max_latency_ms. Several with commas between them.",
        )
    },
    "budget_of": {
        "budget_of": Text(
            list[str],
            "PATTERN:BUDGET",
            budgets,
            "What the layers of a part may cost, such as 'backbone.*:macs=0.5', in place of a budget of the whole "
            "model. Repeatable, the first match wins.",
        )
    },
    "formats": {
        "formats": Text(
            list[str],
            "FORMAT,...",
            as_names,
            "What layers may turn into, the preferred first; see `tenfold list formats`. Families are "
            "understood: tucker, cp, svd, tt, tr, btd.",
        )
    },
    "units": {
        "units": Text(
            list[str],
            "KIND,...",
            as_names,
            "Groups of layers that may be narrowed together, all usual kinds by default; see `tenfold list units`.",
        )
    },
    "algorithms": {"algorithms": Text(list[str], "FORMAT=NAME,...", algorithms, "The algorithm of a format.")},
    "keep": {
        "keep": Text(
            list[str],
            "PATTERN,...",
            as_patterns,
            "Leave these layers alone: paths, globs or re:EXPRESSION.",
        )
    },
    "rule": {
        "rule": Text(
            str,
            "RULE",
            lambda name: {"name": name},
            "How ranks are chosen, global by default; see `tenfold list rules`.",
        ),
        "set": Text(list[str], "NAME=VALUE", settings, "A setting of the rule, such as rel_error=0.3. Repeatable."),
        "rank": Text(
            list[str],
            "PATTERN=RANK",
            ranks,
            "A rank by hand (rule fixed): 'layer1.*=24' or 'conv1=out:24,in:20'. Repeatable, the first match wins.",
        ),
    },
}

_REGISTRIES = {
    "formats": "tenfold.formats:FORMATS",
    "units": "tenfold.units:UNITS",
    "rule": "tenfold.allocation:RULES",
    "task": "tenfold.tasks:TASKS",
    "to": "tenfold.exporting:EXPORTERS",
    "runtime": "tenfold.runtimes:RUNTIMES",
}


def completion(name: str) -> Callable[[str], list[str]] | None:
    """Return what completes the values of an option in a shell; None for an option whose values have no names."""
    if name in _REGISTRIES:
        return lambda incomplete: _completed(incomplete, _registered(name))  # typer knows it by this name
    if name in _NAMED:
        return lambda incomplete: _completed(incomplete, _NAMED[name]())
    return None


def _completed(typed: str, known: Iterable[str]) -> list[str]:
    before, comma, last = typed.rpartition(",")
    return [f"{before}{comma}{name}" for name in known if name.startswith(last)]


def _registered(name: str) -> Iterable[str]:
    module, _, registry = _REGISTRIES[name].partition(":")
    names: tuple[str, ...] = getattr(import_module(module), registry).names()
    return (*names, *FAMILIES) if name == "formats" else names


def _algorithms() -> list[str]:
    from tenfold.decompositions import DECOMPOSITIONS
    from tenfold.formats import FORMATS

    algorithms = list(DECOMPOSITIONS.items())
    return [f"{format}={name}" for format, kind in FORMATS.items() for name, one in algorithms if one.supports(kind)]


def _settings() -> list[str]:
    from tenfold.allocation import RULES

    return sorted({f"{name}=" for _, rule in RULES.items() for name in inspect.signature(rule).parameters})


_NAMED: dict[str, Callable[[], Iterable[str]]] = {
    "algorithms": _algorithms,
    "set": _settings,
    "budget": lambda: [f"{name}=" for name in Budget.model_fields],
    "device": lambda: ("cpu", "cuda", "mps"),
}
