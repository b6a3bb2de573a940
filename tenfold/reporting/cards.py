"""A card as HTML for notebooks: a headline, a small table, bars as inline SVG. No script, style sheet or network.

Everything is put together by ``Markup.format``, which escapes whatever is no markup of this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tenfold.reporting.charts import Chart
from tenfold.reporting.numbers import count

WIDTH, HEIGHT = 560.0, 90.0  # pixels
BEFORE, AFTER = "#9aa7b8", "#2f6fde"  # read on white and on black

_CARD = Markup(
    '<div class="tenfold" style="font-family: system-ui, sans-serif; font-size: 13px; max-width: 600px">'
    '<div style="margin: 4px 0"><b>{head}</b>{about}</div>{table}{chart}</div>'
)
_TABLE = Markup('<table style="border-collapse: collapse; margin: 4px 0; font-size: inherit">{rows}</table>')
_CELL = Markup(
    '<td style="text-align: {align}; padding: 1px 14px 1px 0; white-space: nowrap; font-weight: {weight}">{text}</td>'
)
_SVG = Markup(
    '<svg role="img" aria-label="{alt}" viewBox="0 0 {width:g} {total:g}" style="width: 100%; max-width: {width:g}px">'
    '{bars}<line x1="0" x2="{width:g}" y1="{height:g}" y2="{height:g}" stroke="currentColor" stroke-opacity=".4"/>'
    '<text x="0" y="{label:g}" font-size="11" fill="currentColor">{caption}</text></svg>'
)
_LAYER = Markup("<g><title>{words}</title>{rects}</g>")
_RECT = Markup('<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"/>')


def card(head: str, about: str, rows: Sequence[Sequence[str]], chart: Chart | None) -> str:
    """Return a card as HTML.

    Args:
        head: what it is, in bold.
        about: what else is to be known, in the same line.
        rows: of a table, the first of them its head; no table if empty.
        chart: bars, see ``tenfold.reporting.charts``; None for no picture.

    Example:
        >>> "<b>&lt;Net&gt;</b>" in card("<Net>", "", [], None)
        True
    """
    drawn = "" if chart is None else bars(chart)
    return str(_CARD.format(head=head, about=f" {about}" if about else "", table=_table(rows), chart=drawn))


def _table(rows: Sequence[Sequence[str]]) -> Markup:
    made = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(_cell(text, column, head=not number) for column, text in enumerate(row))
        )
        for number, row in enumerate(rows)
    ]
    return _TABLE.format(rows=Markup("").join(made)) if made else Markup("")


def _cell(text: str, column: int, *, head: bool) -> Markup:
    align, weight = "right" if column else "left", "600" if head else "400"
    return _CELL.format(align=align, weight=weight, text=text)


def bars(chart: Chart) -> Markup:
    """Return bars as an inline picture: one place for each name, the series drawn over each other in their order."""
    names, series = chart["names"], chart["series"]
    most = max((value for each in series for value in each["values"]), default=0) or 1
    step = WIDTH / max(len(names), 1)
    fills = [AFTER] if len(series) == 1 else [BEFORE, AFTER]
    layers = []
    for place, name in enumerate(names):
        values = [each["values"][place] for each in series]
        heights = [(HEIGHT - 4) * value / most for value in values]
        rects = [
            _RECT.format(x=(place + 0.1) * step, y=HEIGHT - high, width=0.8 * step, height=high, fill=fill)
            for high, fill in zip(heights, fills, strict=True)
        ]
        words = f"{name}: {' → '.join(map(count, values))} {chart['y']['label']}"
        layers.append(_LAYER.format(words=words, rects=Markup("").join(rects)))
    colours = "" if len(series) == 1 else f" (grey: {series[0]['name']}, blue: {series[1]['name']})"
    shown = {"width": WIDTH, "height": HEIGHT, "total": HEIGHT + 20, "label": HEIGHT + 15}
    return _SVG.format(bars=Markup("").join(layers), alt=chart["alt"], caption=chart["alt"] + colours, **shown)
