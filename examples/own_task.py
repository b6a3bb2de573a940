"""A task of one's own: a model, its data, its score, in one class.

Run it as a script, or hand it to the command line:

    python examples/own_task.py
    tenfold compress --task examples/own_task.py:Waves --budget macs=0.5
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tenfold.tasks import InMemoryTask, TensorSet
from tenfold.training import TuneConfig, finetune

CLASSES, LENGTH = 4, 64


class Waves(InMemoryTask):
    """Noisy sine waves of four frequencies, classified by a small 1-D convolutional network."""

    name = "waves"
    variants = ("narrow", "wide")  # the first is the default
    input_shape = (1, LENGTH)

    def architecture(self) -> nn.Module:
        """Return the network with fresh weights; tenfold seeds torch around this call."""
        width = {"narrow": 32, "wide": 64}[str(self.variant)]
        return nn.Sequential(
            nn.Conv1d(1, width, 5, padding=2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 5, padding=2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, CLASSES),
        )

    def pretrained(self) -> nn.Module:
        """Return the trained network: here we train it; yours may come from torchvision, timm or a file."""
        model = self.build()
        batches = partial(self.train_batches, batch_size=64, seed=self.seed)
        finetune(model, batches, TuneConfig(epochs=3, optimizer="adamw", lr=0.01))
        return model

    def read(self, split: str) -> TensorSet:
        """Return the training or the test set, whole."""
        samples = 2048 if split == "train" else 512
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        labels = torch.randint(CLASSES, (samples,), generator=generator)
        return TensorSet(_waves(labels, generator), labels)


def _waves(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return one noisy wave (1, LENGTH) for each label, of frequency 2 to 5 and any phase."""
    time = torch.linspace(0, 2 * torch.pi, LENGTH)
    phase = 2 * torch.pi * torch.rand(len(labels), 1, generator=generator)
    clean = torch.sin((labels[:, None] + 2) * time + phase)
    return (clean + 0.5 * torch.randn(clean.shape, generator=generator))[:, None]


if __name__ == "__main__":
    task = Waves()
    model = task.dense()
    print(f"{task.id}: {task.evaluate(model):.1%} of the test set is right")
