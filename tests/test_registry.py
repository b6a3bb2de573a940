"""Names to classes: duplicates refused, near names suggested, plugins found when they are needed."""

from __future__ import annotations

import pytest

from tenfold import registry
from tenfold.errors import TenfoldError, UnknownNameError
from tenfold.registry import Registry, did_you_mean


@pytest.fixture
def toys():
    toys = Registry("toy")

    @toys.register("ball")
    class Ball:
        """A ball.

        It rolls.
        """

    @toys.register("abacus")
    class Abacus:
        pass

    return toys


def test_entries_come_by_name_in_alphabetical_order(toys):
    assert toys.names() == ("abacus", "ball")
    assert [name for name, _ in toys.items()] == ["abacus", "ball"]
    assert [name for name, _ in toys.loaded()] == ["ball", "abacus"]
    assert toys.get("ball").__name__ == "Ball"
    assert toys.summary("ball") == "A ball."
    assert toys.summary("abacus") == ""


def test_a_taken_name_is_refused_and_says_by_whom(toys):
    with pytest.raises(TenfoldError, match=r"toy 'ball' is registered already, by .*Ball"):
        toys.register("ball")(int)
    assert toys.register("ball")(toys.get("ball")) is toys.get("ball")  # the same class again, as by a reload


def test_a_miss_names_what_is_near(toys):
    with pytest.raises(UnknownNameError, match=r"unknown toy 'bal'\. Did you mean ball\?"):
        toys.get("bal")
    with pytest.raises(LookupError, match=r"Known: abacus, ball\."):
        toys.get("zzz")


def test_hints():
    assert did_you_mean("layer1.conv", ["layer1.conv1", "layer1.conv2", "fc"]) == (
        "Did you mean layer1.conv2 or layer1.conv1?"
    )
    assert did_you_mean("x", []) == "Known: none."
    assert did_you_mean("zzz", [f"n{i}" for i in range(20)]).endswith("n11 and 8 more.")


def test_plugins_are_loaded_once_and_only_when_a_name_is_missing(toys, monkeypatch):
    loads = []

    class Plugin:
        def load(self):
            loads.append(1)
            toys.register("kite")(type("Kite", (), {}))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Plugin()] if group == "tenfold.plugins" else [])
    toys.get("ball")
    assert loads == []
    assert toys.get("kite").__name__ == "Kite"
    assert toys.names() == ("abacus", "ball", "kite")
    assert loads == [1]
