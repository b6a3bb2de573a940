"""Bad input of every kind: one clear line, the right exit code, nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

Run = Callable[..., Any]
Weights = Callable[..., Path]

HALF = ("--budget", "macs=0.5", "--no-latency", "--out", "out")


def left() -> set[str]:
    """Return the names of what lies in the working folder, hidden files too."""
    return {path.name for path in Path().iterdir()}


def test_missing_file(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--weights", "none.safetensors", *HALF)
    assert outcome.is_error("none.safetensors")
    assert left() == set()


def test_weights_of_another_shape(tenfold: Run, tiny: str, weights: Weights) -> None:
    file = weights(**{"3__weight": torch.zeros(24, 23)})
    outcome = tenfold("compress", "--task", tiny, "--weights", file, *HALF)
    assert outcome.is_error("3.weight", "(24, 23)", "(24, 24)")
    assert left() == {file.name}


def test_weights_of_another_dtype(tenfold: Run, tiny: str, weights: Weights) -> None:
    file = weights(**{"3__weight": torch.ones(24, 24, dtype=torch.int8)})
    outcome = tenfold("eval", "--task", tiny, "--weights", file)
    assert outcome.is_error("3.weight", "int8")


def test_nan_weights(tenfold: Run, tiny: str, weights: Weights) -> None:
    bad = torch.ones(24, 24)
    bad[0, :2] = float("nan")
    file = weights(**{"3__weight": bad})
    outcome = tenfold("compress", "--task", tiny, "--weights", file, *HALF)
    assert outcome.is_error("3.weight", "2 of the 576")
    assert left() == {file.name}


def test_unknown_layer_to_keep(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--keep", "layer3", *HALF)
    assert outcome.is_error("layer3")
    assert left() == set()


@pytest.mark.parametrize(
    ("given", "said", "code"),
    [
        (("--units", "mlp_widht"), "Did you mean mlp_width", 1),
        (("--units", "mlp_width", "--rule", "ratio"), "the rule ratio chooses no units", 2),
        (("--units", "mlp_width", "--calibration-method", "none"), "need data", 2),
    ],
)
def test_units_that_cannot_be_chosen(tenfold: Run, tiny: str, given: tuple[str, ...], said: str, code: int) -> None:
    assert tenfold("compress", "--task", tiny, *given, *HALF).is_error(said, code=code)
    assert left() == set()


@pytest.mark.parametrize(
    ("given", "said", "code"),
    [
        (("plan", "--budget"), "See tenfold plan --help", 2),
        (("--budget",), "See tenfold --help", 2),
        (("report", "plan.yaml"), "is not JSON: Expecting value: line 1 column 1 (char 0). Give a folder", 1),
        (("plan", "--task", "digits", "--budget", "flops=0.5"), "does not name flops. Known: params, macs", 1),
    ],
)
def test_the_remedy_is_named_once(tenfold: Run, given: tuple[str, ...], said: str, code: int) -> None:
    Path("plan.yaml").write_text("layers: []\n")
    assert tenfold(*given).is_error(said, code=code)


def test_unknown_layer_in_a_plan(tenfold: Run, tiny: str) -> None:
    assert tenfold("plan", "--task", tiny, "--budget", "macs=0.5", "--out", "plan.yaml").code == 0
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    plan["layers"][0]["path"] = "nowhere"
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    outcome = tenfold("compress", "--task", tiny, "--plan", "plan.yaml", "--out", "out")
    assert outcome.is_error("nowhere")
    assert left() == {"plan.yaml", "options.json"}


@pytest.mark.parametrize("rank", ["3=99", "3=0", "3=rank:99", "3=out:4"])
def test_impossible_rank(tenfold: Run, tiny: str, rank: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--rank", rank, "--out", "out")
    assert outcome.is_error("rank")
    assert left() == set()


def test_impossible_rank_in_a_plan(tenfold: Run, tiny: str) -> None:
    assert tenfold("plan", "--task", tiny, "--rank", "3=4", "--out", "plan.yaml").code == 0
    text = Path("plan.yaml").read_text()
    assert "rank: 4" in text
    Path("plan.yaml").write_text(text.replace("rank: 4", "rank: 400"))
    assert tenfold("compress", "--task", tiny, "--plan", "plan.yaml", "--out", "out").is_error("400", "1..24")
    assert left() == {"plan.yaml"}


def test_truncated_checkpoint(tenfold: Run, tiny: str) -> None:
    assert tenfold("compress", "--task", tiny, "--no-tune", *HALF).code == 0
    file = Path("out/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    outcome = tenfold("eval", "--task", tiny, "--checkpoint", "out")
    assert outcome.is_error("model.safetensors", "damaged")


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/tenfold/out"])
def test_unwritable_folder(tenfold: Run, tiny: str, out: str) -> None:
    Path("file").write_text("not a folder")
    outcome = tenfold("compress", "--task", tiny, "--budget", "macs=0.5", "--out", out)
    assert outcome.is_error("/proc" if out.startswith("/") else "file")
    assert left() == {"file"}
    assert Path("file").read_text() == "not a folder"


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_plan_that_cannot_be_written(tenfold: Run, tiny: str, how: tuple[str, ...]) -> None:
    Path("file").write_text("not a folder")
    outcome = tenfold("plan", "--task", tiny, "--budget", "macs=0.5", "--out", "file/plan.yaml", *how)
    assert outcome.is_error("file")
    outcome = tenfold("plan", "--task", tiny, "--budget", "macs=0.5", "--out", "/proc/plan.yaml", *how)
    assert outcome.is_error("/proc/plan.yaml")
    assert left() == {"file"}


def test_a_folder_of_other_files_is_left_alone(tenfold: Run, tiny: str) -> None:
    Path("out").mkdir()
    Path("out/model.safetensors").write_text("somebody's own")
    assert tenfold("compress", "--task", tiny, *HALF).is_error("out holds other files")
    assert Path("out/model.safetensors").read_text() == "somebody's own"


@pytest.mark.parametrize("command", ["eval", "compress"])
def test_empty_data(tenfold: Run, tiny: str, command: str) -> None:
    outcome = tenfold(command, "--task", f"{tiny}:empty", *(HALF if command == "compress" else ()))
    assert outcome.is_error("0 samples")
    assert left() == set()


def test_missing_data(tenfold: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from tenfold.tasks import load_task

    save_file(load_task("cifar10:resnet20").build().state_dict(), "w.safetensors")
    outcome = tenfold("eval", "--task", "cifar10:resnet20", "--weights", "w.safetensors", "--data", tmp_path / "no")
    assert outcome.is_error("cifar10")


def test_interrupt(tenfold: Run, tiny: str) -> None:
    Path("armed").touch()
    outcome = tenfold("compress", "--task", f"{tiny}:interrupted", *HALF)
    assert outcome.is_error("interrupted", "the same command goes on", code=130)
    assert left() == {"armed", ".out.tuning"}


def test_an_error_of_the_task_itself_is_one_line_and_debug_shows_where(tenfold: Run, tiny: str) -> None:
    Path("armed").touch()
    outcome = tenfold("compress", "--task", f"{tiny}:broken", *HALF)
    assert outcome.is_error("ZeroDivisionError: by the task itself", "--debug")
    outcome = tenfold("compress", "--task", f"{tiny}:broken", "--debug", *HALF)
    assert outcome.code == 1
    assert "_go_wrong" in outcome.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nonsense",), ("nonsense",)),
        (("compress", "--frobnicate"), ("--frobnicate",)),
        (("compress",), ("--task",)),
        (("tune", "--task", "digits"), ("--checkpoint", "--out")),
        (("compress", "--task", "digits", "--epochs", "2", "--no-tune"), ("--no-tune",)),
        (("compress", "--task", "digits", "--seed", "many"), ("--seed", "integer")),
        (("eval", "--task", "digits", "--weights", "a", "--checkpoint", "b"), ("--weights", "--checkpoint")),
        (("list", "colours"), ("colours",)),
    ],
)
def test_wrong_usage(tenfold: Run, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert tenfold(*args).is_error(*words, "--help", code=2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--budget", "macs=half"), ("macs=half", "macs=0.5")),
        (("--budget", "flops=0.5"), ("flops",)),
        (("--budget", "macs=0.0001"), ("budget",)),
        ((), ("budget",)),
        (("--rule", "enrgy"), ("enrgy", "energy")),
        (("--rule", "ratio", "--set", "shape=0.5"), ("shape",)),
        (("--rule", "ratio", "--set", "share=most"), ("share",)),
        (("--formats", "tuker2", "--budget", "macs=0.5"), ("tuker2", "tucker2")),
        (("--budget", "macs=0.5", "--device", "abacus"), ("abacus",)),
        (("--budget", "macs=0.5", "--lr", "-1"), ("lr",)),
        (("--budget", "macs=0.5", "--calibration-samples", "9999"), ("9999",)),
        (("--plan", "nowhere.yaml"), ("nowhere.yaml",)),
    ],
)
def test_choices_that_cannot_be(tenfold: Run, tiny: str, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert tenfold("compress", "--task", tiny, "--out", "out", *args).is_error(*words)
    assert left() == set()


def test_plan_decides_alone(tenfold: Run, tiny: str) -> None:
    Path("plan.yaml").write_text("")
    outcome = tenfold("compress", "--task", tiny, "--plan", "plan.yaml", "--budget", "macs=0.5")
    assert outcome.is_error("--budget", code=2)


@pytest.mark.parametrize("task", ["digts", "no.module:Task", "nowhere.py:Task", "digits:big"])
def test_unknown_task(tenfold: Run, task: str) -> None:
    assert tenfold("eval", "--task", task).is_error(task.split(":", maxsplit=1)[0])


@pytest.mark.parametrize("option", ["--out", "--data", "--weights", "--plan", "--checkpoint"])
def test_what_is_not_utf8_is_refused_before_any_work(tenfold: Run, tiny: str, option: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--budget", "macs=0.5", option, os.fsdecode(b"out\xff"))
    assert outcome.is_error(r"'out\udcff' is not UTF-8", code=2)
    assert left() == set()


@pytest.mark.parametrize(
    "args",
    [
        ("plan", "--budget", "macs=0.5", "--out", "file/plan.yaml"),
        ("plan", "--budget", "macs=0.5", "--plot", "file/plot.png"),
        ("plan", "--rule", "accuracy_drop", "--budget", "macs=0.5", "--table", "file/table.json"),
        ("sensitivity", "--out", "file/table.json"),
        ("sensitivity", "--plot", "file/plot.png"),
        ("stages", "--budget", "macs=0.5", "--out", "out", "--run", "file/run"),
        ("train", "--budget", "macs=0.5", "--out", "file/out"),
        ("export", "--out", "file/net.onnx"),
    ],
)
def test_outputs_are_checked_before_the_work(
    tenfold: Run, tiny: str, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenfold.cli.source import Opened

    monkeypatch.setattr(Opened, "model", property(lambda _: 1 / 0))  # not even this has begun
    Path("file").write_text("not a folder")
    assert tenfold(args[0], "--task", tiny, *args[1:]).is_error("cannot write", "file")
    assert left() == {"file"}


def test_a_second_run_for_the_same_folder_is_told(tenfold: Run, tiny: str) -> None:
    from tenfold.files import in_use

    Path(".out.tuning").mkdir()
    with in_use(Path(".out.tuning/.lock"), Path("out")):
        outcome = tenfold("compress", "--task", tiny, *HALF)
        assert outcome.is_error("out is in use by process", str(os.getpid()))
    assert tenfold("compress", "--task", tiny, "--no-tune", *HALF).code == 0
    assert left() == {"out"}


@pytest.mark.parametrize("value", ["share=" + "9" * 5000, "share=[" + "[" * 500, "share={a: 1, a: 2}"])
def test_odd_settings(tenfold: Run, tiny: str, value: str) -> None:
    assert tenfold("compress", "--task", tiny, "--rule", "ratio", "--set", value, "--out", "out").code in (1, 2)
    assert left() == set()


@pytest.mark.parametrize("seed", [str(2**63), str(10**30)])
@pytest.mark.parametrize("command", ["compress", "eval", "profile"])
def test_seeds_that_no_generator_takes(tenfold: Run, tiny: str, command: str, seed: str) -> None:
    budget = ("--budget", "macs=0.5") if command == "compress" else ()
    outcome = tenfold(command, "--task", tiny, "--seed", seed, *budget)
    assert outcome.code in (1, 2)
    assert "--seed" in outcome.err
    assert "Traceback" not in outcome.err


def test_convert(tenfold: Run, tiny: str) -> None:
    import torch
    from safetensors.torch import load_file

    from tenfold.tasks import load_task

    state = {f"module.{name}": tensor for name, tensor in load_task(tiny).build().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "net.pth")
    outcome = tenfold("convert", "net.pth", "net.safetensors", "--json")
    assert outcome.code == 0
    assert outcome.json["key"] == "state_dict"
    assert outcome.json["dropped"] == ["epoch"]
    assert {f"module.{name}" for name in load_file("net.safetensors")} == set(state)
    for weights in ("net.pth", "net.safetensors"):
        assert tenfold("profile", "--task", tiny, "--weights", weights).code == 0
    assert tenfold("convert", "net.pth", "net.safetensors").is_error("net.safetensors exists", "--overwrite")
    assert tenfold("convert", "nowhere.pth", "other.safetensors").is_error("no weights file nowhere.pth")
    missing = ("profile", "--task", "digits", "--weights", "nowhere.safetensors")
    assert tenfold(*missing).is_error("no weights file nowhere.safetensors")
