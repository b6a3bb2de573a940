"""Add domains to one frozen core, in turn, against a network for each: MNIST, Omniglot's alphabets, CIFAR-10.

    python -m benchmarks.domains.run --data FOLDER [--runs FOLDER] [--seed N] [--report]

Data: Omniglot's archives in FOLDER, MNIST's and CIFAR-10's Parquet files in ~/.cache/tenfold/datasets. Every epoch is
kept in the folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights
after the last epoch are tested, once.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trials import Row, Trials, finished, spread
from tenfold.networks import MultiDomainNet, save_domains
from tenfold.tasks import TensorSet, accuracy, load_task, seeded
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import LabelledBatches
from tenfold.tasks.omniglot_files import background
from tenfold.training import TrainingFolder, TuneConfig, finetune

HERE = Path(__file__).parent
PREPARE = {1: ImageTransform((0.13,), (0.31,)), 3: ImageTransform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))}


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("domains", __doc__, HERE)
    for variant, seed in trials.wanted():
        folder = trials.folder(variant, seed)
        print(json.dumps(finished(folder, partial(run, trials, seed, folder))), flush=True)
    trials.write(table)


def run(trials: Trials, seed: int, folder: Path) -> Row:
    """Return accuracies and costs of all domains on one core, and of a network for each."""
    config = trials.config
    data = {name: read(name, config["samples"][name], trials.options.data) for name in config["domains"]}
    shared, rows, held = made(config, seed), list[Row](), dict[str, Tensor]()
    for place, (name, (train, test)) in enumerate(data.items()):
        inputs, classes = train.inputs.shape[1], int(train.labels.max()) + 1
        alone = made(config, seed)
        alone.add_domain(name, inputs=inputs, classes=classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shared.add_domain(name, inputs=inputs, classes=classes, like=config["domains"][0] if place else None)
        shared.train_domain(name, core=not place)
        fitted(shared, train, config, seed, folder / f"shared-{name}")
        scored = score(shared, test)
        if place:  # the first is a network of its own
            fitted(alone, train, config, seed, folder / f"alone-{name}")
        equal = {old: torch.equal(outputs(shared, old, data[old][1]), found) for old, found in held.items()}
        held[name] = outputs(shared, name, test)
        rows.append(
            {
                "domain": name,
                "classes": classes,
                "shared": scored,
                "alone": score(alone, test) if place else scored,
                "added": shared.added(name),
                "network": sum(p.numel() for p in alone.parameters()),
                "old_domains_equal": equal,
            }
        )
    with tempfile.TemporaryDirectory() as there:
        save_domains(shared, there)
        sizes = {file.name: file.stat().st_size for file in sorted(Path(there).iterdir())}
    return {"seed": seed, "variant": "seed", "domains": rows, "bytes": sizes, "core": shared.stack.core.numel()}


def made(config: Row, seed: int) -> MultiDomainNet:
    """Return a network without domains."""
    torch.manual_seed(seed)
    return MultiDomainNet(**config["network"])


def read(name: str, samples: int, data: Path | None) -> tuple[TensorSet, TensorSet]:
    """Return so many training samples of a domain and its whole test set; of Omniglot alphabets, by drawers."""
    if name == "omniglot":
        every = list(background(data).values())
        labels = torch.cat([torch.full((len(a), 20), k) for k, a in enumerate(every)])
        drawn = torch.cat(every)[:, :, None]
        train = TensorSet(drawn[:, :16].flatten(0, 1), labels[:, :16].flatten())
        test = TensorSet(drawn[:, 16:].flatten(0, 1), labels[:, 16:].flatten())
    else:
        task: Any = load_task(name)
        train, test = task.train_set, task.test_set
    chosen = torch.randperm(len(train), generator=seeded(0))[:samples]
    return TensorSet(train.inputs[chosen], train.labels[chosen]), test


def fitted(net: nn.Module, train: TensorSet, config: Row, seed: int, folder: Path) -> None:
    """Train what requires gradients."""
    tuning = TuneConfig(**config["training"], optimizer="adamw", autocast="off", channels_last=False, seed=seed)

    def batches(epoch: int) -> LabelledBatches:
        order = torch.randperm(len(train), generator=seeded(seed, epoch))
        return LabelledBatches(train, order, tuning.batch_size, PREPARE[train.inputs.shape[1]])

    finetune(net, batches, tuning, folder=TrainingFolder(folder, f"{folder.name} {config}"))


def score(net: nn.Module, test: TensorSet) -> float:
    """Return the accuracy on the whole test set."""
    return accuracy(net, LabelledBatches(test, torch.arange(len(test)), 500, PREPARE[test.inputs.shape[1]]))


@torch.no_grad()
def outputs(net: MultiDomainNet, name: str, test: TensorSet) -> Tensor:
    """Return what the network says of 500 test samples of a domain."""
    used = net.domain
    net.use(name)
    found: Tensor = net.eval()(PREPARE[test.inputs.shape[1]].prepare(test.inputs[:500]))
    net.use(str(used))
    return found


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [
        HEAD.format(
            **config["training"], torch=env["torch"], device=env["device_name"] or "the CPU", core=runs[0]["core"]
        )
    ]
    for k, name in enumerate(config["domains"]):
        rows = [run["domains"][k] for run in runs]
        first = rows[0]
        equal = all(all(row["old_domains_equal"].values()) for row in rows)
        cells = [name, str(first["classes"]), spread([r["shared"] for r in rows]), spread([r["alone"] for r in rows])]
        cells += [f"{first['added']:,}", f"{first['network']:,}", f"1/{first['network'] / first['added']:.1f}"]
        cells += ["-" if not k else "yes" if equal else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    sizes = ", ".join(f"`{name}` {size:,}" for name, size in runs[0]["bytes"].items())
    return (
        "\n".join([*lines, "", f"Bytes of the folder: {sizes}. Seeds: {', '.join(str(r['seed']) for r in runs)}."])
        + "\n"
    )


HEAD = """\
# Three domains on one core

`python -m benchmarks.domains.run`, on {device}, torch {torch}, one thread. A residual network of six 3×3 convolutions
with 24 channels whose kernels are one Tucker tensor of full rank, a core of {core:,} numbers: trained with MNIST
(6,000 images), then frozen; Omniglot (which of eight alphabets, 16 drawers for training and 4 for the test) and
CIFAR-10 (8,000 images) have factors, first layer, norms and head of their own. *Alone*: the same network trained for
one domain, core included. Whole test sets; {epochs} epochs, batches of {batch_size}, AdamW at {lr}, cosine, no
augmentation; weights after the last epoch. The source (Bulat et al. 2020) begins with ImageNet, adds ten domains and
needs 7.5 times fewer parameters for each.

| domain | classes | accuracy on the core | alone | parameters added | of a network | share | old domains equal |
|---|---:|---:|---:|---:|---:|---:|---|"""


if __name__ == "__main__":
    main()
