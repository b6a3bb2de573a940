"""Compress from few unlabeled samples and ask how sure the result is: agreement as recorded, and on other inputs.

    python -m benchmarks.certainty.run --images FOLDER --weights FOLDER --sentences FOLDER --minilm FOLDER

``--images`` holds photographs NNNN.jpg, 224 by 224, each named after its ImageNet class; ``--weights`` holds
``NETWORK.safetensors``; ``--sentences`` and ``--minilm`` are those of ``benchmarks.sentences``. Writes
``certainty.json`` and ``certainty.md`` after each row; rows that are in the result already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import tenfold
from benchmarks.sentences.run import Sentences, opened, texts
from benchmarks.trials import RESULTS
from benchmarks.zoo import supply_torchvision_ops
from tenfold.allocation import choose
from tenfold.errors import AgreementWarning
from tenfold.pipeline import carry_out
from tenfold.planning import Decision, decide
from tenfold.profiling import agreement, environment
from tenfold.records import Agreement, Recipe, TuneConfig, write_text
from tenfold.runtime import Runtime
from tenfold.tasks import load_task
from tenfold.training import Distillation

HERE = Path(__file__).parent
QUIET = Runtime(measure=False)
HEAD = """\
# How sure a compression is

Each network is compressed to shares of its MACs from a few unlabeled samples. A part of these neither plans nor fits:
on it `compress` measures how far the result agrees with the original, and records that (*recorded*, with its 95 %
interval). *Measured* is the same on inputs that had no part in anything, of which there are more. Agreement is the
share of equal decisions; of the sentence encoder, which decides nothing, it is the mean cosine. *Accuracy* is that of
the labels, of which the compression knows none.

"""


@dataclass(frozen=True)
class Subject:
    """A network with inputs to calibrate on and others to test on, labelled where there are labels."""

    model: nn.Module
    known: list[Any]
    asked: list[Any]
    labels: Tensor | None = None


def main() -> None:
    """Make the rows that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for folder in ("images", "weights", "sentences", "minilm"):
        parser.add_argument(f"--{folder}", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "certainty.yaml")
    parser.add_argument("--only", action="append", help="a network; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load(options.config.read_text())
    target = options.out / "certainty.json"
    result: dict[str, Any] = {"benchmark": "certainty", "dense": {}, "rows": []}
    result |= json.loads(target.read_text()) if target.is_file() else {}
    for name in options.only or config["networks"]:
        done = {(row["network"], row["share"]) for row in result["rows"]}
        shares = [share for share in config["shares"] if (name, share) not in done]
        if not shares:
            continue
        subject = subject_of(name, config, options)
        result["dense"][name] = accuracy(subject.model, subject)
        for row in rows(name, subject, shares, config):
            result["rows"].append(row)
            result |= {"config": config, "environment": environment(torch.device("cpu")).model_dump(mode="json")}
            write_text(target, json.dumps(result, indent=1) + "\n")
            write_text(target.with_suffix(".md"), table(result))
            print(json.dumps(row), flush=True)


def subject_of(name: str, config: dict[str, Any], options: argparse.Namespace) -> Subject:
    """Return a network of the configuration with its inputs."""
    own, seed = config["networks"][name], config["seed"]
    samples, size = own["samples"], own["batch_size"]
    if name == "mobilenet_v2":
        images, labels = photographs(options.images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        known, asked = order[:samples], order[samples:]
        parts = ([*images[rows].split(size)] for rows in (known, asked))
        return Subject(mobilenet(options.weights), *parts, labels[asked])
    if name == "minilm":
        model, tokenizer = opened(options.minilm)
        generator, drawn = np.random.default_rng(seed), []
        for part, number in (("train", samples), ("test", own["test"])):
            every = texts(options.sentences / f"stsa.fine.{part}")
            chosen = [every[i] for i in generator.permutation(len(every))[:number]]
            drawn.append(Sentences.of(chosen, tokenizer, "cpu").batches)
        return Subject(model, *drawn)
    task = load_task(f"cifar10:{name}", seed=seed)
    test = [*task.test_batches(own["test"], batch_size=250)]
    return Subject(
        task.dense(options.weights / f"{name}.safetensors"),
        [*task.calibration_batches(samples, batch_size=size, seed=seed)],
        [inputs for inputs, _ in test],
        torch.cat([labels for _, labels in test]),
    )


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Return photographs as ImageNet networks take them, and their classes, which their names say."""
    from PIL import Image

    files = sorted(folder.glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (scaled - mean) / deviation, torch.tensor([int(file.stem) for file in files])


def mobilenet(folder: Path) -> nn.Module:
    """Return torchvision's MobileNetV2 with its ImageNet weights."""
    supply_torchvision_ops()
    import torchvision

    model: nn.Module = torchvision.models.mobilenet_v2(weights=None)
    model.load_state_dict(load_file(folder / "mobilenet_v2.safetensors"))
    return model.eval()


def rows(name: str, subject: Subject, shares: list[float], config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what comes of each share; they are all chosen from one table."""
    decision: Decision | None = None
    for share in shares:
        recipe = Recipe(budget={"macs": share}, seed=config["seed"])
        if decision is None or decision.table is None:
            decision = decide(subject.model, first(subject.known[0]), recipe, data=subject.known)
        else:
            decision = replace(decision, recipe=recipe, plan=choose(decision.table, recipe))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AgreementWarning)
            made = carry_out(subject.model, decision, runtime=QUIET)
        warned = any(issubclass(w.category, AgreementWarning) for w in caught)
        recorded = made.record.agreement
        found = agreement(subject.model, made.model, subject.asked)
        row: dict[str, Any] = {"network": name, "share": share, "warned": warned}
        row["macs"] = made.record.after.macs / made.record.before.macs
        row |= {"recorded": figures(recorded), "measured": figures(found), "accuracy": accuracy(made.model, subject)}
        if "tuning" in config["networks"][name]:
            settings = config["networks"][name]["tuning"]
            inputs = torch.cat(decision.batches)
            batches = [(part, None) for part in inputs.split(settings["batch_size"])]
            tenfold.finetune(
                made.model, batches, TuneConfig.gentle(**settings), loss=Distillation(subject.model, share=1.0)
            )
            row["tuned"] = {
                "recorded": figures(agreement(subject.model, made.model, decision.held_out)),
                "measured": figures(agreement(subject.model, made.model, subject.asked)),
                "accuracy": accuracy(made.model, subject),
            }
        yield row


def first(batch: Any) -> Any:
    """Return one sample of a batch, as an example input."""
    return {k: v[:1] for k, v in batch.items()} if isinstance(batch, dict) else batch[:1]


def figures(found: Agreement | None) -> dict[str, Any]:
    """Return agreement as plain values, the one that counts as ``agreement``."""
    if found is None:
        return {}
    count = found.cosine if found.top1 is None else found.top1
    interval = found.interval()
    return {"agreement": count, "interval": interval, **found.model_dump(mode="json", exclude_none=True)}


@torch.no_grad()
def accuracy(model: nn.Module, subject: Subject) -> float | None:
    """Return the share of test inputs whose label has the largest score; None without labels."""
    if subject.labels is None:
        return None
    found = torch.cat([model.eval()(inputs).argmax(1) for inputs in subject.asked])
    return float((found == subject.labels).double().mean())


COLUMNS = ("MACs", "recorded", "measured", "apart", "accuracy", "warned", "after label-free training")


def table(result: dict[str, Any]) -> str:
    """Return all rows as Markdown."""
    lines = [HEAD.rstrip(), ""]
    for name in dict.fromkeys(row["network"] for row in result["rows"]):
        dense, samples = result["dense"][name], result["config"]["networks"][name]["samples"]
        told = "" if dense is None else f" The original's accuracy: {dense:.1%}."
        lines += [f"## {name}", "", f"{samples} samples.{told}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        mine = (row for row in result["rows"] if row["network"] == name)
        lines += [*(line(row) for row in sorted(mine, key=lambda row: -row["share"])), ""]
    env, seed = result["environment"], result["config"]["seed"]
    where = f"{env['device_name'] or env['device']}, {env['threads']} thread(s), torch {env['torch']}, seed {seed}."
    return "\n".join([*lines, where]) + "\n"


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    recorded, measured, tuned = row["recorded"], row["measured"], row.get("tuned")
    between = "" if recorded["interval"] is None else " ({:.0%} to {:.0%})".format(*recorded["interval"])
    apart = f"{100 * (recorded['agreement'] - measured['agreement']):+.1f}"
    cells = [f"{row['macs']:.1%}", f"{recorded['agreement']:.1%}{between}", f"{measured['agreement']:.1%}", apart]
    cells += ["" if row["accuracy"] is None else f"{row['accuracy']:.1%}", "yes" if row["warned"] else ""]
    if tuned is None:
        return f"| {' | '.join(cells)} | |"
    shown = f"{tuned['measured']['agreement']:.1%}, recorded {tuned['recorded']['agreement']:.1%}"
    return f"| {' | '.join(cells)} | {shown}, accuracy {tuned['accuracy']:.1%} |"


if __name__ == "__main__":
    main()
