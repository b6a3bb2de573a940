"""Causal language models of transformers with their perplexity on your texts: ``lm:FOLDER``, ``lm:owner/name``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from tenfold.checkpoint.model_folder import CONFIG
from tenfold.checkpoint.pretrained import architecture
from tenfold.errors import CheckpointError, DataError, UnknownNameError, require
from tenfold.records import Metric
from tenfold.tasks.base import SPLITS, TASKS, MappedBatches, Progress, SizedBatches, seeded
from tenfold.tasks.gguf_files import decoding, gguf_options
from tenfold.tasks.perplexity import perplexity
from tenfold.tasks.text_files import TextFiles, TokenBatches, packed
from tenfold.tasks.transformers_zoo import HuggingFace

SEQUENCE = 512  # tokens
EXAMPLE = 128  # tokens of example inputs, at most
TESTED = 1 << 16  # tokens that are scored at most, unless a limit is given: an hour of a small CPU is too long


@TASKS.register("lm")
class CausalLM(HuggingFace):
    """A causal language model of transformers with its perplexity: lm:FOLDER, lm:owner/name, lm:FILE.gguf, lm:...@1024.

    ``data`` is a text file with a text on each line, or a folder with ``train.txt``, ``test.txt`` and any further files
    ``*.txt``, whose perplexities ``tenfold eval`` shows beside that of the test texts. Texts are read one after the
    other in sequences of 512 tokens, or of as many as stand after an ``@``. Every tenth line of the training texts is
    held out for validation; where there is no ``test.txt``, another tenth is for testing. At most 65,536 tokens are
    scored of a split, or ``limit`` sequences.

    A model that is stored in GGUF is decoded to float32; keep a copy where that takes long: see the documentation.
    """

    name: ClassVar[str] = "lm"
    metric: ClassVar[Metric] = Metric(name="perplexity", better="lower")
    scored: ClassVar[bool] = True
    looked_at: ClassVar[int] = 128

    # --- the model ---

    @property
    def model_name(self) -> str:
        """The folder, file or id, without the number of tokens."""
        name, _, tokens = (self.variant or "").rpartition("@")
        return name if name and tokens.isdigit() else self.variant or ""

    @property
    def source(self) -> str:
        """The folder or the id on the Hub; of a file in GGUF its folder."""
        file = Path(self.model_name).expanduser()
        return str(file.parent) if file.suffix == ".gguf" else super().source

    @classmethod
    def recorded(cls, text: str, checkpoint: Path) -> str:
        """Return the checkpoint itself as the task where it has a config, with the number of tokens of ``text``."""
        tokens = text.rpartition("@")[2]
        own = f"{cls.name}:{checkpoint}"
        return (f"{own}@{tokens}" if tokens.isdigit() else own) if (checkpoint / CONFIG).is_file() else text

    def opening_options(self, source: str) -> dict[str, Any]:
        """Return what ``from_pretrained`` is given besides ``source``: of a model in GGUF its file."""
        file = Path(self.model_name).expanduser()
        own = file if file.suffix == ".gguf" and source == self.source else Path(source)
        return {**super().opening_options(source), **gguf_options(own)}

    def loading_options(self, source: str) -> dict[str, Any]:
        """Return what ``from_pretrained`` of the model is given besides ``source``."""
        options = self.opening_options(source)
        return {**options, **(decoding() if "gguf_file" in options else {})}

    @property
    def model_class(self) -> Any:
        """The class that the config names, or that fits the kind of model.

        Raises:
            CheckpointError: the model does not predict the next token.
        """
        auto: Any = require("transformers.models.auto.modeling_auto", "hf")
        known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        named = getattr(self.config, "architectures", None) or [known.get(self.config.model_type)]  # GGUF has none
        if named[0] not in known.values():
            msg = f"{self.id} is a {named[0] or self.config.model_type}, which predicts no next token: give it as hf:"
            raise CheckpointError(msg)
        return architecture({"architectures": named}, self.id)

    # --- inputs ---

    @cached_property
    def length(self) -> int:
        """Tokens of a sequence.

        Raises:
            UnknownNameError: more than the model has positions for, or fewer than two.
        """
        most = int(getattr(self.config.get_text_config(), "max_position_embeddings", 0) or SEQUENCE)
        text = (self.variant or "").removeprefix(self.model_name).removeprefix("@")
        if text and not 2 <= int(text) <= most:
            msg = f"{self.id}: sequences of this model have 2 to {most} tokens, not {text}"
            raise UnknownNameError(msg)
        return int(text) if text else min(SEQUENCE, most)

    @property
    def vocabulary(self) -> int:
        """Number of words that the model knows."""
        return int(self.config.get_text_config().vocab_size)

    def example_inputs(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Return random tokens (batch, 128), or as many as a sequence has where that is fewer."""
        shape = batch_size, min(EXAMPLE, self.length)
        return {"input_ids": torch.randint(0, self.vocabulary, shape, generator=seeded(0))}

    def calibration_batches(self, samples: int, *, batch_size: int, seed: int) -> SizedBatches[dict[str, Tensor]]:
        """Return sequences of the training texts, drawn by ``seed``, in batches of at most ``batch_size``.

        Raises:
            DataError: there are fewer.
        """
        every = self._sequences("train")
        if not 1 <= samples <= len(every):
            msg = f"{samples} samples asked for; the texts in {self.data} have {len(every)} sequences of {self.length}"
            raise DataError(msg)
        chosen = torch.randperm(len(every), generator=seeded(seed))[:samples]
        return TokenBatches(every[chosen], batch_size, self.vocabulary)

    def calibration_size(self, seed: int) -> int:
        """Return the number of sequences; 0 without ``data``."""
        del seed
        return 0 if self.data is None else len(self._sequences("train"))

    def validation_batches(
        self, samples: int | None = None, *, batch_size: int, seed: int = 0
    ) -> SizedBatches[tuple[Any, Tensor]]:
        """Return sequences of the texts held out for validation, each with the tokens to be predicted in it."""
        del seed
        return MappedBatches(self._batches("validation", samples, batch_size), _with_targets)

    def test_batches(self, samples: int | None = None, *, batch_size: int) -> SizedBatches[tuple[Any, Tensor]]:
        """Return sequences of the test texts, each with the tokens to be predicted in it."""
        return MappedBatches(self._batches("test", samples, batch_size), _with_targets)

    def train_batches(self, epoch: int, *, batch_size: int, seed: int, hold_out: bool = False) -> NoReturn:
        """Raise DataError: language models are tuned to the dense model's answers."""
        del epoch, batch_size, seed, hold_out
        msg = f"{self.id} is tuned by the dense model's answers: give --label-free, or leave that to your own loop"
        raise DataError(msg)

    # --- the score ---

    def evaluate(
        self,
        model: nn.Module,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 125,
        progress: Progress | None = None,
    ) -> float:
        """Return the perplexity of a model on the test or validation texts: see ``perplexity``.

        Args:
            model: returns logits for every token.
            split: "test" or "validation".
            limit: at most so many sequences, the first ones; 65,536 tokens by default.
            batch_size: sequences in a forward at most; fewer where the logits would take more than 1 GiB.
            progress: called with (sequences done, sequences in all).

        Raises:
            DataError: an unknown split, or no texts.
            ProfileError: the model does not run on the inputs.
        """
        return perplexity(model, self.scored_batches(split, limit, batch_size), progress)

    def scored_batches(self, split: str, limit: int | None, batch_size: int) -> TokenBatches:
        """Return the sequences that a model is scored on; see ``evaluate``.

        Raises:
            DataError: an unknown split, or no texts.
        """
        if split not in SPLITS:
            msg = f"unknown split {split!r}. Known: {', '.join(SPLITS)}."
            raise DataError(msg)
        return self._batches(split, limit, batch_size)

    def scores_elsewhere(
        self, model: nn.Module, *, limit: int | None = None, batch_size: int = 125
    ) -> Mapping[str, float]:
        """Return the perplexity of every further file of texts, by its name without ``.txt``."""
        return {name: perplexity(model, own) for name, own in self.batches_elsewhere(limit, batch_size).items()}

    def batches_elsewhere(self, limit: int | None, batch_size: int) -> dict[str, TokenBatches]:
        """Return the sequences of every further file of texts, by its name without ``.txt``."""
        return {name: self._batches(name, limit, batch_size) for name in self._files.elsewhere}

    # --- texts ---

    @cached_property
    def _files(self) -> TextFiles:
        if self.data is None:
            msg = f"{self.id} needs texts: give --data FILE with a text on each line, or a folder with train.txt"
            raise DataError(msg)
        return TextFiles.of(self.data)

    def _batches(self, part: str, limit: int | None, batch_size: int) -> TokenBatches:
        most = max(1, TESTED // self.length) if limit is None else limit
        return TokenBatches(self._sequences(part)[:most], batch_size, self.vocabulary)

    def _sequences(self, part: str) -> Tensor:
        """Return the sequences (count, length) of a part of the texts, read once."""
        if part not in self._read:
            texts = self._files.lines(part)  # first: what is missing is said before a tokenizer is opened
            if self.processor is None:
                msg = f"{self.id} has no tokenizer for its texts: add its files to the folder"
                raise DataError(msg)
            self._read[part] = packed(texts, self.processor, self.length, self._files.named(part))
        return self._read[part]

    @cached_property
    def _read(self) -> dict[str, Tensor]:
        return {}


def _with_targets(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return batch, batch["input_ids"][:, 1:]
