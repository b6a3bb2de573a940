"""Labelled sentences from text files, their vocabulary, and a recurrent classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tenfold.errors import DataError
from tenfold.tasks.in_memory import TensorSet, Transform

PADDING, UNKNOWN = 0, 1  # ids that are no words

Sentence = tuple[int, list[str]]


def read_sentences(path: Path, *, classes: int) -> list[Sentence]:
    """Read a file with a label, a space and the words of a sentence in each line.

    Raises:
        DataError: the file is empty or damaged, or a label is not in 0..classes-1; the message says where.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {path} ({error})"
        raise DataError(msg) from error
    found: list[Sentence] = []
    for number, line in enumerate(lines, 1):
        label, _, text = line.partition(" ")
        words = text.split()
        if not line.strip():
            continue
        if not label.isascii() or not label.isdigit() or int(label) >= classes or not words:
            msg = f"{path}, line {number}: a line is a label 0..{classes - 1}, a space and words, not {line[:40]!r}"
            raise DataError(msg)
        found.append((int(label), words))
    if not found:
        msg = f"{path} has no sentences"
        raise DataError(msg)
    return found


def vocabulary(sentences: Iterable[Sentence], size: int) -> dict[str, int]:
    """Return the ids of the most frequent words in order of frequency, after those of padding and unknown words.

    Ties are in alphabetical order, so that ids are the same everywhere.

    Example:
        >>> vocabulary([(0, ["a", "b", "b"]), (1, ["b", "c"])], 4)
        {'b': 2, 'a': 3}
    """
    counts = Counter(word for _, words in sentences for word in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(ranked[: size - 2], 2)}


def numbered(sentences: Sequence[Sentence], ids: Mapping[str, int]) -> TensorSet:
    """Return sentences as ids (sentences, longest), padded with zeros, and their labels.

    Example:
        >>> numbered([(4, ["good"]), (0, ["not", "good"])], {"good": 2}).inputs.tolist()
        [[2, 0], [1, 2]]
    """
    rows = [torch.tensor([ids.get(word, UNKNOWN) for word in words]) for _, words in sentences]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return TensorSet(padded, torch.tensor([label for label, _ in sentences]))


class Sentences(Transform):
    """Trim batches to their longest sentence; augment by replacing random words with the unknown word.

    Without this the embedding of the unknown word, which the test set needs, would never get a gradient.
    """

    def __init__(self, lost: float) -> None:
        self.lost = lost

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return the ids (sentences, longest of them)."""
        return inputs[:, : int((inputs != PADDING).sum(1).max())]

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a copy with a share of the words replaced by the unknown word."""
        lost = torch.rand(inputs.shape, generator=generator) < self.lost
        return inputs.masked_fill(lost & (inputs != PADDING), UNKNOWN)


class SentenceClassifier(nn.Module):
    """Embedding, bidirectional LSTM, mean of its outputs over the words, and a linear head.

    Args:
        embedding: from ids (sentences, longest) to rows (sentences, longest, columns).
        columns: width of the rows.
        hidden: of the LSTM, in each direction.
        layers: of the LSTM.
        classes: width of the head.
        dropout: of rows, means, and between layers.

    Example:
        >>> net = SentenceClassifier(nn.Embedding(20, 8, padding_idx=0), 8, hidden=4, layers=1, classes=5, dropout=0.0)
        >>> net(torch.tensor([[3, 4, 0], [5, 6, 7]])).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, embedding: nn.Module, columns: int, *, hidden: int, layers: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.rnn = nn.LSTM(columns, hidden, layers, batch_first=True, bidirectional=True, dropout=between)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the class scores (sentences, classes) of ids (sentences, longest) that end in padding."""
        lengths = (ids != PADDING).sum(1).clamp(min=1)
        rows = self.dropout(self.embedding(ids))
        packed = pack_padded_sequence(rows, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)  # zeros behind the words
        mean = states.sum(1) / lengths.unsqueeze(1).to(states.dtype)
        scores: Tensor = self.head(self.dropout(mean))
        return scores
