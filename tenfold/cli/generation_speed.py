"""What `tenfold bench --tokens` measures and shows of two language models."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from tenfold.cli.terminal import Misuse

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tenfold.cli.source import Opened
    from tenfold.cli.terminal import Terminal
    from tenfold.profiling import Generation
    from tenfold.records import Speedup


def measure_generation(
    pair: Mapping[str, tuple[str, Opened]], terminal: Terminal, *, tokens: int, batch_size: int, seconds: float
) -> None:
    """Measure how fast both models read a prompt of random tokens and write on, in turns, and show it.

    Args:
        pair: ``a`` and ``b``, each with what it was called.
        terminal: what to show.
        tokens: of the prompt.
        batch_size: prompts at a time.
        seconds: about how long to measure.

    Raises:
        Misuse: a model that takes no tokens.
        ProfileError: a model has no cache.
    """
    from tenfold.profiling import compare_generation, environment
    from tenfold.tracing.inputs import tensors_in

    opened = {name: one for name, (_, one) in pair.items()}
    ids = next(tensors_in(opened["a"].inputs(batch_size)))
    if ids.is_floating_point() or ids.dim() != 2:
        msg = f"--tokens is for language models: {opened['a'].task.id} takes no tokens."
        raise Misuse(msg)
    prompt = ids.repeat(1, ceil(tokens / ids.shape[1]))[:, :tokens]
    found = compare_generation({n: o.model for n, o in opened.items()}, prompt, seconds=seconds)
    params = {name: sum(p.numel() for p in one.model.parameters()) for name, one in opened.items()}
    terminal.show(_table({name: text for name, (text, _) in pair.items()}, params, found))
    terminal.say(f"Prompt of {prompt.shape[1]} tokens, {found.written // len(prompt)} after it; batch {len(prompt)}.")
    shown = {"prefill": found.prefill, "decode": found.decode}
    terminal.result(
        {
            name: {
                "model": text,
                "params": params[name],
                **{what: side.latencies[name].model_dump(mode="json") for what, side in shown.items()},
                "tokens_per_second": dict(zip(shown, found.tokens_per_second(name), strict=True)),
                "cache_bytes": found.cache_bytes[name],
            }
            for name, (text, _) in pair.items()
        }
        | {
            "speedup": {what: side.speedups["b"].model_dump(mode="json") for what, side in shown.items()},
            "environment": environment(opened["a"].device).model_dump(mode="json"),
        }
    )


def _table(models: Mapping[str, str], params: Mapping[str, int], found: Generation) -> RenderableType:
    from tenfold.reporting.numbers import count, size, three_digits
    from tenfold.reporting.table_parts import grid

    table = grid()
    for title in ("", "model", "parameters", "read, tokens/s", "written, tokens/s", "cache"):
        table.add_column(title, no_wrap=title != "model", justify="left" if title in ("", "model") else "right")
    for name, text in models.items():
        speeds = [three_digits(speed) for speed in found.tokens_per_second(name)]
        table.add_row(name, text, count(params[name]), *speeds, size(found.cache_bytes[name]))
    faster = [_faster(side.speedups["b"]) for side in (found.prefill, found.decode)]
    table.add_row("", "times faster", "", *faster, "")
    return table


def _faster(speedup: Speedup) -> str:
    return speedup.in_doubt.partition(":")[0] or f"{speedup.ratio:.3g} [{speedup.low:.3g}–{speedup.high:.3g}]"
