"""The model card of a checkpoint."""

from __future__ import annotations

from tenfold.records import Cost, Measurement, Plan, RunRecord
from tenfold.records.metric import FRACTION


def model_card(plan: Plan, record: RunRecord | None = None) -> str:
    """Return Markdown with the model, its costs before and after, its layers, and how to load it."""
    lines = [f"# {plan.model}, compressed with tenfold {plan.tenfold}", ""]
    lines += _measured(record) if record is not None else _planned(plan.before, plan.after)
    if plan.narrowed:
        lines += ["", f"{len(plan.narrowed)} units are narrowed, to plain layers of smaller sizes.", ""]
        lines += ["| in | unit | layers | size |", "| --- | --- | --- | --- |"]
        layers = [(unit, ", ".join(f"`{path}`" for path in unit.members)) for unit in plan.narrowed]
        lines += [f"| `{unit.path}` | {unit.kind} | {paths} | {unit.words} |" for unit, paths in layers]
    factorized = [layer for layer in plan.factorized if layer.path not in plan.narrowed_paths]
    lines += ["", f"{len(factorized)} of {len(plan.layers)} layers are factorized.", ""]
    lines += ["| layer | was | now | ranks | relative error |", "| --- | --- | --- | --- | --- |"]
    for layer in factorized:
        ranks = ", ".join(f"{k}={v}" for k, v in (layer.rank or {}).items())
        error = "" if layer.rel_error is None else f"{layer.rel_error:.3f}"
        lines.append(f"| `{layer.path}` | {layer.kind} | {layer.format} | {ranks} | {error} |")
    lines += ["", "## Loading", "", "```python", "import tenfold", ""]
    lines += ["model, plan = tenfold.load(skeleton, path)  # skeleton: the freshly built dense model", "```", ""]
    lines += ["`plan.yaml` says what was done to each layer and why; `recipe.yaml` what was asked for."]
    if record is not None:
        e = record.environment
        lines += ["", f"Measured on {e.device_name or e.device}, {e.threads} threads, torch {e.torch}, {e.platform}."]
        if record.command:
            lines += ["", "Made by:", "", "```", record.command, "```"]
    return "\n".join(lines) + "\n"


def _planned(before: Cost, after: Cost) -> list[str]:
    head = ["|  | before | after | ratio |", "| --- | --- | --- | --- |"]
    return head + [_row(name, getattr(before, name), getattr(after, name)) for name in ("params", "macs")]


def _measured(record: RunRecord) -> list[str]:
    before, after, metric = record.before, record.after, record.metric
    lines = _planned(Cost(params=before.params, macs=before.macs), Cost(params=after.params, macs=after.macs))
    if before.latency_ms and after.latency_ms:
        ratio = before.latency_ms / after.latency_ms if record.speedup is None else record.speedup.ratio
        doubt = "" if record.speedup is None else record.speedup.in_doubt
        note, change = _conditions(before), doubt or f"{ratio:.2f}×"
        lines.append(f"| latency{note} | {before.latency_ms:.2f} ms | {after.latency_ms:.2f} ms | {change} |")
    if before.score is not None and after.score is not None:
        old, new = before.score, after.score
        if metric == FRACTION:
            lines.append(f"| score | {old:.2%} | {new:.2%} | {new - old:+.2%} |")
        else:
            name = f"{metric.name} ({metric.better} is better)"
            lines.append(f"| {name} | {metric.text(old)} | {metric.text(new)} | {metric.change(old, new)} |")
    if record.agreement is not None:
        lines += ["", f"Agreement with the original: {record.agreement.in_words()}."]
        if record.agreement.is_low and record.agreement.can_be_judged:
            lines += ["", "**It no longer does what the original does.**"]
    return lines


def _conditions(measured: Measurement) -> str:
    latency = measured.latency
    clock = ", processor time" if latency is not None and latency.clock == "processor" else ""
    return clock if latency is None or latency.batch_size is None else f", batch {latency.batch_size}{clock}"


def _row(name: str, before: int, after: int) -> str:
    return f"| {name} | {before:,} | {after:,} | {before / max(after, 1):.2f}× |"
