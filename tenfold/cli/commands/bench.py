"""tenfold bench: two saved models, timed in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from tenfold.cli.source import Folder, Machine, Source
from tenfold.cli.terminal import Misuse, Options, Terminal
from tenfold.records import Seed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tenfold.cli.source import Opened
    from tenfold.profiling import Comparison
    from tenfold.records import Latency

ORDER = 55


Layout = Literal["best", "contiguous", "channels_last"]  # best tries all and takes for each model the fastest


class Conditions(Options):
    """Measurement.

    Attributes:
        task: a model, its data, its score, as in `tenfold eval`; known to most checkpoints.
        data: where the data of the task is.
        batch_size: samples in a forward.
        seconds: about how long to measure.
        memory_format: how tensors lie in memory; best is for each model the fastest.
        runtime: what runs them: torch, or another of `tenfold list runtimes`.
        tokens: of language models: measure how fast they read a prompt of so many tokens and write on, in torch, in
            place of a forward.
        seed: of the task.
    """

    task: str | None = None
    data: Folder = None
    batch_size: PositiveInt = 1
    seconds: Annotated[float, Field(ge=0.1)] = 10.0
    memory_format: Layout = "best"
    runtime: str = "torch"
    tokens: PositiveInt | None = None
    seed: Seed = 0


def run(a: str, b: str, /, conditions: Conditions, machine: Machine, terminal: Terminal) -> None:
    """Tell how many times faster model B is than model A: in turns, with spread and a 95 % interval.

    tenfold bench dense runs/half --task cifar10:resnet56 --batch-size 8

    With --json, one object: `a` and `b`, each with `model`, `params` and `latency`; `speedup` with `ratio`, `low` and
    `high`; `faster` (true, false, or null where the interval holds 1); `environment`. With --tokens, `a` and `b` have
    `params`, `prefill`, `decode` (latencies), `tokens_per_second` of both and `cache_bytes`; `speedup` is one of each.

    Args:
        a: a checkpoint folder, dense weights as .safetensors, or `dense` for the task's own.
        b: the same; is it faster than A?
        conditions: of the measurement.
        machine: where to run them.
        terminal: what to show.
    """
    from tenfold.cli.generation_speed import measure_generation
    from tenfold.profiling import environment
    from tenfold.runtimes import runtime_named

    if conditions.tokens is not None and conditions.runtime != "torch":
        msg = f"--tokens is measured in torch, not in {conditions.runtime}: leave --runtime out."
        raise Misuse(msg)
    runtime_named(conditions.runtime).check_installed()  # now, and not when both models have been opened
    terminal.step("open the models")
    pair = _open_both((a, b), conditions, machine)
    terminal.step("measure")
    if conditions.tokens is not None:
        both = {"a": (a, pair[0]), "b": (b, pair[1])}
        batch, seconds = conditions.batch_size, conditions.seconds
        measure_generation(both, terminal, tokens=conditions.tokens, batch_size=batch, seconds=seconds)
        return
    result = _compared(pair, conditions)
    params = [sum(p.numel() for p in opened.model.parameters()) for opened in pair]
    models = {
        name: {"model": text, "params": number, "latency": result.latencies[name].model_dump(mode="json")}
        for name, text, number in zip("ab", (a, b), params, strict=True)
    }
    made = environment(pair[0].device)
    speedup = result.speedups["b"]
    faster = None if speedup.low <= 1 <= speedup.high else speedup.low > 1
    terminal.show(_table(dict(zip("ab", zip((a, b), params, strict=True), strict=True)), result))
    terminal.say(_verdict(result, f"{made.device_name or made.device}, torch {made.torch}"))
    terminal.result(
        models
        | {
            "speedup": speedup.model_dump(mode="json"),
            "faster": faster,
            "environment": made.model_dump(mode="json"),
        }
    )


def _open_both(names: tuple[str, str], conditions: Conditions, machine: Machine) -> list[Opened]:
    """Return both models; a task that a checkpoint is known to be for is that of the other model too."""
    from tenfold.cli.source import open_source

    task = conditions.task
    found: dict[str, Opened] = {}
    for name in sorted(set(names), key=lambda n: not Path(n).is_dir()):  # checkpoints first: they know their task
        found[name] = open_source(_source(name, task, conditions.data), machine, conditions.seed)
        task = found[name].name
    return [found[name] for name in names]


def _source(name: str, task: str | None, data: Path | None) -> Source:
    if name == "dense":
        return Source(task=task, data=data)
    path = Path(name)
    if path.is_dir():
        return Source(task=task, checkpoint=path, data=data)
    if path.suffix == ".safetensors":
        return Source(task=task, weights=path, data=data)
    msg = f"there is no model {name!r}: name a checkpoint folder, weights as .safetensors, or `dense`."
    raise Misuse(msg)


def _compared(pair: list[Opened], conditions: Conditions) -> Comparison:
    """Return the measurement of the models as ``a`` and ``b``, each in its memory format."""
    import torch

    from tenfold.profiling import best_memory_format, compare_latency
    from tenfold.runtimes import runtime_named

    runtime, threads = runtime_named(conditions.runtime), torch.get_num_threads()
    variants: dict[str, tuple[Any, Any]] = {}
    searched = False
    for name, opened in zip("ab", pair, strict=True):
        inputs = opened.inputs(conditions.batch_size)
        runtime.check(opened.model, inputs)
        chosen: str = conditions.memory_format
        if len(runtime.memory_formats(inputs)) == 1:
            (chosen,) = runtime.memory_formats(inputs)
        elif chosen == "best":
            searched = True
            chosen, _ = best_memory_format(opened.model, inputs, seconds=conditions.seconds / 4)
        variants[name] = runtime.ready(opened.model, inputs, chosen, threads)
    return compare_latency(variants, seconds=conditions.seconds / 2 if searched else conditions.seconds)


def _table(models: dict[str, tuple[str, int]], result: Comparison) -> RenderableType:
    from tenfold.reporting.numbers import count, milliseconds, three_digits
    from tenfold.reporting.table_parts import grid

    table = grid()
    for title in ("", "model", "parameters", "median", "quartiles", "memory format", "times faster"):
        table.add_column(title, no_wrap=title != "model", justify="left" if title in ("", "model") else "right")
    for name, (model, params) in models.items():
        latency, speedup = result.latencies[name], result.speedups[name]
        faster = speedup.in_doubt.partition(":")[0] or f"{speedup.ratio:.3g} [{speedup.low:.3g}–{speedup.high:.3g}]"
        quartiles = f"{three_digits(latency.low_ms)}–{three_digits(latency.high_ms)}"
        row = (name, model, count(params), milliseconds(latency.median_ms), quartiles, latency.memory_format)
        table.add_row(*row, faster if name == "b" else "")
    return table


def _verdict(result: Comparison, machine: str) -> str:
    speedup, latency = result.speedups["b"], result.latencies["b"]
    if speedup.doubt:
        found = speedup.in_doubt
    elif speedup.low <= 1 <= speedup.high:
        found = "no difference that this measurement can tell"
    elif speedup.ratio > 1:
        found = f"b is {speedup.ratio:.3g} times faster than a"
    else:
        found = f"b is {1 / speedup.ratio:.3g} times slower than a"
    return f"{found[0].upper()}{found[1:]} ({_conditions(latency)}, {speedup.rounds} rounds in turns; {machine})."


def _conditions(latency: Latency) -> str:
    threads = f"{latency.threads} {'thread' if latency.threads == 1 else 'threads'}"
    where = "" if latency.runtime == "torch" else f", {latency.runtime}"
    clock = ", processor time" if latency.clock == "processor" else ""
    load = f", while {latency.load}" if latency.load else ""
    return f"batch {latency.batch_size}, {latency.dtype}, {threads}{where}{clock}{load}"
