"""explore, and what plan and compress leave for it, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenfold.explorer import Explorer, Query
from tenfold.explorer.server import Service
from tenfold.explorer.table_files import free_name, read_options
from tenfold.records import Plan
from tests.reporting import runs

Run = Callable[..., Any]
COMPRESS = ("--no-tune", "--no-latency", "--no-eval")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Service, dict[str, Any]]]:
    """Return what would have been served, and how: nothing is."""
    found: list[tuple[Service, dict[str, Any]]] = []

    def serve(service: Service, *, ready: Callable[[str], None], **options: Any) -> None:
        ready("http://127.0.0.1:1/token/")
        found.append((service, options))

    monkeypatch.setattr("tenfold.explorer.server.serve", serve)
    return found


def test_plan_then_explore_then_compress(tenfold: Run, tiny: str, served: list[Any]) -> None:
    made = tenfold("plan", "--task", tiny, "--budget", "macs=0.6", "--out", "plans/half.yaml")
    assert made.code == 0, made.err
    assert "tenfold explore plans/half.yaml" in made.out
    assert tenfold("explore", "plans/half.yaml", "--json", "--port", "0", "--no-browser").json == {
        "url": "http://127.0.0.1:1/token/",
        "out": "plans/explored.yaml",
    }
    ((service, options),) = served
    assert options == {"port": 0, "browser": False}
    assert service.explorer.plan(Query(budget={"macs": 0.6})) == Plan.load("plans/half.yaml")
    query = Query(budget={"macs": 0.5})
    told = service.save(query)
    assert told["command"] == "tenfold compress --plan plans/explored.yaml ..."
    done = tenfold("compress", "--task", tiny, *COMPRESS, "--plan", told["out"], "--out", "small")
    assert done.code == 0, done.err
    wanted = service.explorer.select(query)
    carried_out = Plan.load("small/plan.yaml")
    assert carried_out.after == wanted.cost
    assert [x.rank for x in carried_out.factorized] == [p.rank for p in wanted.picks if p.format]
    assert tenfold("explore", "small").is_error("has no options.json", "tenfold plan", "explore plan.yaml")


def test_another_budget_on_the_command_line_is_what_the_explorer_said(tenfold: Run, tiny: str) -> None:
    for name, budget in (("a", "macs=0.6"), ("b", "macs=0.5")):
        assert tenfold("plan", "--task", tiny, "--budget", budget, "--out", f"{name}.yaml").code == 0
    explorer = Explorer(read_options("a.yaml"))
    assert explorer.plan(Query(budget={"macs": 0.5})) == Plan.load("b.yaml")


def test_compress_leaves_options(tenfold: Run, tiny: str, served: list[Any]) -> None:
    for _ in range(2):  # over an earlier checkpoint too
        done = tenfold("compress", "--task", tiny, "--budget", "macs=0.6", *COMPRESS, "--out", "small")
        assert done.code == 0, done.err
        assert "options.json" in done.out
    shown = tenfold("explore", "small")
    assert f"Exploring {tiny} at http://127.0.0.1:1/token/" in shown.out
    assert served[0][0].out == Path("small/explored.yaml")
    assert served[0][0].command == f"tenfold compress --task {tiny} --plan small/explored.yaml ..."
    rank = {layer.path: layer.rank for layer in Plan.load("small/plan.yaml").factorized}
    assert {pick.path: pick.rank for pick in served[0][0].explorer.start.picks if pick.format} == rank
    again = tenfold("compress", "--task", tiny, "--rule", "ratio", "--budget", "macs=0.6", *COMPRESS, "--out", "small")
    assert again.code == 0, again.err
    assert not Path("small/options.json").exists()  # of the plan before


def test_plans_by_other_rules_leave_none(tenfold: Run, tiny: str) -> None:
    Path("half.options.json").write_text("{}", encoding="utf-8")  # of an earlier plan of that name
    made = tenfold("plan", "--task", tiny, "--rule", "ratio", "--budget", "macs=0.6", "--out", "half.yaml")
    assert "explore" not in made.out
    assert not Path("half.options.json").exists()
    assert tenfold("explore", "half.yaml").is_error("half.options.json", "rule global")


def test_explore_of_nothing(tenfold: Run, tmp_path: Path) -> None:
    assert tenfold("explore", "nowhere").is_error("nothing at nowhere")
    assert tenfold("explore", runs.write(tmp_path / "half")).is_error("has no options.json", "tenfold plan")
    (tmp_path / "half" / "options.json").write_text('{"version": 9}', encoding="utf-8")
    assert tenfold("explore", tmp_path / "half").is_error("options.json", "is not an option table")
    assert tenfold("explore", tmp_path / "half", "--out", tmp_path).is_error("is a folder", code=2)
    assert tenfold("explore", tmp_path / "half", "--port", "70000").is_error("--port", code=2)


def test_saved_plans_do_not_replace_each_other(tmp_path: Path) -> None:
    for name in ("explored.yaml", "explored-2.yaml", "explored-3.yaml"):
        assert free_name(tmp_path / "explored.yaml").name == name
        (tmp_path / name).touch()


def test_newer_options_are_refused(tenfold: Run, tiny: str) -> None:
    assert tenfold("plan", "--task", tiny, "--budget", "macs=0.6", "--out", "half.yaml").code == 0
    file = Path("half.options.json")
    newer = json.loads(file.read_text(encoding="utf-8")) | {"version": 99}
    file.write_text(json.dumps(newer), encoding="utf-8")
    assert tenfold("explore", "half.yaml").is_error("upgrade tenfold")


def test_recurrent_networks_are_explored_open(tenfold: Run) -> None:
    """Their matrices have candidates also where the plan left the network closed; compress opens what needs it."""
    task = str(Path(__file__).parent / "recurrent_task.py") + ":Series"
    assert tenfold("plan", "--task", task, "--budget", "macs=0.99", "--out", "most.yaml").code == 0
    explorer = Explorer(read_options("most.yaml"))
    assert [layer.path for layer in explorer.table.eligible if layer.path.startswith("rnn.cells.")]
    small = explorer.plan(Query(budget={"macs": 0.7}))
    small.save("explored.yaml")
    done = tenfold("compress", "--task", task, *COMPRESS, "--plan", "explored.yaml", "--out", "small")
    assert done.code == 0, done.err
    assert Plan.load("small/plan.yaml").after == small.after
