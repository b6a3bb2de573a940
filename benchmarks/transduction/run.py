"""Let a network of pictures look at clips: factors along time, trained alone and then with all else.

    python -m benchmarks.transduction.run [--data FOLDER] [--config FILE] [--out FILE]

Data: MNIST's Parquet files, see tenfold/tasks/mnist14.py. Each frame of a clip shows the same digit with other noise,
and other pixels hidden where the config hides some. A convolutional network is trained on single frames and compressed
(cp3); then it looks at clips: frame by frame, with the answers averaged; with factors along time trained alone; with
all trained. For comparison the average of answers is trained as long, on the same clips. Digits of the test set are
looked at when that is done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import tenfold
from tenfold.networks import VideoNet
from tenfold.profiling import environment
from tenfold.tasks import load_task
from tenfold.training import TuneConfig, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Run all seeds, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "transduction.yaml")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "transduction.json")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    torch.set_num_threads(config["threads"])
    digits = {split: read(options.data, split) for split in ("train", "test")}
    rows = []
    for seed in config["seeds"]:
        rows.append(one(config, digits, seed))
        print(json.dumps(rows[-1]), flush=True)
        result = {"benchmark": "transduction", "config": config, "runs": rows}
        result["environment"] = json.loads(environment().to_json())
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def read(data: Path | None, split: Any) -> tuple[Tensor, Tensor]:
    """Return digits (n, 1, 14, 14) in 0..1 and their names."""
    task: Any = load_task("mnist14", data=data)
    stored = task.read(split)
    return nn.functional.avg_pool2d(stored.inputs.float() / 255, 2), stored.labels


def one(config: dict[str, Any], digits: dict[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, Any]:
    """Return the scores of one seed."""
    torch.manual_seed(seed)
    drawn = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits["train"][0]), generator=drawn)
    known, few = order[: config["pictures"]], order[config["pictures"] :][: config["clips"]]
    tests = torch.randperm(len(digits["test"][0]), generator=drawn)[: config["tests"]]
    x, y = digits["train"]
    pictures = [(clips_of(x[own], 1, config, drawn)[:, :, 0], y[own]) for own in known.split(128)]
    net = network(config["channels"])
    finetune(net, pictures, tuning(config["dense"], seed))
    recipe = {"budget": config["budget"], "formats": "cp3"}
    quiet = tenfold.Runtime(measure=False)
    made = tenfold.compress(net, pictures[0][0][:1], recipe, data=[own for own, _ in pictures[:16]], runtime=quiet)
    finetune(made.model, pictures, tuning(config["compressed"], seed))
    size = config["temporal"]["batch_size"]
    watched = [(clips_of(x[own], config["frames"], config, drawn), y[own]) for own in few.split(size)]
    hidden = [
        (clips_of(digits["test"][0][own], config["frames"], config, drawn), digits["test"][1][own])
        for own in tests.split(250)
    ]
    video, average = VideoNet(made.model, config["taps"]), VideoNet(made.model, 1)
    params = sum(p.numel() for p in made.model.parameters())
    along = sum(p.numel() for p in video.temporal())
    found = {"seed": seed, "params": params, "temporal_params": along, "share": along / params}
    found["one frame"] = accuracy(made.model, [(own[:, :, 0], label) for own, label in hidden])
    found["average"] = accuracy(video, hidden)
    finetune(video.train_temporal_only_(), watched, tuning(config["temporal"], seed))
    found["temporal alone"] = accuracy(video, hidden)
    finetune(video.train_temporal_only_(False), watched, tuning(config["all"], seed))
    found["then all"] = accuracy(video, hidden)
    for name in ("temporal", "all"):  # as many epochs, without a factor along time
        average.requires_grad_()
        finetune(average, watched, tuning(config[name] | {"lr": config["all"]["lr"]}, seed))
    found["average, trained"] = accuracy(average, hidden)
    return found


def network(channels: list[int]) -> nn.Module:
    """Return a small convolutional network."""
    layers: list[nn.Module] = []
    for at, (inner, outer) in enumerate(zip([1, *channels], channels, strict=False)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if at == 1 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], 10))


def clips_of(digits: Tensor, frames: int, config: dict[str, Any], drawn: torch.Generator) -> Tensor:
    """Return clips (n, 1, frames, 14, 14) of digits behind masks that change from frame to frame."""
    size = (len(digits), 1, frames, *digits.shape[2:])
    seen = (torch.rand(size, generator=drawn) >= config["hidden"]).float()
    return digits[:, :, None] * seen + config["noise"] * torch.randn(size, generator=drawn)


def tuning(chosen: dict[str, Any], seed: int) -> TuneConfig:
    """Return settings of training."""
    return TuneConfig(**chosen, autocast="off", seed=seed, train_as="factors")


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the share of right answers."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


if __name__ == "__main__":
    main()
