"""What a newcomer types first: nothing at all, `list`, half a word and Tab, the name of a family."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.cli.commands import list as listing
from tenfold.cli.values import completion
from tenfold.errors import UnknownNameError
from tenfold.formats import FORMATS
from tenfold.records import DEFAULT_FORMATS, Recipe
from tenfold.records.families import FAMILIES
from tests.cli.conftest import Run

KINDS = ("formats", "algorithms", "units", "rules", "tasks", "exports", "runtimes")


def test_without_a_command_help_is_shown_and_nothing_is_wrong(tenfold: Run) -> None:
    outcome = tenfold()
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: tenfold" in outcome.out
    assert "compress" in outcome.out


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_fits_on_a_screen(tenfold: Run, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines = tenfold("list", kind).out.splitlines()
    assert lines[0] == f"{kind}:"
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_defaults_and_extras_are_marked(tenfold: Run) -> None:
    lines = tenfold("list").out.splitlines()
    default = {line[2:].split()[0] for line in lines if line.startswith("* ")}
    assert {*DEFAULT_FORMATS, "global", "onnx", "torch", "svd", "whitened_svd", "mlp_width"} <= default
    assert {"energy", "block_term", "digits", "openvino"} & default == set()
    (vision,) = [line for line in lines if line.startswith("  torchvision ")]
    assert "[vision]" in vision


def test_the_extra_of_a_task_is_one_that_its_files_ask_for() -> None:
    """The mark is of use only if installing the extra is what an error would ask for."""
    from tenfold.tasks import TASKS

    asked = {"cifar10": "parquet", "mnist": "parquet", "moving_mnist": "parquet", "digits": "digits"}
    asked |= {"timm": "vision_zoo", "torchvision": "vision_zoo", "hf": "transformers_zoo"}
    for name, module in asked.items():
        source = Path(str(importlib.import_module(f"tenfold.tasks.{module}").__file__)).read_text(encoding="utf-8")
        assert f', "{TASKS.get(name).extra}")' in source, name
    assert {name for name, task in TASKS.items() if task.extra} >= set(asked)


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    script = f"{sys.executable} -u -m tenfold list | {sys.executable} -c 'input()'; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == ""
    assert done.returncode in {0, 141}  # by whether all was written before the reader left
    closed = f"{sys.executable} -m tenfold list --json | true; exit ${{PIPESTATUS[0]}}"  # written when nobody reads
    done = subprocess.run(["/bin/bash", "-c", closed], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("option", "typed", "found"),
    [
        ("formats", "low_rank,tuck", ["low_rank,tucker1", "low_rank,tucker2", "low_rank,tucker_cp", "low_rank,tucker"]),
        ("rule", "ev", ["evbmf"]),
        ("runtime", "onnx", ["onnxruntime", "onnxruntime-int8"]),
        ("task", "mn", ["mnist", "mnist14"]),
        ("to", "on", ["onnx"]),
        ("algorithms", "tucker2=ho", ["tucker2=hooi", "tucker2=hosvd"]),
        ("set", "rel", ["rel_error="]),
        ("budget", "macs=0.5,max_p", ["macs=0.5,max_params="]),
        ("device", "cu", ["cuda"]),
    ],
)
def test_values_are_completed(option: str, typed: str, found: list[str]) -> None:
    complete = completion(option)
    assert complete is not None
    assert complete(typed) == found


@pytest.mark.parametrize(("family", "formats"), FAMILIES.items())
def test_families_are_understood_and_what_they_became_is_said(
    tenfold: Run, tiny: str, family: str, formats: tuple[str, ...]
) -> None:
    assert Recipe(formats=(family,)).formats == formats
    assert all(FORMATS.get(name) for name in formats)
    outcome = tenfold("plan", "--task", tiny, "--budget", "macs=0.6", "--formats", family, "--json", "-q")
    if outcome.code == 0:  # some serve no linear layer
        assert json.loads(outcome.out)["plan"]["recipe"]["formats"] == list(formats)
    said = tenfold("sensitivity", "--task", tiny, "--formats", family, "--calibration-samples", "0", "--ranks", "1").err
    assert f"tenfold: formats: {family} is a family, which stands for {' and '.join(formats)}\n" in said


def test_one_format_is_asked_for_where_a_family_is_too_much() -> None:
    with pytest.raises(UnknownNameError, match="svd is a family, which stands for low_rank and spatial: name one"):
        FORMATS.get("svd")


def test_what_is_missing_is_said_before_the_model_is_opened(
    tenfold: Run, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    half = ("--task", tiny, "--budget", "macs=0.6")
    for command, extra in (
        (("plan", *half, "--plot", "curve.png"), "plots"),
        (("sensitivity", "--task", tiny, "--plot", "curve.png"), "plots"),
        (("compress", *half, "--runtime", "onnxruntime"), "export"),
        (("export", "--task", tiny, "--out", "model.onnx"), "export"),
        (("bench", "dense", "dense", "--task", tiny, "--runtime", "onnxruntime"), "export"),
    ):
        outcome = tenfold(*command)
        assert outcome.is_error(f"tenfold[{extra}]")
        assert "open the model" not in outcome.err
    assert list(Path().iterdir()) == []


def test_listing_knows_every_kind(tenfold: Run) -> None:
    assert set(tenfold("list", "--json").json) == set(KINDS)
    assert set(listing._defaults()) == set(KINDS)
