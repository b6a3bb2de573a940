"""A run in stages that kills itself: python killed.py FOLDER EPOCH STEP (counted from 0; a negative epoch: never)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tenfold.iterative import Training, compress_iteratively
from tenfold.runtime import Runtime
from tenfold.training import TuneConfig
from tests.iterative.small import Batch, batches, both, cnn, images

HOW = both(
    rounds=2,
    path="rule",
    rule={"name": "ratio", "share": 0.6},
    formats=["tucker2", "low_rank"],
    epochs=2,
    final_epochs=1,
)
CONFIG = TuneConfig(lr=0.02, train_as="factors")


class Deadly:
    """The batches of an epoch, the last thing that the process sees at one of them."""

    def __init__(self, epoch: int, last: tuple[int, int]) -> None:
        self.epoch, self.last = epoch, last

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(batches(self.epoch)):
            if (self.epoch, step) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def main(folder: str, epoch: int, step: int) -> None:
    torch.set_num_threads(1)
    tune = Training(lambda now: Deadly(now, (epoch, step)), CONFIG)
    compress_iteratively(cnn(), images()[0][:1], *HOW, tune=tune, runtime=Runtime(folder=folder))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
