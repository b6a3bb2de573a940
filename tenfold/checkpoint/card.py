"""The model card of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from tenfold.records import Cost, Measurement, Plan, RunRecord
from tenfold.records.metric import FRACTION

if TYPE_CHECKING:
    from tenfold.checkpoint.hub_facts import HubFacts

# What vLLM takes for the name of a method to quantize weights, which it would not know.
_OVERRIDES = """--hf-overrides '{"quantization_config": null}'"""


# What is said of a model of transformers whose folder has nothing by which transformers would know it.
_NO_CONFIG = (
    "The folder has no `config.json`: `from_pretrained` of transformers calls it an unrecognized model. "
    "`tenfold.checkpoint.save_pretrained(model, plan, FOLDER)` writes one that it opens."
)


def model_card(
    plan: Plan, record: RunRecord | None = None, hub: HubFacts | None = None, *, of_transformers: bool = False
) -> str:
    """Return Markdown with the model, its costs before and after, its layers, and how to load it.

    Args:
        plan: carried out.
        record: of the run.
        hub: of a model of transformers: metadata at the head of the card, and how the folder is opened.
        of_transformers: whether it is one, though nothing of it is in the folder but the weights.
    """
    lines = [] if hub is None else ["---", *yaml.safe_dump(hub.metadata, allow_unicode=True).splitlines(), "---", ""]
    lines += [f"# {plan.model}, compressed with tenfold {plan.tenfold}", ""]
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
    lines += ["", "## Loading", "", *(_loading() if hub is None else _loading_from_hub(hub)), ""]
    lines += [_NO_CONFIG, ""] if of_transformers and hub is None else []
    lines += ["## How it was made", "", f"{_asked(plan)} `plan.yaml` says what was done to each layer and why."]
    if record is not None:
        samples = record.settings.get("calibration_samples")
        lines += ["", f"Ranks and factors were found with {samples} unlabeled samples."] if samples else []
        e = record.environment
        lines += ["", f"Measured on {e.device_name or e.device}, {e.threads} threads, torch {e.torch}, {e.platform}."]
        if record.command:
            lines += ["", "Made by:", "", "```", record.command, "```"]
    return "\n".join(lines) + "\n"


def _loading() -> list[str]:
    load = "model, plan = tenfold.load(skeleton, path)  # skeleton: the freshly built dense model"
    return _code("import tenfold", "", load)[:-1]


def _loading_from_hub(hub: HubFacts) -> list[str]:
    """Return how a folder of transformers is opened, with tenfold and without."""
    auto, trust = hub.auto_class, "" if hub.stock else ", trust_remote_code=True"
    ours = _code("from tenfold.checkpoint import load_pretrained", "", "model = load_pretrained(path)")
    theirs = _code(f"from transformers import {auto}", "", f"model = {auto}.from_pretrained(path{trust})")
    sentence = f"model = SentenceTransformer(path{trust})"
    sentences = _code("from sentence_transformers import SentenceTransformer", "", sentence) if hub.sentences else []
    if hub.stock:
        return [
            "It is an ordinary, narrower model, which opens everywhere; `path` is this folder:",
            "",
            *theirs,
            *sentences,
        ]
    lines = ["With tenfold, `path` being this folder:", "", *ours]
    if hub.closed:
        return [*lines, f"It does not open without tenfold: {hub.closed}."]
    lines += [
        "Without tenfold, by the modelling file beside the weights, which needs torch and transformers alone:",
        "",
    ]
    lines += theirs + sentences
    if auto == "AutoModelForCausalLM":
        lines += _code(f"vllm serve PATH --trust-remote-code --model-impl transformers {_OVERRIDES}", language="bash")
    return [*lines, "Otherwise transformers warns of missing weights, and fills the layers with random numbers."]


def _code(*lines: str, language: str = "python") -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _asked(plan: Plan) -> str:
    """Return the recipe in a sentence."""
    recipe = plan.recipe
    what = f"the budget `{recipe.budget}`" if recipe.budget.given else f"the rank rule `{recipe.rule_name}`"
    return f"Asked for: {what}, formats {', '.join(recipe.formats)} (`recipe.yaml`)."


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
