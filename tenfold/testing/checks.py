"""All laws of one entry, by its name, and of everything that is registered."""

from __future__ import annotations

from tenfold.allocation import RULES, RankRule
from tenfold.decompositions import DECOMPOSITIONS, Decomposition
from tenfold.formats import FORMATS
from tenfold.testing.algorithm_laws import ALGORITHM_LAWS, check_algorithm_laws
from tenfold.testing.format_laws import FORMAT_LAWS, check_format_laws
from tenfold.testing.laws import expect, law
from tenfold.testing.model_laws import MODEL_LAWS, check_model_laws, check_replanned
from tenfold.testing.rule_laws import RULE_LAWS


def check_format(name: str) -> None:
    """Raise LawBroken unless a registered format obeys all laws, with every algorithm that serves it.

    Raises:
        LawBroken: a law is broken; the message names it, the geometry, the rank and what was seen.
        UnknownNameError: no format of that name is registered.

    Example:
        >>> check_format("low_rank")  # doctest: +SKIP
    """
    kind = FORMATS.get(name)
    for each in FORMAT_LAWS:
        check_format_laws(kind, each)
    for each in MODEL_LAWS:
        check_model_laws(kind, each)
    finders = [finder for _, finder in DECOMPOSITIONS.items() if finder.supports(kind)]
    with law(1, name):
        default = DECOMPOSITIONS.get(kind.default_algorithm)
        expect(default in finders, f"the default algorithm {kind.default_algorithm} does not serve the format")
        if kind.data_aware_algorithm is not None:
            aware = DECOMPOSITIONS.get(kind.data_aware_algorithm)
            knows = aware in finders and aware.uses_covariance
            expect(
                knows, f"the algorithm {kind.data_aware_algorithm} does not serve the format, or does not know the data"
            )
    for finder in finders:
        for each in ALGORITHM_LAWS:
            check_algorithm_laws(finder(), kind, each)


def check_algorithm(algorithm: str | Decomposition) -> None:
    """Raise LawBroken unless an algorithm, by name or as an object, obeys its laws on all formats that it serves.

    Example:
        >>> check_algorithm("hosvd")
    """
    finder = DECOMPOSITIONS.get(algorithm)() if isinstance(algorithm, str) else algorithm
    kinds = [kind for _, kind in FORMATS.items() if finder.supports(kind)]
    with law(1, finder.name()):
        expect(bool(kinds), "the algorithm serves no registered format")
    for kind in kinds:
        for each in ALGORITHM_LAWS:
            check_algorithm_laws(finder, kind, each)


def check_rule(rule: str | RankRule) -> None:
    """Raise LawBroken unless a rank rule, by name with its defaults or as an object, obeys its laws.

    Example:
        >>> check_rule("fixed")
    """
    found = RULES.get(rule)() if isinstance(rule, str) else rule
    for check in RULE_LAWS.values():
        check(found)
    check_replanned(found)


def check_all() -> None:
    """Raise LawBroken unless everything that is registered obeys every law: formats, algorithms and rules."""
    for name in FORMATS.names():
        check_format(name)
    for name in RULES.names():
        check_rule(name)
