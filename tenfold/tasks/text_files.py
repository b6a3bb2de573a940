"""Texts from files, one a line, and their tokens in sequences of one length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import DataError

HELD_OUT = 10  # every tenth text is for validation, and another tenth for testing where there is no file of these
LOGITS = 1 << 28  # numbers: what the logits of one batch may be, 1 GiB in float32


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read as UTF-8, or has no such line.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read as text: --data wants a file with a sentence on each line ({error})"
        raise DataError(msg) from error
    if not found:
        msg = f"{path} is empty: --data wants a file with a sentence on each line"
        raise DataError(msg)
    return found


@dataclass(frozen=True)
class TextFiles:
    """Where the lines of each part of the texts are.

    Attributes:
        train: file whose lines are for calibration, validation and, without ``test``, testing.
        test: file of the test texts, if there is one.
        elsewhere: further files, by name.
    """

    train: Path
    test: Path | None = None
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path) -> TextFiles:
        """Return the texts in a file, or in a folder.

        Raises:
            DataError: a folder without training texts.
        """
        if not source.is_dir():
            return cls(source)
        files = {file.stem: file for file in sorted(source.glob("*.txt"))}
        train, test = files.pop("train", None), files.pop("test", None)
        if train is None:
            msg = f"{source} has no train.txt: --data wants that, test.txt and further texts there, or one file"
            raise DataError(msg)
        if "validation" in files:
            msg = f"{files['validation']}: texts for validation are held out of train.txt. Give that file another name."
            raise DataError(msg)
        return cls(train, test, files)

    def named(self, part: str) -> Path:
        """Return the file of a part: train, validation, test, or a further one."""
        if part == "test" and self.test is not None:
            return self.test
        return self.elsewhere.get(part, self.train)

    def lines(self, part: str) -> list[str]:
        """Return the lines of a part.

        Raises:
            DataError: a file cannot be read, or has too few lines to hold any out.
        """
        file = self.named(part)
        every = read_lines(file)
        if file is not self.train:
            return every
        if len(every) < HELD_OUT:
            msg = f"{file} has {len(every)} lines of text: every tenth is held out, and {HELD_OUT} are the least"
            raise DataError(msg)
        held = {"validation": HELD_OUT - 1} | ({"test": HELD_OUT // 2 - 1} if self.test is None else {})
        if part in held:
            return every[held[part] :: HELD_OUT]
        return [line for number, line in enumerate(every) if number % HELD_OUT not in held.values()]


def packed(texts: Sequence[str], tokenizer: Any, length: int, source: object) -> Tensor:
    """Return the tokens of texts one after the other, cut into sequences (count, length); a rest is dropped.

    Every text ends with a line break, and every sequence starts with the token that the tokenizer starts a text with,
    where it has one: some models predict nonsense without it.

    Args:
        texts: in order.
        tokenizer: of transformers.
        length: tokens of a sequence.
        source: of the texts, for a message.

    Raises:
        DataError: there are fewer tokens than one sequence takes.
    """
    start = _start(tokenizer)
    encoded = tokenizer([f"{text}\n" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids], dtype=torch.long)
    own = length - len(start)
    count = len(stream) // own
    if not count:
        msg = f"{source} has {len(stream)} tokens: too few for a sequence of {length}. Give more text, or NAME@TOKENS."
        raise DataError(msg)
    first = torch.tensor(start, dtype=torch.long).expand(count, len(start))
    return torch.cat([first, stream[: count * own].view(count, own)], dim=1)


def _start(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before a text, in a list that is empty where there is none."""
    ids = list(tokenizer("a", verbose=False)["input_ids"])
    first = tokenizer.bos_token_id
    return [first] if first is not None and ids[:1] == [first] else []


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Sequences (count, length) of tokens in batches ``{"input_ids": (rows, length)}``.

    Attributes:
        ids: all of them.
        batch_size: the most rows in a batch.
        vocabulary: words that the model knows: of more logits than ``LOGITS`` no batch is made.
    """

    ids: Tensor = field(repr=False)
    batch_size: int
    vocabulary: int

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return len(self.ids)

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return max(1, min(self.batch_size, LOGITS // (self.vocabulary * self.ids.shape[1])))

    def __len__(self) -> int:
        return math.ceil(len(self.ids) / self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for part in self.ids.split(self.rows):
            yield {"input_ids": part}
