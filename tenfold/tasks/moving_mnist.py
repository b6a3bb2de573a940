"""Moving MNIST: classify a digit that moves through a film of large frames, by a recurrent network."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.layers import TTGRU
from tenfold.tasks.base import TASKS, seeded
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images

FRAMES, SIDE, DIGIT = 10, 64, 28
HIDDEN = 256
SAMPLES = {"train": 4_000, "test": 1_000}
ROOM = SIDE - DIGIT  # how far a digit can move
FASTEST = 6  # pixels from frame to frame, along each axis


class Films(Transform):
    """Films of stored digits: each moves in a straight line and bounces off the borders.

    A stored sample is a digit of 784 pixels, followed by its initial position and velocity, four numbers. Augmentation
    redraws position and velocity.
    """

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return films (samples, 10, 4096) in 0..1."""
        digits = inputs[:, : DIGIT**2].view(-1, DIGIT, DIGIT)
        return render(digits, places(inputs[:, DIGIT**2 :].long()))

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the digits with other positions and velocities."""
        return with_motion(inputs[:, : DIGIT**2], generator)


def with_motion(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Append uniformly drawn initial positions and velocities to flat digits (samples, 784)."""
    place = torch.randint(0, ROOM + 1, (len(digits), 2), generator=generator)
    speed = torch.randint(0, 2 * FASTEST + 1, (len(digits), 2), generator=generator)  # stored without a sign
    return torch.cat([digits, place.to(digits.dtype), speed.to(digits.dtype)], 1)


def places(motion: Tensor) -> Tensor:
    """Return positions (samples, 10, 2) of digits in all frames, from initial position and velocity (samples, 4).

    Example:
        >>> places(torch.tensor([[34, 0, 7, 6]]))[0, :4].tolist()
        [[34, 0], [35, 0], [36, 0], [35, 0]]
    """
    speed = motion[:, None, 2:] - FASTEST
    straight = motion[:, None, :2] + torch.arange(FRAMES)[:, None] * speed
    folded = straight % (2 * ROOM)
    return torch.where(folded > ROOM, 2 * ROOM - folded, folded)


def render(digits: Tensor, where: Tensor) -> Tensor:
    """Return films (samples, 10, 4096) in 0..1 of uint8 digits (samples, 28, 28) at their places (samples, 10, 2)."""
    frames = torch.zeros(*where.shape[:2], SIDE, SIDE)
    sample = torch.arange(len(digits))[:, None, None, None]
    frame = torch.arange(where.shape[1])[:, None, None]
    inner = torch.arange(DIGIT)
    rows = where[..., 0, None, None] + inner[:, None]
    columns = where[..., 1, None, None] + inner
    frames[sample, frame, rows, columns] = (digits.float() / 255)[:, None]
    return frames.flatten(2)


@TASKS.register("moving_mnist")
class MovingMnist(InMemoryTask):
    """Which MNIST digit moves through ten frames of 64×64 pixels? A GRU over whole frames, dense or a tensor train.

    4,000 digits of MNIST's training set and 1,000 of its test set, chosen once; each is one film, seeded. Training
    draws other films of its digits in every epoch. MNIST's Parquet files in the Hub layout are looked for in ``data``,
    else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets: there, or in a folder ``mnist`` within.
    """

    name: ClassVar[str] = "moving_mnist"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("gru", "tt-gru")
    input_shape: ClassVar[tuple[int, ...]] = (FRAMES, SIDE**2)
    transform: ClassVar[Transform] = Films()
    weights_hint: ClassVar[str] = "Train them: python -m benchmarks.moving_mnist.run. "
    tune_settings: ClassVar[dict[str, Any]] = {"epochs": 3, "batch_size": 64, "optimizer": "adamw", "lr": 0.0005}

    def architecture(self) -> nn.Module:
        """Return the GRU that the variant names, with a linear head on its last state."""
        return FilmClassifier(train=self.variant == "tt-gru")

    def read(self, split: Split) -> TensorSet:
        """Return digits with a first place and a speed, as uint8 (samples, 788), and their labels 0..9."""
        shape = (1, DIGIT, DIGIT)
        every = load_images("mnist", split, data=self.data, shape=shape, classes=10, source="ylecun/mnist")
        generator = seeded(0, len(split))  # a constant: the films never change
        chosen = torch.randperm(len(every), generator=generator)[: SAMPLES[split]]
        return TensorSet(with_motion(every.inputs[chosen].flatten(1), generator), every.labels[chosen])


class FilmClassifier(nn.Module):
    """A GRU over flat frames and a linear head on its last state.

    Args:
        train: whether the matrix of the inputs is a tensor train: 2,240 numbers instead of 3,145,728.
    """

    def __init__(self, *, train: bool) -> None:
        super().__init__()
        modes = {"ranks": 5, "in_modes": (8, 8, 8, 8), "hidden_modes": (4, 4, 4, 4)}
        make: Any = TTGRU if train else nn.GRU
        self.rnn = make(SIDE**2, HIDDEN, batch_first=True, **(modes if train else {}))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, films: Tensor) -> Tensor:
        """Return the class scores (samples, 10) of films (samples, frames, 4096)."""
        _, last = self.rnn(films)
        scores: Tensor = self.head(last[-1])
        return scores
