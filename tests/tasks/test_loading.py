from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tenfold.errors import TenfoldError, UnknownNameError
from tenfold.tasks import TASKS, Task, load_task
from tenfold.training import TuneConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task.py"

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from helper_beside import LENGTH
from tenfold.tasks import TASKS, InMemoryTask, TensorSet

@dataclass
class Setting:
    length: int = LENGTH

@TASKS.register("NAME")
class Own(InMemoryTask):
    name, variants, input_shape = "NAME", ("a", "b"), (LENGTH,)
    def architecture(self): raise NotImplementedError
    def pretrained(self): raise NotImplementedError
    def read(self, split): raise NotImplementedError

class Half(InMemoryTask):
    def read(self, split): raise NotImplementedError

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))
    for name in ("helper_beside", "own_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "helper_beside.py").write_text("LENGTH = 7")
    (tmp_path / "own_module.py").write_text(OWN.replace("NAME", "own"))
    return tmp_path / "own_module.py"


def test_registered_names_are_those_of_the_classes_and_summarised() -> None:
    assert {"cifar10", "digits"} <= set(TASKS.names())
    for name, cls in TASKS.items():
        assert cls.name == name
        assert TASKS.summary(name).endswith(".")
        TuneConfig(**cls().tune_settings)


@pytest.mark.parametrize(("text", "id_"), [("digits", "digits"), ("cifar10", "cifar10:resnet20")])
def test_a_registered_name_and_its_default(text: str, id_: str) -> None:
    task = load_task(text, seed=4)
    assert task.id == id_
    assert load_task(task.id).id == id_
    assert task.describe()["seed"] == 4


def test_a_class_in_a_file_with_its_variant_and_imports_beside_it(own: Path) -> None:
    path = list(sys.path)
    task = load_task(f"{own}:Own:b", data="~/x", seed=2)
    assert (task.id, task.input_shape, task.seed) == ("own:b", (7,), 2)
    assert task.data == Path.home() / "x"
    assert type(load_task(f"{own}:Own")) is type(task), "a file runs once, or its registration would clash"
    assert sys.path == path


def test_a_class_in_a_module_of_the_working_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    assert load_task("own_module:Own:b").id == "own:b"
    assert isinstance(load_task("own_module:Own"), Task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifr10:resnet20", "unknown task 'cifr10'.*Did you mean cifar10"),
        ("nonsense", "unknown task 'nonsense'.*Known: cifar10.*NAME"),
        ("no.such.module:Task", "no module 'no.such.module'"),
        ("cifar10:resnet57", "no variant 'resnet57'. Did you mean resnet56"),
        ("digits:large", "no variant 'large'. Write 'digits' alone"),
        ("{own}:Onw", "own_module.py has no task 'Onw'. Did you mean Own"),
        ("{own}", "own_module.py has no task ''. Known: .*Own"),
        ("{own}:Own:c", "no variant 'c'. Known: a, b"),
        ("{folder}/own_modul.py:Own", "no task file .*own_modul.py. Did you mean own_module.py"),
        ("/no/such/folder/x.py:Own", "no task file /no/such/folder/x.py\\.$"),
    ],
)
def test_what_does_not_exist_is_named_with_near_names(own: Path, text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_task(text.format(own=own, folder=own.parent))


@pytest.mark.parametrize(
    ("name", "message"),
    [("number", "number in .* is not a task"), ("Half", "lacks architecture, name")],
)
def test_what_is_no_task_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(TenfoldError, match=message):
        load_task(f"{own}:{name}")


def test_a_file_that_fails_says_so_in_one_line_and_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1/0")
    with pytest.raises(
        TenfoldError, match=r"broken.py failed while being imported: ZeroDivisionError: division by zero"
    ):
        load_task(f"{path}:Task")
    path.write_text("x = 1")
    with pytest.raises(UnknownNameError, match="no task 'Task'"):
        load_task(f"{path}:Task")


def test_the_example_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "waves:narrow" in capsys.readouterr().out
    assert load_task(f"{EXAMPLE}:Waves:wide").id == "waves:wide"
