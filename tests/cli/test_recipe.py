"""Options are the fields of records: from a file, changed one by one, and checked before any work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.cli.app import build
from tenfold.cli.values import completion
from tenfold.records import Budget, Recipe, TuneConfig
from tenfold.tasks import Task

Run = Callable[..., Any]


@pytest.fixture
def file() -> Path:
    recipe = Recipe(budget="macs=0.9", rule={"name": "ratio", "share": 0.5}, formats="low_rank", keep=("0",), seed=3)
    recipe = recipe.replace(calibration={"method": "independent", "draws": 2}, budget={})
    recipe.save("recipe.yaml")
    return Path("recipe.yaml")


def planned(tenfold: Run, tiny: str, *args: str | Path) -> Recipe:
    outcome = tenfold("plan", "--task", tiny, "--json", *args)
    assert outcome.code == 0, outcome.err
    return Recipe.of(outcome.json["plan"]["recipe"])


def test_a_recipe_from_a_file(tenfold: Run, tiny: str, file: Path) -> None:
    assert planned(tenfold, tiny, "--recipe", file) == Recipe.load(file)


def test_single_options_change_fields_of_the_file(tenfold: Run, tiny: str, file: Path) -> None:
    changed = planned(tenfold, tiny, "--recipe", file, "--set", "share=0.7", "--calibration-method", "batchnorm")
    assert changed.rule == {"name": "ratio", "share": 0.7}
    assert changed.calibration == Recipe.load(file).calibration.replace(method="batchnorm")
    assert (changed.keep, changed.seed) == (("0",), 3)
    other = planned(tenfold, tiny, "--recipe", file, "--rule", "global", "--budget", "macs=0.6", "--seed", "4")
    assert (other.rule, str(other.budget), other.seed) == ({"name": "global"}, "macs=0.6", 4)


def test_a_saved_model_has_the_recipe_of_the_next(tenfold: Run, tiny: str) -> None:
    quick = ("--task", tiny, "--no-tune", "--no-latency", "--no-eval")
    assert tenfold("compress", *quick, "--budget", "macs=0.6,max_params=1e6", "--out", "a").code == 0
    assert tenfold("compress", *quick, "--recipe", "a/recipe.yaml", "--out", "b").code == 0
    assert Path("a/plan.yaml").read_text() == Path("b/plan.yaml").read_text()


@pytest.mark.parametrize("text", ["budget: {flops: 0.5}", "rules: energy", "budget: [", "seed: many"])
def test_a_file_that_is_no_recipe(tenfold: Run, tiny: str, text: str) -> None:
    Path("recipe.yaml").write_text(text)
    word = text.partition(":")[2].strip(" {").partition(":")[0] if "flops" in text else text.partition(":")[0]
    assert tenfold("plan", "--task", tiny, "--recipe", "recipe.yaml").is_error(word if "[" not in text else "YAML")
    assert tenfold("plan", "--task", tiny, "--recipe", "none.yaml").is_error("--recipe none.yaml", "No such file")


def test_a_budget_of_a_part(tenfold: Run, tiny: str) -> None:
    recipe = planned(tenfold, tiny, "--budget-of", "0:macs=0.6,params=0.7")
    assert recipe.budget_of == {"0": Budget(macs=0.6, params=0.7)}
    assert tenfold("plan", "--task", tiny, "--budget-of", "macs=0.6").is_error("PATTERN:BUDGET", code=2)
    assert tenfold("plan", "--task", tiny, "--budget-of", "nowhere.*:macs=0.6").is_error("no layer matches 'nowhere.*'")


@pytest.mark.parametrize("command", ["compress", "plan", "stages", "train"])
@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--budget", "flops=0.5"),
        ("--budget", "macs=2"),
        ("--rule", "enrgy"),
        ("--rule", "ratio", "--set", "shape=0.5"),
        ("--formats", "tuker2"),
        ("--algorithms", "low_rank=hooi"),
        ("--checkpoint", "nofolder"),
        ("--device", "abacus"),
    ],
)
def test_all_is_checked_before_any_work(
    tenfold: Run, monkeypatch: pytest.MonkeyPatch, command: str, args: tuple[str, ...]
) -> None:
    """Nothing is trained, loaded or read for a command that cannot be carried out."""
    monkeypatch.setattr(Task, "dense", lambda *a, **k: pytest.fail("the model was opened"))
    task = () if "--checkpoint" in args else ("--task", "digits")
    budget = () if not args or "--budget" in args else ("--budget", "macs=0.5")
    outcome = tenfold(command, *task, *budget, *args, "--out", "out")
    misuse = "--algorithms" in args
    word = (args or ("budget",))[-1].split("=")[-1 if misuse else 0]
    assert outcome.is_error(word, code=2 if misuse else 1)


def test_names_with_commas(tenfold: Run, tiny: str, file: Path) -> None:
    texts = ("--formats", "low_rank, tucker2", "--keep", "0,2", "--algorithms", "low_rank=svd,tucker2=hosvd")
    made = planned(tenfold, tiny, "--recipe", file, *texts)
    assert (made.formats, made.keep) == (("low_rank", "tucker2"), ("0", "2"))
    assert made.algorithms == {"low_rank": {"name": "svd"}, "tucker2": {"name": "hosvd"}}


def test_every_field_of_the_fine_tuning_is_an_option(tenfold: Run) -> None:
    shown = tenfold("tune", "--help").out
    assert [name for name in TuneConfig.model_fields if f"--{name.replace('_', '-')}" not in shown] == []


def test_every_option_is_explained() -> None:
    bare = []
    for command in build().registered_commands:
        signature = vars(command.callback)["__signature__"]
        for name, parameter in signature.parameters.items():
            (declared,) = getattr(parameter.annotation, "__metadata__", (None,))
            if declared is not None and not declared.help:
                bare.append(f"{command.name} {name}")
    assert bare == []


def test_names_are_completed() -> None:
    formats, rules = completion("formats"), completion("rule")
    assert formats is not None
    assert rules is not None
    assert formats("low_rank,tucker2") == ["low_rank,tucker2"]
    assert rules("acc") == ["accuracy_drop"]
    assert completion("seed") is None
