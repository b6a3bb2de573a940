"""Models of transformers from a folder or the Hub: ``hf:FOLDER``, ``hf:owner/name``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.checkpoint.hub_facts import HubFacts
from tenfold.checkpoint.model_folder import CONFIG
from tenfold.checkpoint.pretrained import (
    OWN_CODE,
    architecture,
    build_dense,
    opening,
    read_config,
    write_config,
)
from tenfold.errors import (
    CheckpointError,
    DataError,
    InstallationError,
    ProfileError,
    UnknownNameError,
    naming_trouble,
    require,
)
from tenfold.surgery import MARK
from tenfold.tasks.base import TASKS, MappedBatches, SizedBatches, seeded
from tenfold.tasks.model_only import ModelOnly
from tenfold.tasks.picture_folder import Look, PictureFolder
from tenfold.tasks.text_files import read_lines

LENGTH = 128  # tokens of example inputs, and at most of a sentence to calibrate with


@TASKS.register("hf")
class HuggingFace(ModelOnly):
    """A model of transformers by folder or id, without data and score: hf:FOLDER, hf:owner/name.

    ``data`` is a text file with a sentence on each line for a model of text, a folder of pictures for one of pictures.
    """

    name: ClassVar[str] = "hf"
    extra: ClassVar[str] = "hf"

    @property
    def source(self) -> str:
        """The folder or the id on the Hub."""
        if not self.model_name:
            msg = f"which model? Write {self.name}:FOLDER or {self.name}:owner/name."
            raise UnknownNameError(msg)
        folder = Path(self.model_name).expanduser()
        return str(folder) if folder.is_dir() else self.model_name

    @property
    def model_name(self) -> str:
        """The folder or id as it was given."""
        return self.variant or ""

    def opening_options(self, source: str) -> dict[str, Any]:
        """Return what ``from_pretrained`` is given besides the folder or id ``source``."""
        del source
        return dict(OWN_CODE)

    def loading_options(self, source: str) -> dict[str, Any]:
        """Return what ``from_pretrained`` of the model is given besides ``source``."""
        return self.opening_options(source)

    @classmethod
    def recorded(cls, text: str, checkpoint: Path) -> str:
        """Return the checkpoint itself as the task where it has a config: it carries its own skeleton."""
        return f"{cls.name}:{checkpoint}" if (checkpoint / CONFIG).is_file() else text

    # --- the model ---

    @cached_property
    def config(self) -> Any:
        """The config of the model."""
        transformers: Any = require("transformers", "hf")
        with opening(self.id):
            return transformers.AutoConfig.from_pretrained(self.source, **self.opening_options(self.source))

    @property
    def model_class(self) -> Any:
        """The class that the config names."""
        return architecture({"architectures": getattr(self.config, "architectures", None)}, self.id)

    def architecture(self) -> nn.Module:
        """Return the model with fresh weights."""
        return build_dense(self.config, self.model_class)

    def pretrained(self) -> nn.Module:
        """Return the model with the weights of the folder or the Hub.

        Raises:
            CheckpointError: there are none, or they are those of a compressed model.
        """
        return self._pretrained(self.source)

    def dense(self, weights: Path | str | None = None) -> nn.Module:
        """Return the trained dense model in eval mode: from another folder, a .safetensors file, or ``pretrained``."""
        if weights is not None and Path(weights).expanduser().is_dir():
            return self._pretrained(str(Path(weights).expanduser())).eval()
        return super().dense(weights)

    def _pretrained(self, source: str) -> nn.Module:
        known = read_config(Path(source)) if (Path(source) / CONFIG).is_file() else {}
        if (known.get("quantization_config") or {}).get("quant_method") == MARK["quant_method"]:
            msg = f"{source} holds a model that is compressed already: give it as --checkpoint"
            raise CheckpointError(msg)
        with opening(self.id):
            made: nn.Module = self.model_class.from_pretrained(source, **self.loading_options(source))
        return made.eval()

    def write_beside(self, model: nn.Module, folder: Path) -> HubFacts:
        """Write config and tokenizer beside the weights, so that ``load_pretrained`` and ``AutoModel`` open them."""
        return write_config(model, folder, tokenizer=self.processor)

    # --- inputs ---

    @property
    def main_input(self) -> str:
        """Name of the first input: ``input_ids`` or ``pixel_values``.

        Raises:
            ProfileError: something else.
        """
        known = str(getattr(self.model_class, "main_input_name", "input_ids"))
        if known not in {"input_ids", "pixel_values"}:
            msg = f"{self.id} takes {known}: hf serves models of text and of pictures. Use tenfold.compress in Python."
            raise ProfileError(msg)
        return known

    def example_inputs(self, batch_size: int = 1) -> Any:
        """Return random ids (batch, 128), all of them real, or random pictures; keyword arguments of the forward."""
        if self.main_input == "pixel_values":
            look = self.look
            return {"pixel_values": torch.randn(batch_size, len(look.mean), *look.size, generator=seeded(0))}
        config = self.config.get_text_config()
        length = min(LENGTH, int(getattr(config, "max_position_embeddings", 0) or LENGTH) - _reserved(config))
        ids = torch.randint(0, int(config.vocab_size), (batch_size, length), generator=seeded(0))
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            ids[ids == pad] = (pad + 1) % int(config.vocab_size)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.with_decoder(inputs)

    def with_decoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs; an encoder-decoder gets the same text on both sides."""
        decoder = {"decoder_input_ids": inputs["input_ids"]} if self.config.is_encoder_decoder else {}
        return {**inputs, **decoder}

    def inputs_of(self, source: Path, samples: int | None, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return tokenized sentences, padded and with their mask, or pictures."""
        if self.main_input == "pixel_values":
            pictures = PictureFolder.chosen(source, self.look, samples, batch_size=batch_size, seed=seed)
            return MappedBatches(pictures, lambda batch: {"pixel_values": batch})
        if self.processor is None:
            msg = f"{self.id} has no tokenizer for the sentences of --data. Use --calibration-samples 0, or Python."
            raise DataError(msg)
        texts = read_lines(source)
        order = torch.randperm(len(texts), generator=seeded(seed)).tolist()[:samples]
        return _Texts(self, tuple(texts[i] for i in order), batch_size)

    @cached_property
    def processor(self) -> Any:
        """The tokenizer or image processor; None if there is none."""
        transformers: Any = require("transformers", "hf")
        auto = transformers.AutoImageProcessor if self.main_input == "pixel_values" else transformers.AutoTokenizer
        try:
            with naming_trouble():
                return auto.from_pretrained(self.source, **self.opening_options(self.source))
        except InstallationError:
            raise
        except (OSError, ValueError, KeyError, ImportError):  # processors differ in how they report that there is none
            return None

    @cached_property
    def look(self) -> Look:
        """Size and normalisation of pictures, from config and processor."""
        size = getattr(self.config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = int(getattr(self.config, "num_channels", 3))
        half = (0.5,) * channels
        mean = tuple(getattr(self.processor, "image_mean", None) or half)
        return Look((int(height), int(width)), mean, tuple(getattr(self.processor, "image_std", None) or half))


@dataclass(frozen=True, eq=False)
class _Texts:
    """Tokenized sentences in batches of similar length, so that there is little padding."""

    task: HuggingFace
    texts: tuple[str, ...]
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.texts) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        tokenizer = self.task.processor
        if tokenizer.pad_token is None:  # such as GPT-2; the mask excludes padding
            tokenizer.pad_token = tokenizer.eos_token
        by_length = sorted(self.texts, key=len)
        for start in range(0, len(by_length), self.batch_size):
            part = by_length[start : start + self.batch_size]
            made = tokenizer(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
            yield self.task.with_decoder({k: made[k] for k in ("input_ids", "attention_mask")})


def _reserved(config: Any) -> int:
    """Return the number of positions that RoBERTa-like models leave unused: they count from the padding id on."""
    pad = getattr(config, "pad_token_id", None)
    kin = str(getattr(config, "model_type", "")) in {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    return int(pad or 0) + 1 if kin else 0
