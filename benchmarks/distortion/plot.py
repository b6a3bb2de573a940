"""Draw predicted against actual loss for each model of distortion.

python -m benchmarks.distortion.plot [--result FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import spearmanr

from benchmarks.distortion.run import MODELS, RESULTS

LOOKS = (("#0072B2", "o"), ("#D55E00", "^"), ("#999999", "x"))


def main() -> None:
    """Read the result and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS / "distortion.json")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "docs" / "images" / "distortion.png")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(options.result.read_text())).savefig(options.out)
    print(options.out)


def draw(result: dict[str, Any]) -> Figure:
    """Return a panel for each model of distortion, with a point for each plan."""
    figure = Figure(figsize=(3.1 * len(MODELS), 3.7), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for panel, (name, title) in zip(panels, MODELS.items(), strict=True):
        for (colour, marker), wanted in zip(LOOKS, result["config"]["sets"], strict=False):
            rows = [row for row in result["rows"] if row["set"] == wanted["name"]]
            if not rows:
                continue
            x, y = [row[name] for row in rows], [row["kl"] for row in rows]
            label = f"{wanted['name']}: ρ = {spearmanr(x, y)[0]:.3f}"
            panel.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.8, label=label)
        panel.set(xscale="log", yscale="log", xlabel="predicted distortion, summed over layers")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(title.replace(": ", "\n").replace(", G of", ",\nG of"), fontsize=9)
        panel.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.legend(fontsize=7, loc="upper left")
    panels[0].set_ylabel("KL divergence from the dense model")
    return figure


if __name__ == "__main__":
    main()
