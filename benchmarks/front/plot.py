"""Draw the picture of the README from committed results: accuracy against MACs, and against speed, of ResNet-56.

python -m benchmarks.front.plot [--out FOLDER]

Plain SVG without a plotting library, so that the same results give the same bytes, which a test compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NETWORK = "resnet56"
SIZE = (880, 350)


@dataclass(frozen=True)
class Colours:
    """A colour scheme: the page, its text, its lines, and the series by importance."""

    page: str
    text: str
    quiet: str
    line: str
    ours: str
    plain: str


SCHEMES = {
    "light": Colours("#ffffff", "#1f2328", "#59636e", "#d8dee4", "#0b63c5", "#8b949e"),
    "dark": Colours("#0d1117", "#e6edf3", "#9198a1", "#30363d", "#5aa9ff", "#7d8590"),
}


@dataclass(frozen=True)
class Point:
    """A compressed network: what it is measured by (share of the MACs, or times faster), and its accuracy."""

    x: float
    top1: float


def main() -> None:
    """Read the results and write one picture for each colour scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    folder = parser.parse_args().out
    for scheme in SCHEMES:
        (folder / f"front-{scheme}.svg").write_text(picture(scheme), encoding="utf-8")
        print(folder / f"front-{scheme}.svg")


def picture(scheme: str) -> str:
    """Return the SVG in one of the colour schemes."""
    colours = SCHEMES[scheme]
    curves, speeds = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("curves", "runtimes"))
    dense = curves["networks"][NETWORK]["top1"]
    parts = [*_accuracy(curves["rows"], dense, colours), *_speed(speeds["accuracy"], dense, colours)]
    width, height = SIZE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13">'
    )
    title = "<title>ResNet-56 on CIFAR-10 compressed without training: accuracy against MACs and against speed</title>"
    page = f'<rect width="{width}" height="{height}" rx="8" fill="{colours.page}"/>'
    return "\n".join([head, title, page, *parts, "</svg>", ""])


def _accuracy(rows: list[dict[str, Any]], dense: float, colours: Colours) -> Iterator[str]:
    """Yield the left panel: top-1 at shares of the MACs, by the weights alone and with data."""
    across = _scale((30, 90), (64, 330))
    down = _scale((76, 94), (292, 96))
    yield _text(30, 34, "Accuracy without any training", colours.text, size=16, weight=600)
    yield _text(30, 56, "ResNet-56 on CIFAR-10, top-1 on the test set", colours.quiet)
    for percent in range(76, 94, 4):
        yield _line(64, down(percent), 330, down(percent), colours.line)
        yield _text(56, down(percent) + 4, f"{percent} %", colours.quiet, anchor="end")
    yield _line(64, down(100 * dense), 330, down(100 * dense), colours.text, dash="4 4")
    yield _text(64, down(100 * dense) - 7, f"original {100 * dense:.2f} %", colours.text)
    for share in (30, 50, 70, 90):
        yield _text(across(share), 314, f"{share} %", colours.quiet, anchor="middle")
    yield _text(197, 336, "multiply-accumulates left", colours.quiet, anchor="middle")
    for method, colour in (("weight-only", colours.plain), ("sequential", colours.ours)):
        found = _points(rows, method)
        path = " ".join(f"{across(100 * p.x):.1f},{down(100 * p.top1):.1f}" for p in found)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        yield from (_dot(across(100 * p.x), down(100 * p.top1), colour) for p in found)
    yield _text(342, down(100 * _points(rows, "sequential")[-1].top1) + 4, "tenfold", colours.ours, weight=600)
    yield _text(342, down(100 * _points(rows, "weight-only")[-1].top1) + 4, "Tucker-2 of", colours.quiet)
    yield _text(342, down(100 * _points(rows, "weight-only")[-1].top1) + 20, "the weights", colours.quiet)


def _speed(rows: list[dict[str, Any]], dense: float, colours: Colours) -> Iterator[str]:
    """Yield the right panel: a bar for the original and each latency budget, with its accuracy."""
    across = _scale((0, 2), (470, 770))
    found = [Point(row["speedup"]["ratio"], row["score"]) for row in rows if row["network"] == NETWORK]
    yield _text(470, 34, "Speed in ONNX Runtime", colours.text, size=16, weight=600)
    yield _text(470, 56, "the same network by latency budgets, untrained", colours.quiet)
    for number, point in enumerate([Point(1, dense), *found]):
        top, original = 88 + 76 * number, number == 0
        name = "original" if original else f"tenfold, {point.x:.2f} times as fast"
        colour = colours.plain if original else colours.ours
        yield _text(470, top, name, colours.text, weight=400 if original else 600)
        yield (f'<rect x="470" y="{top + 9}" width="{across(point.x) - 470:.1f}" height="26" rx="3" fill="{colour}"/>')
        yield _text(across(point.x) + 10, top + 27, f"{100 * point.top1:.2f} %", colours.text, weight=600)
    yield _text(470, 336, "images per second, batch 8, one thread; top-1 beside it", colours.quiet)


def _points(rows: list[dict[str, Any]], method: str) -> list[Point]:
    """Return the measured points of a method by their share of the MACs."""
    chosen = [row for row in rows if row["network"] == NETWORK and row["method"] == method]
    return sorted((Point(row["macs"], row["top1"]) for row in chosen), key=lambda point: point.x)


def _scale(values: tuple[float, float], pixels: tuple[float, float]) -> Callable[[float], float]:
    """Return the linear map from ``values`` to ``pixels``."""
    (low, high), (start, end) = values, pixels
    return lambda value: start + (value - low) * (end - start) / (high - low)


def _text(x: float, y: float, text: str, colour: str, **look: Any) -> str:
    """Return a label; ``look`` has its ``size``, ``weight`` and ``anchor``."""
    style = "".join(
        f' {name}="{look[key]}"'
        for key, name in (("size", "font-size"), ("weight", "font-weight"), ("anchor", "text-anchor"))
        if key in look
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{style}>{escape(text)}</text>'


def _line(x: float, y: float, right: float, bottom: float, colour: str, dash: str = "none") -> str:
    """Return a thin line."""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{bottom:.1f}" stroke="{colour}" '
        f'stroke-dasharray="{dash}"/>'
    )


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'


if __name__ == "__main__":
    main()
