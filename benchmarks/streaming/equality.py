"""Compare what ``compress_streamed`` makes of a network with what ``compress`` makes of it: plans, errors, outputs.

    python -m benchmarks.streaming.equality [--config FILE] [--out FILE] [--models FOLDER] [--only CASE]

ResNet-50 has random weights. Others are folders of transformers within --models, whose words are drawn with the seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

import tenfold
from benchmarks.zoo import build, supply_torchvision_ops
from tenfold import Runtime
from tenfold.checkpoint import load_pretrained
from tenfold.errors import require
from tenfold.profiling import environment
from tenfold.records import Plan, RunRecord
from tenfold.streaming import compress_streamed
from tenfold.tracing.inputs import call_model, tensors_in

HERE = Path(__file__).parent


def main() -> None:
    """Run the cases, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "equality.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streaming_equality.json")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/tenfold/models")
    parser.add_argument("--only", help="run this case alone")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    supply_torchvision_ops()
    found: dict[str, Any] = {}
    if options.only and options.out.exists():
        found = json.loads(options.out.read_text())["cases"]
    for name, case in config["cases"].items():
        if options.only in (None, name):
            found[name] = compared(case, config, options.models)
            print(name, json.dumps(found[name]), flush=True)
    result = {"benchmark": "streaming_equality", "config": config, "cases": found}
    result["environment"] = json.loads(environment().to_json())
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def compared(case: dict[str, Any], config: dict[str, Any], models: Path) -> dict[str, Any]:
    """Return how far the two results of one case are apart."""
    drawn = torch.Generator().manual_seed(config["seed"])
    with tempfile.TemporaryDirectory() as there:
        if "name" in case:
            subject = build(case["name"], batch=case["batch"], size=case["size"], seed=config["seed"])
            model, shape = subject.model.eval(), subject.inputs.shape
            data: list[Any] = [torch.randn(shape, generator=drawn) for _ in range(case["batches"])]
            weights, skeleton = Path(there) / "dense", build(case["name"], size=case["size"]).model.to("meta")
            weights.mkdir()
            save_file(model.state_dict(), weights / "model.safetensors")
        else:
            weights, skeleton = models / case["folder"], None
            transformers: Any = require("transformers", "hf")
            model = transformers.AutoModelForCausalLM.from_pretrained(weights).eval()
            words = model.get_input_embeddings().num_embeddings
            size = (1, case["tokens"])
            data = [{"input_ids": torch.randint(words, size, generator=drawn)} for _ in range(case["batches"])]
        quiet, recipe = Runtime(measure=False), {"budget": config["budget"], "formats": config["formats"]}
        whole = tenfold.compress(model, data[0], recipe, data=data, runtime=quiet)
        found = compress_streamed(weights, Path(there) / "small", recipe, data=data, skeleton=skeleton)
        hub = skeleton is None
        loaded = load_pretrained(found.path) if hub else tenfold.load(copy.deepcopy(model), found.path)[0]
        loaded.eval()
        return {
            "same_plan": _choices(whole.plan) == _choices(found.plan),
            "layers": [len(whole.plan.factorized), len(found.plan.factorized)],
            "narrowed": [len(whole.plan.narrowed), len(found.plan.narrowed)],
            "params": [whole.plan.after.params, found.plan.after.params],
            "relative_error": [_error(own.record) for own in (whole, found)],
            "outputs_apart": max(_apart(whole.model, loaded, batch) for batch in data[:4]),
            "seconds": [sum(own.record.seconds.values()) for own in (whole, found)],
        }


def _choices(plan: Plan) -> list[Any]:
    """Return what a plan decides."""
    layers = [(layer.path, layer.action, layer.format, layer.rank) for layer in plan.layers]
    return [*layers, *((unit.pivot, unit.size) for unit in plan.units)]


def _error(record: RunRecord) -> float | None:
    return None if record.agreement is None else record.agreement.relative_error


@torch.no_grad()
def _apart(first: nn.Module, second: nn.Module, batch: Any) -> float:
    """Return the largest difference of outputs, as a share of the largest output."""
    one, other = (_output(call_model(model, batch)) for model in (first, second))
    return float((one - other).abs().max() / one.abs().max())


def _output(found: Any) -> Tensor:
    return next(tensors_in(found))


if __name__ == "__main__":
    main()
