"""The Stanford Sentiment Treebank: sentences of film reviews, a bidirectional LSTM, and its table as a tensor train."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.errors import DataError
from tenfold.layers import TTEmbedding
from tenfold.tasks.base import TASKS, seeded
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import DATA_VARIABLE, data_root
from tenfold.tasks.sentences import Sentence, SentenceClassifier, Sentences, numbered, read_sentences, vocabulary

# Padding, unknown words, and every word of stsa.fine.train. The binary part has fewer, and leaves rows unused.
WORDS = 16_581
COLUMNS, HIDDEN, LAYERS = 256, 128, 1
CLASSES = {"fine": 5, "binary": 2}
RANK = 16
# The shapes of Hrinchuk et al. 2020 (arXiv 1901.10787); each has 18,000 rows.
TRAINS = {
    "tt1": ((24, 25, 30), (4, 8, 8)),
    "tt2": ((10, 10, 12, 15), (4, 4, 4, 4)),
    "tt3": ((4, 5, 5, 5, 6, 6), (2, 2, 2, 2, 4, 4)),
}
SPREAD = 0.1  # standard deviation of the entries of a new table, dense or not: the same start for all
TYPICAL = 20  # words in a sentence


@TASKS.register("sst")
class Sst(InMemoryTask):
    """SST, five classes or two, with a bidirectional LSTM whose table of words is dense or one of three tensor trains.

    Whole sentences only (Socher et al. 2013): 8,544 for training, 1,101 for validation and 2,210 for testing, of two
    classes 6,920, 872 and 1,821. The files ``stsa.fine.train``, ``.dev``, ``.test`` and ``stsa.binary.*``, a label, a
    space and words in each line, are looked for in ``data``, else in $TENFOLD_DATA, else in
    ~/.cache/tenfold/datasets: there, or in a folder ``sst`` within. The vocabulary is that of the training part.

    The validation part is the set's own; as with every task it belongs to the training set unless it is held out.
    """

    name: ClassVar[str] = "sst"
    variants: ClassVar[tuple[str, ...]] = tuple(f"{part}-{table}" for part in CLASSES for table in ("full", *TRAINS))
    input_shape: ClassVar[tuple[int, ...]] = (TYPICAL,)
    transform: ClassVar[Transform] = Sentences(lost=0.05)
    weights_hint: ClassVar[str] = "Train them: python -m benchmarks.sst.run. "
    tune_settings: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 0.0005,
        "weight_decay": 0.01,
    }

    @property
    def part(self) -> str:
        """``fine`` or ``binary``."""
        return str(self.variant).partition("-")[0]

    def architecture(self) -> nn.Module:
        """Return the network with the table that the variant names."""
        return SentenceClassifier(
            self._table(), COLUMNS, hidden=HIDDEN, layers=LAYERS, classes=CLASSES[self.part], dropout=0.5
        )

    def _table(self) -> nn.Module:
        kind = str(self.variant).partition("-")[2]
        if kind in TRAINS:
            rows, columns = TRAINS[kind]
            return TTEmbedding(WORDS, COLUMNS, RANK, row_modes=rows, col_modes=columns, padding_idx=0, std=SPREAD)
        table = nn.Embedding(WORDS, COLUMNS, padding_idx=0)
        with torch.no_grad():
            table.weight.mul_(SPREAD)
        return table

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """Return seeded sentences of 20 words (batch_size, 20)."""
        return torch.randint(2, WORDS, (batch_size, TYPICAL), generator=seeded(0))

    def read(self, split: Split) -> TensorSet:
        """Return ids (sentences, longest) and labels; those for training are followed by those for validation."""
        if split == "test":
            return numbered(self._sentences("test"), self.ids)
        return numbered(self._fitting + self._sentences("dev"), self.ids)

    def held_out(self, samples: int) -> Tensor:
        """Return the places of the set's own validation part."""
        return torch.arange(len(self._fitting), samples)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The words and their rows in the table."""
        return vocabulary(self._fitting, WORDS)

    @cached_property
    def _fitting(self) -> list[Sentence]:
        return self._sentences("train")

    def _sentences(self, split: str) -> list[Sentence]:
        return read_sentences(_find(self.data, f"stsa.{self.part}.{split}"), classes=CLASSES[self.part])


def _find(data: Path | None, name: str) -> Path:
    root = data_root(data)
    for folder in (root / "sst", root):
        if (folder / name).is_file():
            return folder / name
    what = "has no" if root.is_dir() else "is not a folder; need"
    msg = (
        f"no sst data: {root} {what} sst/{name}. Get the stsa.* files of the Stanford Sentiment Treebank and pass "
        f"their folder as data=FOLDER (--data FOLDER) or in ${DATA_VARIABLE}."
    )
    raise DataError(msg)
