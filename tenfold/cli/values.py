"""How the shell writes what a recipe holds: readers of option values, and completions of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tenfold.cli.terminal import Misuse


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


def names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return names that were given one by one or several at a time, with commas between them.

    Example:
        >>> names(["tucker2,low_rank", "cp3"])
        ('tucker2', 'low_rank', 'cp3')
    """
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def algorithms(texts: Sequence[str]) -> dict[str, str]:
    """Return algorithms by format from ``FORMAT=NAME``.

    Raises:
        Misuse: not of that form, or a format twice.
    """
    found: dict[str, str] = {}
    for text in texts:
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


# By field; a field that is written by several options names each of them.
TEXTS: dict[str, dict[str, Text]] = {
    "budget": {
        "budget": Text(
            str,
            "macs=0.5",
            str,
            "What the whole model may cost: shares of params, macs, latency up to 1; or max_params, max_macs, "
            "max_latency_ms. Several with commas between them.",
        )
    },
    "formats": {
        "formats": Text(
            list[str],
            "FORMAT,...",
            names,
            "What layers may turn into, the preferred first; see `tenfold list formats`.",
        )
    },
    "units": {
        "units": Text(
            list[str],
            "KIND,...",
            names,
            "Groups of layers that may be narrowed together, all usual kinds by default; see `tenfold list units`.",
        )
    },
    "algorithms": {"algorithms": Text(list[str], "FORMAT=NAME", algorithms, "The algorithm of a format. Repeatable.")},
    "keep": {
        "keep": Text(
            list[str], "PATTERN", list, "Leave these layers alone: a path, a glob or re:EXPRESSION. Repeatable."
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
}


def completion(name: str) -> Callable[[str], list[str]] | None:
    """Return what completes the values of an option in a shell; None for an option whose values have no names."""
    if name not in _REGISTRIES:
        return None
    module, _, registry = _REGISTRIES[name].partition(":")

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        known = getattr(import_module(module), registry).names()
        return [f"{before}{comma}{found}" for found in known if found.startswith(last)]

    return complete
