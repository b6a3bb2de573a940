"""The laws over everything that is registered, without naming any of it."""

from __future__ import annotations

import warnings

import pytest

from tenfold.allocation import RULES
from tenfold.decompositions import DECOMPOSITIONS
from tenfold.formats import FORMATS
from tenfold.testing import (
    ALGORITHM_LAWS,
    FORMAT_LAWS,
    MODEL_LAWS,
    RULE_LAWS,
    check_algorithm_laws,
    check_format_laws,
    check_model_laws,
    rule_laws,
)
from tenfold.testing.model_laws import check_replanned

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

PAIRS = [(d, f) for d, kind in DECOMPOSITIONS.items() for f, format in FORMATS.items() if kind.supports(format)]


@pytest.mark.parametrize("law", FORMAT_LAWS)
@pytest.mark.parametrize("format", FORMATS.names())
def test_format(format: str, law: str) -> None:
    check_format_laws(FORMATS.get(format), law)


@pytest.mark.parametrize("law", MODEL_LAWS)
@pytest.mark.parametrize("format", FORMATS.names())
def test_model(format: str, law: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export deprecates parts of itself
        check_model_laws(FORMATS.get(format), law)


@pytest.mark.parametrize("law", ALGORITHM_LAWS)
@pytest.mark.parametrize(("algorithm", "format"), PAIRS)
def test_algorithm(algorithm: str, format: str, law: str) -> None:
    check_algorithm_laws(DECOMPOSITIONS.get(algorithm)(), FORMATS.get(format), law)


@pytest.mark.parametrize("law", RULE_LAWS)
@pytest.mark.parametrize("rule", RULES.names())
def test_rule(rule: str, law: str) -> None:
    RULE_LAWS[law](RULES.get(rule)())


@pytest.mark.parametrize("rule", RULES.names())
def test_what_a_layer_becomes_in_one_format_does_not_depend_on_the_others(rule: str) -> None:
    """Which the laws of rules take for granted."""
    asked = RULES.get(rule)()
    known = rule_laws._layers(asked, ("tucker2",))
    if known is None:
        pytest.skip("the rule needs more than layers")
    alone = rule_laws.small_layers().table(asked, ("tucker2",)).eligible
    assert [layer.model_dump_json() for layer in known] == [layer.model_dump_json() for layer in alone]


@pytest.mark.parametrize("rule", RULES.names())
def test_replanning(rule: str) -> None:
    check_replanned(RULES.get(rule)())


def test_every_entry_is_tried() -> None:
    assert {f for _, f in PAIRS} == set(FORMATS.names())
    assert {d for d, _ in PAIRS} == set(DECOMPOSITIONS.names())
