"""YAML and JSON that no record is made of are refused in one line each, wherever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import tenfold
from tenfold.cli.values import settings
from tenfold.errors import DataError, PlanError, RecipeError, TenfoldError
from tenfold.records import Cost, OptionTable, Plan, Recipe
from tenfold.records.parsing import parse, parse_json, seal, unseal

LEVELS = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 6))
ODD = {
    "digits": ("seed: " + "9" * 5000, "64 bits"),
    "65 bits": (f"seed: {2**64}", "64 bits"),
    "hex": ("seed: 0x" + "f" * 5000, "64 bits"),
    "deep": ("[" * 2000, "nested"),
    "deep JSON": ('{"a":' * 5000, "nested"),
    "deep and whole": ('{"rule": ' + "[" * 100 + "]" * 100 + "}", "nested"),
    "twice": ("seed: 1\nseed: 2", "line 2: the key 'seed' is there twice"),
    "twice within": ("rule:\n  name: ratio\n  name: fixed", "line 3: the key 'name' is there twice"),
    "twice in JSON": ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice"),
    "aliases": (f"rule:\n  name: global\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{LEVELS}", "aliases"),
    "itself": ("rule: &a {name: ratio, a: *a}", "aliases"),
    "object": ("seed: !!python/object/apply:os.getpid []", "python"),
    "date": ("seed: !!timestamp 2001-99-99", "timestamp"),
    "bytes": ("seed: !!binary aGk=", "binary"),
    "set": ("keep: !!set {a}", "set"),
    "tag": ("seed: !!bool x", "tag"),
    "no index": ("seed: !!int ''", "tag"),
    "key": ("? [1]\n: 2", "unhashable"),
    "number as a key": ("budget: {5: 0.5}", "does not name 5"),
    "control": ("seed: \x01", "unacceptable"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_text_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, words = ODD[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 200 + "]" * 200, "{a: 1, a: 2}"])
def test_settings_of_the_command_line_are_read_likewise(value: str) -> None:
    with pytest.raises(Exception, match="cannot read --set share"):
        settings([f"share={value}"])
    assert settings(["a=2001-99-99", "b=0.5", "c=*"]) == {"a": "2001-99-99", "b": 0.5, "c": "*"}


@pytest.mark.parametrize("name", ["digits", "deep JSON", "twice in JSON", "deep and whole"])
def test_tables_and_plans_are_read_likewise(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(ODD[name][0])
    with pytest.raises(DataError, match=r"file is not an option table"):
        OptionTable.load(file)
    with pytest.raises(PlanError, match=r"file is not"):
        Plan.load(file)


def test_modest_aliases_and_merges_are_fine() -> None:
    assert parse("a: &a {x: 1}\nb: *a\nc: {<<: *a, x: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}
    assert parse("{0: 1, no: 2, null: 3, 0.5: 4}") == {"0": 1, "no": 2, "null": 3, "0.5": 4}
    assert parse("since: 2001-01-01") == {"since": "2001-01-01"}
    assert parse(f"[{2**63 - 1}, {-(2**63)}]") == [2**63 - 1, -(2**63)]


def test_a_plan_of_many_layers_is_no_bomb() -> None:
    layers = [nn.Linear(8, 8) for _ in range(60)]
    plan = tenfold.compress(
        nn.Sequential(*layers), torch.zeros(1, 8), {"rule": {"name": "fixed", "ranks": {"*": 2}}}
    ).plan
    assert Plan.from_text(plan.to_yaml()) == plan
    assert Plan.from_text(yaml.dump(yaml.safe_load(plan.to_yaml()))) == plan


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(RecipeError, match="seed"):
        Recipe.of({"seed": 2**63})


def test_every_flipped_bit_of_a_sealed_record_is_noticed() -> None:
    text = seal(Cost(params=3, macs=12).to_json())
    assert Cost.from_text(text) == Cost(params=3, macs=12)
    assert unseal(text) == (Cost(params=3, macs=12).to_json(), True)
    raw = text.encode()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = Cost.from_text(changed.decode())
        except (TenfoldError, UnicodeDecodeError):
            continue
        assert found == Cost(params=3, macs=12)  # such as another kind of blank


@pytest.mark.parametrize("text", ["", "{", "[1,", '"\\ud800', "nul"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)
