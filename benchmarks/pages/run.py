"""How large pages are and how long they take: a report of 200 layers opened, a budget moved in the explorer.

    python -m benchmarks.pages.run [--config FILE] [--out FOLDER]

Opening is what headless Chromium says of its navigation, until the load event; its processor time is that of the page's
own thread. An answer is from the query to what the page is sent; the browser's part of it is a fraction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.zoo import build
from tenfold.allocation import pruned
from tenfold.explorer import Explorer, Query
from tenfold.explorer.view import initial_view, selection_view
from tenfold.planning import plan, tabulate
from tenfold.profiling import environment, profile
from tenfold.records import OptionTable, Recipe
from tenfold.reporting.report import write_report
from tenfold.reporting.run_files import read_run
from tests.browser import Browser, chromium
from tests.reporting import runs

HERE = Path(__file__).parent
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def main() -> None:
    """Measure both pages and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "pages.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "benchmark": "pages",
            "report": report(config, Path(folder)),
            "explorer": explorer(config, Path(folder)),
            "environment": json.loads(environment().to_json()),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pages.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "pages.md").write_text(table(result))


def report(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the report of a large run weighs, and how long it takes to open."""
    start = time.perf_counter()
    page = write_report(read_run(runs.write(folder / "large", layers=config["layers"])), folder / "large.html")
    written = time.perf_counter() - start
    with chromium(folder / "profile") as browser:
        browser.ask("Performance.enable", timeDomain="threadTicks")
        browser.size(1280)
        opened = [load(browser, page) for _ in range(config["loads"])]
        assert browser.problems == []
    return {
        "layers": config["layers"],
        "bytes": page.stat().st_size,
        "write_s": round(written, 2),
        "open_ms": spread([ms for ms, _ in opened]),
        "cpu_ms": spread([1000 * seconds for _, seconds in opened]),
        "load": round(os.getloadavg()[0], 2),
    }


def load(browser: Browser, page: Path) -> tuple[float, float]:
    """Return milliseconds until the page is loaded, and seconds that its thread computed."""
    browser.open("about:blank")
    browser.open(page)
    metrics = {m["name"]: m["value"] for m in browser.ask("Performance.getMetrics")["metrics"]}
    return float(browser.run(LOADED)), float(metrics["TaskDuration"])


def explorer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the option table of a network weighs, and how long answers to budgets take."""
    subject = build(config["model"], seed=config["seed"])
    cost = profile(subject.model, subject.inputs)
    recipe = Recipe(budget=config["budgets"][0], formats=config["formats"], seed=config["seed"])
    whole, tabulated = timed(lambda: tabulate(subject.model, cost, recipe))
    file = folder / "options.json"
    table, fewer = timed(lambda: pruned(whole))
    table.save(file)
    (own, opened) = timed(lambda: Explorer(OptionTable.load(file)))
    _, first = timed(lambda: initial_view(own))
    rows = []
    for budget in config["budgets"]:
        query = Query(budget=budget)
        times = [timed(lambda q=query: selection_view(own, own.select(q), q))[1] for _ in range(config["answers"])]
        again, seconds = timed(lambda b=budget: plan(subject.model, cost, recipe.replace(budget=b)))
        rows.append({"budget": budget, "answer_ms": spread([1000 * t for t in times]), "plan_s": round(seconds, 2)})
        rows[-1] |= {"same": own.plan(query) == again}
    return {
        "model": config["model"],
        "layers": len(table.eligible),
        "options": sum(len(options) for layer in table.eligible for options in layer.options),
        "bytes": file.stat().st_size,
        "tabulate_s": round(tabulated, 2),
        "prune_s": round(fewer, 2),
        "open_s": round(opened + first, 2),
        "rows": rows,
        "load": round(os.getloadavg()[0], 2),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work returns, and the seconds that it took."""
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def words(values: dict[str, float]) -> str:
    """Return median and spread in words."""
    return f"{values['median']:.0f} [{values['min']:.0f}–{values['max']:.0f}]"


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    env, page, own = result["environment"], result["report"], result["explorer"]
    lines = ["# Pages: how large, how long", ""]
    lines += [
        f"`python -m benchmarks.pages.run` on {env['device_name']}, {os.cpu_count()} cores, torch {env['torch']},"
    ]
    lines += [f"headless Chromium. Medians [least–most]; load of the machine {page['load']} and {own['load']}.", ""]
    lines += ["| report | size | until loaded, ms | processor time of the page, ms |", "| --- | --- | --- | --- |"]
    size = page["bytes"] / 1e6
    lines += [f"| {page['layers']} layers | {size:.2f} MB | {words(page['open_ms'])} | {words(page['cpu_ms'])} |", ""]
    lines += [f"The explorer of {own['model']}, {own['layers']} layers with {own['options']:,} options:"]
    lines += [f"{own['bytes'] / 1e6:.2f} MB, tabulated in {own['tabulate_s']} s, pruned in {own['prune_s']} s,"]
    lines += [f"opened in {own['open_s']} s.", ""]
    lines += ["| budget | answer, ms | the same by `plan`, s | same plan |", "| --- | --- | --- | --- |"]
    for row in own["rows"]:
        budget = ", ".join(f"{k} {v:.0%}" for k, v in row["budget"].items())
        same = "yes" if row["same"] else "no"
        lines.append(f"| {budget} | {words(row['answer_ms'])} | {row['plan_s']} | {same} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
