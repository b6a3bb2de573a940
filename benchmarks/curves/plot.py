"""Draw accuracy against MACs, a panel for each network.

python -m benchmarks.curves.plot [--result FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.curves.run import METHODS, RESULTS, TITLES

COLOURS, MARKERS = ("#999999", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), "s^DovP"
LOOKS = dict(zip(METHODS, zip(COLOURS, MARKERS, strict=True), strict=True))


def main() -> None:
    """Read the result and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS / "curves.json")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "docs" / "images" / "curves.png")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(options.result.read_text())).savefig(options.out)
    print(options.out)


def draw(result: dict[str, Any]) -> Figure:
    """Return the curves of all methods, side by side for the networks."""
    names = sorted(result["networks"])
    figure = Figure(figsize=(4.6 * len(names), 4.2), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        dense = 100 * result["networks"][name]["top1"]
        panel.axhline(dense, color="black", linewidth=1, linestyle="--")
        panel.annotate(f"dense {dense:.2f} %", (30, dense), xytext=(0, 3), textcoords="offset points", fontsize=8)
        for method, (colour, marker) in LOOKS.items():
            rows = [row for row in result["rows"] if row["network"] == name and row["method"] == method]
            points = sorted((100 * row["macs"], 100 * row["top1"]) for row in rows)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            panel.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=TITLES[method])
        panel.set_title(f"ResNet-{name.removeprefix('resnet')}, CIFAR-10", fontsize=11)
        panel.set_xlabel("MACs left (%)")
        panel.set_xlim(27, 93)
        panel.set_ylim(top=dense + 3)
        panel.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("test accuracy without fine-tuning (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    main()
