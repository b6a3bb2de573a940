"""The same ranks as before for networks, rules and budgets of all kinds, whatever is rebuilt around them."""

from __future__ import annotations

import pytest

from tests.golden.nets import NETS
from tests.golden.plans import RULES, Subject, read

EXPECTED = read()


@pytest.fixture(scope="module", params=NETS)
def subject(request: pytest.FixtureRequest) -> tuple[str, Subject]:
    return request.param, Subject(request.param)


@pytest.mark.parametrize("rule", RULES)
def test_plans_keep_their_ranks(subject: tuple[str, Subject], rule: str) -> None:
    name, made = subject
    assert made.plans(rule) == EXPECTED[name][rule]


def test_every_rule_makes_plans_and_not_only_errors() -> None:
    for name in NETS:
        for rule in RULES:
            assert any("error" not in found for found in EXPECTED[name][rule].values()), (name, rule)
