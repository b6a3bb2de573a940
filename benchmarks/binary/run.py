"""Train networks of one bit a weight on CIFAR-10: independent bits against bits of matrices and tensors.

    python -m benchmarks.binary.run [--data FOLDER] [--runs FOLDER] [--only VARIANT] [--seed N] [--report]

Data: CIFAR-10's Parquet files, see tenfold/tasks/cifar10_binary.py. Every epoch is kept in the
folder of the runs, so that a run that was killed goes on; what is finished is not trained again. Weights after the last
epoch are tested, once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import Row, Trials, spread
from tenfold.checkpoint.state_dicts import write_state_dict
from tenfold.networks import BinaryConv2d, pack
from tenfold.tasks import seeded
from tenfold.tasks.in_memory import LabelledBatches
from tenfold.training import TrainingFolder, TuneConfig, finetune

HERE = Path(__file__).parent


def main() -> None:
    """Train what is not trained yet, and write JSON and Markdown."""
    trials = Trials.read("binary", __doc__, HERE)
    trials.train("cifar10_binary", trained)
    trials.write(table)


def trained(task: Any, config: Row, folder: Path) -> Row:
    """Return curve, score and size of the packed file of one run."""
    tuning = TuneConfig(**{**task.tune_settings, **config["training"]}, seed=task.seed)
    model, pool = task.build(), torch.randperm(len(task.train_set), generator=seeded(0))[: config["samples"]]

    def batches(epoch: int) -> LabelledBatches:
        order = pool[torch.randperm(len(pool), generator=seeded(task.seed, epoch))]
        return LabelledBatches(task.train_set, order, tuning.batch_size, task.transform, (task.seed, epoch))

    result = finetune(model, batches, tuning, folder=TrainingFolder(folder / "epochs", f"{task.id} {config}"))
    small, score = pack(model), task.evaluate(model, batch_size=500)
    with tempfile.TemporaryDirectory() as there:
        write_state_dict(small.state_dict(), Path(there) / "net.safetensors")
        size = (Path(there) / "net.safetensors").stat().st_size
    layers: Any = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    return {
        "variant": task.variant,
        "seed": task.seed,
        "params": sum(p.numel() for p in model.parameters()),
        "binary_weights": sum(torch.Size(m.shape).numel() for m in layers),
        "bits_bytes": sum(b.numel() for name, b in small.named_buffers() if name.endswith("packed")),
        "file_bytes": size,
        "packed_equal": task.evaluate(small, batch_size=500) == score,
        "test": score,
        "curve": [epoch.model_dump(include={"epoch", "loss", "seconds"}) for epoch in result.history],
    }


def table(result: Row) -> str:
    """Return the Markdown page."""
    config, runs, env = result["config"], result["runs"], result["environment"]
    lines = [HEAD.format(**config["training"], torch=env["torch"], device=env["device_name"] or "the CPU")]
    for variant in config["variants"]:
        own = [run for run in runs if run["variant"] == variant]
        if own:
            first = own[0]
            tests, losses = [run["test"] for run in own], [run["curve"][-1]["loss"] for run in own]
            cells = [variant, f"{first['params']:,}", f"{first['binary_weights']:,}", f"{first['bits_bytes']:,}"]
            cells += [f"{first['file_bytes']:,}", "yes" if all(run["packed_equal"] for run in own) else "NO"]
            cells += [spread(tests), spread(losses), ", ".join(str(run["seed"]) for run in own)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# One bit a weight on CIFAR-10

`python -m benchmarks.binary.run`, on {device}, torch {torch}, one thread. A residual network of six binary 3×3
convolutions with 24 channels, inputs of which are signs too; the first convolution and the head are real. 8,000
training images, crops and flips, {epochs} epochs, batches of {batch_size}, AdamW at {lr}, cosine, no weight decay;
the same for all, the same initial bits, weights after the last epoch; the whole test set. The source (Bulat et al.
2019) reports up to 5 points more than independent bits on ImageNet, and more than 4 on human poses, after long
training of large networks.

| latent | parameters in training | bits | their bytes | bytes of the file | packed equal | test | last loss | seeds |
|---|---:|---:|---:|---:|---|---:|---:|---|"""


if __name__ == "__main__":
    main()
