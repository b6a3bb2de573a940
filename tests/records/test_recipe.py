"""Recipes: YAML both ways, short forms read, and one clear line for whatever cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenfold.errors import BudgetError, RecipeError
from tenfold.records import Budget, Calibration, Recipe

WHOLE = Recipe(
    budget={"macs": 0.5, "max_latency_ms": 4.0},
    rule={"name": "evbmf", "weaken": 0.7},
    formats=("tucker2", "cp3"),
    algorithms={"tucker2": {"name": "hosvd"}},
    keep=("stem", "re:head.*"),
    keep_ends=False,
    calibration=Calibration(method="independent", positions=None, draws=3, max_width=512),
    fuse_batchnorm=True,
    seed=7,
)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.of("macs=0.5"), WHOLE])
def test_yaml_both_ways(tmp_path: Path, recipe: Recipe) -> None:
    recipe.save(tmp_path / "deep" / "recipe.yaml")
    text = (tmp_path / "deep" / "recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith("# A tenfold recipe")
    assert Recipe.load(tmp_path / "deep" / "recipe.yaml") == recipe
    assert Recipe.from_text(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("macs=0.5", {"budget": Budget(macs=0.5)}),
        ({"budget": "macs=0.5,max_params=400"}, {"budget": Budget(macs=0.5, max_params=400)}),
        ({"rule": "evbmf"}, {"rule": {"name": "evbmf"}}),
        ({"formats": "low_rank", "keep": "12"}, {"formats": ("low_rank",), "keep": ("12",)}),
        ({"formats": "low_rank, tucker2"}, {"formats": ("low_rank", "tucker2")}),
        ({"formats": ["low_rank,svd", "cp3"]}, {"formats": ("low_rank", "spatial", "cp3")}),
        ({"units": "mlp_width,conv_width"}, {"units": ("mlp_width", "conv_width")}),
        ({"keep": "stem, layer[1,2].*, re:a{1,2}"}, {"keep": ("stem", "layer[1,2].*", "re:a{1,2}")}),
        ({"algorithms": {"tucker2": "hosvd"}}, {"algorithms": {"tucker2": {"name": "hosvd"}}}),
        ({"calibration": {"method": "batchnorm"}}, {"calibration": Calibration(method="batchnorm")}),
        (None, {}),
        (WHOLE, dict(WHOLE)),
    ],
)
def test_short_forms_are_read(given: Any, fields: dict[str, Any]) -> None:
    assert Recipe.of(given) == Recipe(**fields)
    assert Recipe.of(Recipe.of(given)) == Recipe.of(given)
    assert Recipe.from_text(Recipe.of(given).to_yaml()) == Recipe.of(given)


def test_a_text_of_names_in_a_file() -> None:
    assert Recipe.from_text("formats: low_rank, tucker2\nkeep: a,b\n") == Recipe(
        formats=("low_rank", "tucker2"), keep=("a", "b")
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"colour": "red"}, "colour"),
        ({"seed": -1}, "seed"),
        ({"formats": []}, "formats is empty: name at least one, such as low_rank"),
        ({"rule": {"weaken": 0.8}}, "a rule needs its name"),
        ({"calibration": {"method": "sequental"}}, "calibration.method.*'sequential'"),
        ({"calibration": {"draws": 0}}, "calibration.draws"),
        ({"fuse_batchnorm": "perhaps"}, "fuse_batchnorm"),
        ({"keep": 3}, "keep"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.of(fields)
    assert "\n" not in str(caught.value)
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot read the recipe .*: No such file"), ("][", "is not valid YAML"), ("3", "recipe")]
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "absolute"), [("params", "max_params"), ("macs", "max_macs"), ("latency", "max_latency_ms")]
)
def test_shares_above_one_name_the_absolute_limit(name: str, absolute: str) -> None:
    with pytest.raises(BudgetError, match=rf"{name}=40 is a share .* up to 1.*write {absolute}=40"):
        Recipe.of(f"{name}=40")
    with pytest.raises((BudgetError, RecipeError), match=rf"write {absolute}=40"):
        Recipe.of({"budget": {name: 40}})


def test_a_recipe_is_frozen_and_replaced() -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        WHOLE.seed = 3  # type: ignore[misc]
    assert WHOLE.replace(seed=3).seed == 3
    assert WHOLE.rule_name == "evbmf"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (0.5, BudgetError, r"0\.5 does not say of what: write macs=0\.5, params=0\.5 or latency=0\.5"),
        ("0.5", BudgetError, r"write macs=0\.5"),
        ("50%", BudgetError, r"write macs=0\.5"),
        (50, BudgetError, r"write macs=0\.5"),
        (1_000_000, BudgetError, "write max_params=1000000 or max_macs=1000000"),
        ({"budget": 0.3}, BudgetError, r"write macs=0\.3"),
        ({"budget": "30%"}, BudgetError, r"write macs=0\.3"),
        ("macs=50", BudgetError, r"for 50 % write macs=0\.5.*write max_macs=50"),
        ("params=30%", BudgetError, r"is written params=0\.3"),
        ("max_macs=30%", BudgetError, r"is written macs=0\.3"),
        ({"budget": {"macs": "0.5"}}, BudgetError, r"is written macs=0\.5, without quotes"),
        ("MACs=0.5", BudgetError, "Did you mean macs"),
        ({"macs": 0.5}, RecipeError, r"write \{'budget': \{'macs': 0\.5\}\}"),
        ("recipe.yaml", BudgetError, r"Recipe\.load\(path\)"),
        (Path("recipe.yaml"), RecipeError, r"Recipe\.load\(path\)"),
        (["macs=0.5"], RecipeError, "a budget such as 'macs=0.5'"),
        (True, BudgetError, "a budget names what it limits"),
        (-0.5, BudgetError, "a budget names what it limits"),
    ],
)
def test_a_budget_in_another_spelling_is_told_its_own(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Recipe.of(given)


def test_a_budget_is_a_recipe() -> None:
    assert Recipe.of(Budget(macs=0.5)) == Recipe.of("macs=0.5") == Recipe.of({"budget": {"macs": 0.5}})
