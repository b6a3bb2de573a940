"""The table of a profile: what each layer costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tenfold.records import LayerProfile, Profile
from tenfold.reporting.grouping import grouped, kinds_in_short, paths_in_short
from tenfold.reporting.numbers import count, interval, milliseconds, plural, ranks, size
from tenfold.reporting.table_parts import grid


def profile_tables(profile: Profile) -> tuple[RenderableType, ...]:
    """Return the totals, a table of the layers, and what could not be counted.

    Layers that no format supports take one line per kind and note; layers without cost are left out.
    """
    parts: list[RenderableType] = [_totals(profile), _layers(profile)]
    if profile.uncounted:
        calls = ", ".join(f"{name} ({n} calls)" for name, n in profile.uncounted.items())
        parts.append(Text(f"Not counted, for want of a formula: {calls}", style="yellow"))
    return tuple(parts)


def _totals(profile: Profile) -> Text:
    shapes = ", ".join("×".join(map(str, shape)) for shape in profile.input_shapes)
    text = Text(profile.model, style="bold")
    text.append(f" on {shapes or 'its inputs'}: ", style="not bold")
    text.append(f"{count(profile.params)} parameters ({size(profile.bytes)}), {count(profile.macs)} MACs", "not bold")
    if profile.latency is not None:
        t = profile.latency
        text.append(
            f", {interval(t.median_ms, t.low_ms, t.high_ms)}"
            f" ({t.dtype}, {t.memory_format}, {t.device}, {plural(t.threads, 'thread')})",
            style="not bold",
        )
    return text


def _layers(profile: Profile) -> Table:
    timed = profile.latency is not None
    table = grid()
    table.add_column("layer", overflow="fold", max_width=36)
    table.add_column("is", overflow="fold")
    for name in ("calls", "params", "MACs", "share", "outputs", *(["time"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    seen = [layer for layer in profile.layers if layer.params or layer.macs]
    for group in grouped(seen, lambda layer: layer.path if layer.spec else (layer.kind, layer.note)):
        table.add_row(*_row(group, profile.macs, timed=timed))
    if profile.other_macs:
        share = f"{100 * profile.other_macs / max(profile.macs, 1):.1f} %"
        blank = [""] * (3 if timed else 2)
        table.add_row("(no layer)", "", "", "", count(profile.other_macs), share, *blank[1:], "between layers")
    return table


def _row(group: Sequence[LayerProfile], total: int, *, timed: bool) -> list[str]:
    macs = sum(layer.macs for layer in group)
    times = [layer.latency_ms for layer in group if layer.latency_ms is not None]
    return [
        paths_in_short([layer.path for layer in group]),
        kinds_in_short([_what(layer) for layer in group]),
        str(sum(layer.num_calls for layer in group)),
        count(sum(layer.params for layer in group)),
        count(macs),
        f"{100 * macs / max(total, 1):.1f} %",
        size(sum(layer.activation_bytes for layer in group)),
        *([milliseconds(sum(times)) if times else ""] if timed else []),
        group[0].note,
    ]


def _what(layer: LayerProfile) -> str:
    if layer.spec is None:
        return layer.kind
    return f"{layer.format} {ranks(layer.rank)} for {layer.spec}" if layer.format else str(layer.spec)
