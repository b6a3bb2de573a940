"""A network of tensor trains, trained from scratch, that finds its own ranks.

    python examples/tt_from_scratch.py

Two linear layers on the digits of scikit-learn, both tensor trains of rank 12. A prior on their cores drops what the
data does not ask for; the cores are sliced, and trained on at the ranks that are left.
"""

from functools import partial

import torch
from torch import nn

from tenfold.layers import TTLinear
from tenfold.tasks import load_task
from tenfold.training import BayesianConfig, TuneConfig, train_bayesian

EPOCHS = 20

torch.manual_seed(0)
task = load_task("digits")
model = nn.Sequential(
    nn.Flatten(),
    TTLinear(64, 256, 12, in_modes=(4, 4, 4), out_modes=(8, 8, 4)),
    nn.ReLU(),
    TTLinear(256, 10, 12, in_modes=(16, 16), out_modes=(5, 2)),
)
before = sum(p.numel() for p in model.parameters())

batches = partial(task.train_batches, batch_size=64, seed=0, hold_out=True)
steps = EPOCHS * len(batches(0))
config = TuneConfig(epochs=EPOCHS, optimizer="adamw", lr=0.01, weight_decay=0, autocast="off")
prior = BayesianConfig(samples=batches(0).samples, warmup=steps // 10, ramp=steps // 3)
found = train_bayesian(model, batches, config, prior, tune=config.replace(epochs=8))

print(f"dense, these layers have {64 * 256 + 256 + 256 * 10 + 10:,} parameters")
for path, ranks in found.ranks.items():
    print(f"layer {path}: ranks {found.before[path]} became {ranks}")
print(f"parameters: {before:,} became {sum(p.numel() for p in model.parameters()):,}")
print(f"accuracy on the test set: {task.evaluate(model):.3f}")
