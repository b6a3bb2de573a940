"""The commands from end to end, on a network that takes no time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tenfold as package
from tenfold.records import Plan, Profile, RunRecord

Run = Callable[..., Any]
COMMANDS = ("profile", "plan", "compress", "tune", "eval", "list", "demo")
QUICK = ("--no-latency", "--no-tune", "--out", "out")


def test_help_names_the_commands_in_order_of_use(tenfold: Run) -> None:
    outcome = tenfold("--help")
    places = [outcome.out.index(f" {name} ") for name in COMMANDS]
    assert outcome.code == 0
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(tenfold: Run, command: str) -> None:
    outcome = tenfold(command, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out


def test_help_does_not_load_torch() -> None:
    code = "import sys\nfrom tenfold.cli import main\nmain(['compress', '--help'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_version(tenfold: Run) -> None:
    assert tenfold("--version").out == f"tenfold {package.__version__}\n"


def test_list_shows_what_is_registered(tenfold: Run) -> None:
    found = tenfold("list", "--json").json
    assert {"formats", "algorithms", "units", "rules", "tasks", "exports", "runtimes"} == set(found)
    assert found["formats"]["tucker2"].startswith("Three convolutions")
    shown = tenfold("list", "rules").out
    assert "energy" in shown
    assert "tucker2" not in shown


def test_profile(tenfold: Run, tiny: str) -> None:
    profile = Profile.model_validate(tenfold("profile", "--task", tiny, "--json").json)
    assert profile.macs == 8 * 24 + 24 * 24 + 24 * 3
    shown = tenfold("profile", "--task", tiny, "--batch-size", "4").out
    assert "Sequential on 4×8" in shown
    assert "Linear 24→24" in shown


def test_compress_from_end_to_end(tenfold: Run, tiny: str) -> None:
    outcome = tenfold(
        "compress", "--task", tiny, "--budget", "macs=0.6", "--latency-batch-size", "7", "--json", "-o", "out"
    )
    found = outcome.json
    assert found.pop("out") == "out"
    record = RunRecord.model_validate(found)
    dense = 8 * 24 + 24 * 24 + 24 * 3
    assert record.before.macs == dense
    assert record.after.macs == record.plan.after.macs <= 0.6 * dense
    assert record.before.latency is not None
    assert record.before.latency.batch_size == 7
    assert list(record.scores) == ["original", "compressed", "tuned"]
    assert record.after.score == record.scores["tuned"]
    assert 0 <= record.after.score <= 1
    assert [epoch["epoch"] for epoch in record.tuning] == [1, 2, 3]
    assert record.command.startswith("tenfold compress --task")
    written = {
        "model.safetensors",
        "plan.yaml",
        "record.json",
        "analysis.json",
        "options.json",
        "README.md",
        "recipe.yaml",
    }
    assert {p.name for p in Path("out").iterdir()} == written
    assert {p.name for p in Path().iterdir()} == {"out"}  # nothing of the tuning is left
    score = tenfold("eval", "--task", tiny, "--checkpoint", "out", "--json").json
    assert score["score"] == record.after.score
    assert score["params"] == record.after.params


def test_tables_go_to_stdout_and_notes_to_stderr(tenfold: Run, tiny: str) -> None:
    outcome = tenfold("compress", "--task", tiny, "--budget", "macs=0.6", "--no-latency", "--out", "out")
    assert "Factorized: " in outcome.out
    assert "best for the whole model" in outcome.out  # the reason
    assert "Saved in out" in outcome.out
    assert "epoch 3/3" in outcome.err
    assert tenfold("compress", "--task", tiny, "--budget", "macs=0.6", "--quiet", *QUICK).err == ""


def test_dry_run_writes_nothing(tenfold: Run, tiny: str) -> None:
    found = tenfold("compress", "--task", tiny, "--budget", "macs=0.6", "--dry-run", "--json").json
    assert found["after"]["macs"] < found["before"]["macs"]
    assert found["after"]["score"] is None
    assert list(Path().iterdir()) == []


def test_an_edited_plan_is_replayed(tenfold: Run, tiny: str) -> None:
    shown = tenfold("plan", "--task", tiny, "--rule", "energy", "--set", "rel_error=0.5").out
    plan = yaml.safe_load(shown)
    (layer,) = (layer for layer in plan["layers"] if layer["path"] == "3")
    assert layer["action"] == "factorize"
    layer["rank"] = {"rank": 2}
    Path("edited.yaml").write_text(yaml.safe_dump(plan))
    found = tenfold("compress", "--task", tiny, "--plan", "edited.yaml", "--json", *QUICK).json
    carried = {layer["path"]: layer for layer in found["plan"]["layers"]}["3"]
    assert carried["rank"] == {"rank": 2}
    assert carried["after"]["macs"] == 2 * (24 + 24)
    assert carried["rel_error"] > 0
    assert Plan.load("out/plan.yaml").layer("3").rank == {"rank": 2}


def test_ranks_by_hand_and_layers_to_keep(tenfold: Run, tiny: str) -> None:
    args = ("--rank", "3=rank:5", "--rank", "re:[05]=2", "--keep", "0", "--formats", "low_rank,tucker2", "--json")
    found = tenfold("plan", "--task", tiny, *args).json
    layers = {layer["path"]: layer for layer in found["plan"]["layers"]}
    assert layers["3"]["rank"] == {"rank": 5}
    assert layers["5"]["rank"] == {"rank": 2}
    assert layers["0"]["action"] == "keep"
    assert "'0'" in layers["0"]["reason"]


def test_a_compressed_model_is_compressed_further_and_tuned_on(tenfold: Run, tiny: str) -> None:
    assert tenfold("compress", "--task", tiny, "--rank", "3=8", *QUICK).code == 0
    again = ("--task", tiny, "--checkpoint", "out", "--rank", "3=4", "--no-latency", "--no-tune", "--out", "less")
    assert tenfold("compress", *again).code == 0
    tuned = tenfold("tune", "--task", tiny, "--checkpoint", "less", "--epochs", "2", "--out", "tuned", "--json").json
    assert [epoch["epoch"] for epoch in tuned["tuning"]] == [1, 2]
    assert set(tuned["scores"]) == {"original", "before tuning", "tuned"}
    assert Plan.load("tuned/plan.yaml") == Plan.load("less/plan.yaml")
    assert tenfold("eval", "--task", tiny, "--checkpoint", "tuned", "--json").json["score"] == tuned["after"]["score"]


def test_the_dense_model_teaches(tenfold: Run, tiny: str, weights: Callable[..., Path]) -> None:
    args = ("--task", tiny, "--rank", "3=6", "--no-latency", "--epochs", "1", "--json")
    runs = [
        (),
        ("--distill", "0.9"),
        ("--distill", "0.9", "--temperature", "1"),
        ("--label-free", "--calibration-samples", "64"),
    ]
    found = [tenfold("compress", *args, *how, "--out", f"out{i}").json for i, how in enumerate(runs)]
    assert len({run["tuning"][0]["loss"] for run in found}) == len(runs)
    assert found[1]["settings"]["distillation"] == {"share": 0.9, "temperature": 4.0, "samples": None}
    assert found[3]["settings"]["distillation"] == {"share": 1.0, "temperature": 4.0, "samples": 64}
    assert [run["settings"]["tuning"]["freeze_norms"] for run in found] == [False, False, False, True]
    again = ("tune", "--task", tiny, "--checkpoint", "out0", "--epochs", "1", "--out", "taught", "--distill", "0.5")
    assert tenfold(*again).is_error("--teacher", code=2)
    assert tenfold(*again, "--teacher", weights()).code == 0


def test_what_cannot_be_taught_together(tenfold: Run, tiny: str) -> None:
    args = ("compress", "--task", tiny, "--rank", "3=6", "--no-latency", "--epochs", "1", "--label-free")
    assert tenfold(*args, "--distill", "0.5").is_error("not both", code=2)
    assert tenfold(*args, "--calibration-samples", "0").is_error("--calibration-samples", code=2)
    assert list(Path().iterdir()) == []


def test_the_cache_of_activations_has_a_bound_that_changes_nothing(tenfold: Run, tiny: str) -> None:
    args = ("compress", "--task", tiny, "--budget", "macs=0.6", "--calibration-samples", "64", *QUICK)
    assert tenfold(*args, "--max-cache", "much").is_error("cannot read the size 'much'", "512MiB")
    assert not Path("one").exists()
    for out, size in (("one", "4GiB"), ("other", "1kB")):
        assert tenfold(*args, "--max-cache", size, "--out", out).code == 0
    assert Plan.load("one/plan.yaml") == Plan.load("other/plan.yaml")


def test_a_checkpoint_of_a_task_with_code_of_its_own_does_not_run_it(tenfold: Run, tiny: str) -> None:
    assert tenfold("compress", "--task", tiny, "--rank", "3=8", *QUICK).code == 0
    assert tenfold("eval", "--checkpoint", "out").is_error("--task", "tiny_task.py")


def test_a_killed_run_is_resumed_to_the_same_end(tenfold: Run, tiny: str) -> None:
    task = f"{tiny}:killed"
    exact = ["--no-latency", "--threads", "1", "--train-as", "factors"]  # nothing is left to the clock
    args = ["compress", "--task", task, "--rank", "3=8", *exact, "--out", "out"]
    Path("armed").touch()
    died = subprocess.run([sys.executable, "-m", "tenfold", *args], capture_output=True, text=True, check=False)
    assert died.returncode == -9
    assert {p.name for p in Path().iterdir()} == {"armed", ".out.tuning"}
    Path("armed").unlink()
    resumed = tenfold(*args)
    assert "resuming after epoch 1 of 3" in resumed.err
    assert {p.name for p in Path().iterdir()} == {"out"}
    whole = tenfold(*args[:-1], "whole")
    assert "resuming" not in whole.err
    from tenfold.checkpoint import read_weights

    ends = [read_weights(Path(name, "model.safetensors"))[0] for name in ("out", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_run_killed_between_blocks_is_resumed_to_the_same_end(tenfold: Run, tiny: str) -> None:
    task = tiny.replace(":Tiny", ":TinyBlocks")
    args = ["compress", "--task", task, "--rank", "1.?.0=6", "--calibration-refine", "8", *QUICK, "--threads", "1"]
    Path("armed").touch()
    died = subprocess.run([sys.executable, "-m", "tenfold", *args], capture_output=True, text=True, check=False)
    assert died.returncode == -9, died.stderr
    assert {p.name for p in Path().iterdir()} == {"armed", ".out.tuning"}
    Path("armed").unlink()
    assert "resuming after block 1 of 2" in tenfold(*args).err
    assert {p.name for p in Path().iterdir()} == {"out"}
    ends = [Path("out/model.safetensors").read_bytes()]
    assert "resuming" not in tenfold(*args).err
    ends.append(Path("out/model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_warnings_are_one_line_each_and_once(tenfold: Run, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from tenfold.cli.terminal import Terminal

    with Terminal().session():
        for _ in range(3):
            warnings.warn("much\nto do", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "tenfold: warning: much to do\n"


@pytest.mark.parametrize(
    "rule", [("error", "--set", "rel_error=0.6"), ("ratio", "--set", "share=0.5"), ("global", "--budget", "macs=0.6")]
)
def test_what_is_planned_is_what_compress_does(tenfold: Run, tiny: str, rule: tuple[str, ...]) -> None:
    """Data decide on ranks and algorithms in the same way, whether or not the plan is carried out at once."""
    args = ("--task", tiny, "--rule", *rule, "--formats", "low_rank", "--no-keep-ends", "--json")

    def decisions(*command: str) -> dict[str, tuple[Any, ...]]:
        layers = tenfold(*command, *args).json["plan"]["layers"]
        named = {layer["path"]: (layer["algorithm"] or {}).get("name") for layer in layers}  # few rows want more ridge
        return {layer["path"]: (layer["action"], layer["rank"], named[layer["path"]]) for layer in layers}

    done = decisions("compress", *QUICK)
    assert {algorithm for _, _, algorithm in done.values()} <= {"whitened_svd", None}
    assert any(algorithm for _, _, algorithm in done.values())
    assert decisions("compress", "--dry-run") == decisions("plan") == done
