"""The table of all rows."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from tenfold.profiling import environment
from tenfold.records import write_text

Row = dict[str, Any]


def write(rows: list[Row], config: Row, out: Path) -> None:
    """Write all rows as JSON and as a Markdown page."""
    result: Row = {"experiment": "language", "command": command(), "config": config, "runs": rows}
    result["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    write_text(out / "language.json", json.dumps(result, indent=1) + "\n")
    page = table(result)
    write_text(out / "language.md", page)
    print(page)


def table(result: Row) -> str:
    """Return all rows as Markdown, with the log-perplexity that each adds to the dense model's."""
    config, rows = result["config"], {(r["method"], r["share"]): r for r in result["runs"]}
    dense = rows.get(("dense", 1.0))
    lines = [f"# {config['title']}", "", config["text"].strip(), ""]
    parts = [name for name in ("test", "elsewhere") if dense is not None and name in dense["scores"]]
    titles = {"test": "Brown", "elsewhere": "SST"}
    for name in parts:
        lines += [
            f"## Perplexity on {titles[name]}",
            "",
            f"Dense: {shown(dense['scores'][name])}." if dense else "",
            "",
        ]
        lines += [f"| method | {' | '.join(f'{s:.0%} kept' for s in config['shares'])} |"]
        lines += [f"| --- | {' | '.join(['---:'] * len(config['shares']))} |"]
        for method in config["methods"]:
            cells = [cell(rows.get((method, share)), dense, name) for share in config["shares"]]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    env, tokens = result["environment"], config["sequence"]
    scored = " and ".join(f"{config[name] * (tokens - 1):,}" for name in parts)
    lines += [
        f"In brackets: log-perplexity added. Calibrated on {config['calibration']} × {tokens} tokens,",
        f"scored on {scored} tokens, in sequences of {tokens}.",
        f"{env['device_name'] or env['device']}, torch {env['torch']}, float32.",
        *("", "```", result["command"], "```"),
    ]
    return "\n".join(lines) + "\n"


def cell(row: Row | None, dense: Row | None, name: str) -> str:
    """Return a perplexity and what it adds in logarithms."""
    if row is None or dense is None:
        return "–"
    value = row["scores"][name]
    return f"{shown(value)} ({math.log(value / dense['scores'][name]):+.3f})" if math.isfinite(value) else "∞"


def shown(value: float) -> str:
    """Return a perplexity with as many digits as say something."""
    return f"{value:.2f}" if value < 1000 else f"{value:.2g}"


def command() -> str:
    """Return the command line, without what is particular to this machine."""
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks.language.run", *words])
