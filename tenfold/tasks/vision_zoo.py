"""Models of timm and torchvision by name: ``timm:resnet18``, ``torchvision:fasterrcnn_resnet50_fpn@320``."""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse

import torch
from torch import nn

from tenfold.checkpoint.state_dicts import read_state_dict
from tenfold.errors import CheckpointError, UnknownNameError, first_line, require
from tenfold.registry import did_you_mean
from tenfold.tasks.base import TASKS, MappedBatches, SizedBatches, seeded
from tenfold.tasks.model_only import ModelOnly
from tenfold.tasks.picture_folder import Look, PictureFolder

_SIDE = 224  # pixels, where nothing else is known


class VisionZoo(ModelOnly):
    """A model for pictures out of a library, as NAME or NAME@PIXELS; ``data`` is a folder of pictures."""

    @abc.abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of all models of the library."""

    @abc.abstractmethod
    def make(self, *, trained: bool) -> nn.Module:
        """Return the model with initial weights, or with those that the library downloads."""

    @property
    @abc.abstractmethod
    def look(self) -> Look:
        """Size and normalisation of pictures."""

    @property
    def model_name(self) -> str:
        """The name without the pixels."""
        return (self.variant or "").partition("@")[0]

    @cached_property
    def side(self) -> int | None:
        """Pixels per side, where the variant says so."""
        text = (self.variant or "").partition("@")[2]
        if text and not (text.isdigit() and int(text) > 0):
            msg = f"{self.id}: {text!r} is no number of pixels. Write {self.name}:NAME@PIXELS."
            raise UnknownNameError(msg)
        return int(text) if text else None

    def architecture(self) -> nn.Module:
        """Return the model with fresh weights."""
        return self._made(trained=False)

    def pretrained(self) -> nn.Module:
        """Return the model with the weights that its library downloads.

        Raises:
            CheckpointError: there are none, or they are not available.
        """
        try:
            return self._made(trained=True)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            msg = (
                f"no trained weights of {self.id} available ({first_line(error)}). Give --weights FILE (.safetensors)."
            )
            raise CheckpointError(msg) from error

    def _made(self, *, trained: bool) -> nn.Module:
        if self.model_name not in (known := self.names()):
            msg = f"{self.name} has no model {self.model_name!r}. {did_you_mean(self.model_name, known)}"
            raise UnknownNameError(msg)
        return self.make(trained=trained)

    def example_inputs(self, batch_size: int = 1) -> Any:
        """Return random pictures (batch, channels, height, width) of the size of the model."""
        look = self.look
        return torch.randn(batch_size, len(look.mean), *look.size, generator=seeded(0))

    def inputs_of(self, source: Path, samples: int | None, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return the pictures in a folder."""
        return PictureFolder.chosen(source, self.look, samples, batch_size=batch_size, seed=seed)


@TASKS.register("timm")
class Timm(VisionZoo):
    """A model of timm by name, without data and score: timm:resnet18, timm:vit_base_patch16_224."""

    name: ClassVar[str] = "timm"
    extra: ClassVar[str] = "vision"
    variants: ClassVar[tuple[str, ...]] = ("resnet18",)

    def names(self) -> Sequence[str]:
        """Return the names of all models of timm, without tags of weights."""
        found: list[str] = _library("timm").list_models()
        return (*found, *([self.model_name] if self.model_name.partition(".")[0] in found else []))

    def make(self, *, trained: bool) -> nn.Module:
        """Return the model."""
        made: nn.Module = _library("timm").create_model(self.model_name, pretrained=trained)
        return made

    @cached_property
    def look(self) -> Look:
        """Size and normalisation from the configuration in timm."""
        known = _library("timm").get_pretrained_cfg(self.model_name)
        channels, height, width = getattr(known, "input_size", None) or (3, _SIDE, _SIDE)
        size = (self.side or height, self.side or width)
        mean, std = (tuple(getattr(known, n, None) or (0.5,) * channels) for n in ("mean", "std"))
        return Look(size, mean, std)


@TASKS.register("torchvision")
class TorchVision(VisionZoo):
    """A model of torchvision by name, without data and score; detection and segmentation too: torchvision:resnet50."""

    name: ClassVar[str] = "torchvision"
    extra: ClassVar[str] = "vision"
    variants: ClassVar[tuple[str, ...]] = ("resnet18",)

    def names(self) -> Sequence[str]:
        """Return the names of all models of torchvision."""
        found: list[str] = _library("torchvision.models").list_models()
        return found

    def make(self, *, trained: bool) -> nn.Module:
        """Return the model; of a detector the pixels are the shorter and the longer side that it scales to."""
        models = _library("torchvision.models")
        options: dict[str, Any] = {"weights": "DEFAULT" if trained else None}
        if not trained and self.kind in {"detection", "segmentation"}:
            options["weights_backbone"] = None
        if self.kind == "detection" and self.side is not None:
            options |= {"min_size": self.side, "max_size": self.side}
        if self.model_name.startswith("vit_") and self.side is not None:
            options["image_size"] = self.side
        with _weights_only(models.get_model_weights(self.model_name).DEFAULT) if trained else nullcontext():
            made: nn.Module = models.get_model(self.model_name, **options)
        if trained or not _FROZEN.fullmatch(self.model_name):
            return made
        exact = "resnet50" in self.model_name and not self.model_name.startswith("fcos")
        return _frozen(made, eps=0.0 if exact else 1e-5)  # as torchvision sets it with its weights

    @cached_property
    def kind(self) -> str:
        """The subpackage of torchvision: classification, detection, segmentation ..."""
        module = str(_library("torchvision.models").get_model_builder(self.model_name).__module__)
        inner = module.removeprefix("torchvision.models.").split(".")
        return inner[0] if len(inner) > 1 and inner[0] in _KINDS else "classification"

    @cached_property
    def look(self) -> Look:
        """The size that the weights were trained for; a detector normalises by itself."""
        if self.kind == "detection":
            return Look((self.side or 480, self.side or 640), (0.0,) * 3, (1.0,) * 3)
        known = next(iter(_library("torchvision.models").get_model_weights(self.model_name)), None)
        crop = (getattr(known.transforms, "keywords", {}) if known is not None else {}).get("crop_size", _SIDE)
        side = self.side or (crop if isinstance(crop, int) else crop[0])
        return Look((side, side))

    def example_inputs(self, batch_size: int = 1) -> Any:
        """Return random pictures: one tensor, or for a detector a list of them, one for each picture."""
        if self.kind == "detection":
            generator = seeded(0)
            return [torch.rand(3, *self.look.size, generator=generator) for _ in range(batch_size)]
        return super().example_inputs(batch_size)

    def inputs_of(self, source: Path, samples: int | None, *, batch_size: int, seed: int) -> SizedBatches[Any]:
        """Return the pictures in a folder; for a detector as lists."""
        pictures = PictureFolder.chosen(source, self.look, samples, batch_size=batch_size, seed=seed)
        return MappedBatches(pictures, list) if self.kind == "detection" else pictures


# Detectors whose trained weights come with frozen batch norms; torchvision builds others where it loads no weights.
_FROZEN = re.compile(r"(fasterrcnn|maskrcnn|keypointrcnn|retinanet|fcos)_(?!.*_v2$).*")


def _frozen(model: nn.Module, eps: float) -> nn.Module:
    """Freeze the batch norms of a detector's backbone, so that trained weights and checkpoints fit it."""
    layers: Any = _library("torchvision.ops.misc")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and name.startswith("backbone."):
            frozen = layers.FrozenBatchNorm2d(module.num_features, eps=eps)
            frozen.load_state_dict(module.state_dict(), strict=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, frozen)
    return model


@contextmanager
def _weights_only(weights: Any) -> Iterator[None]:
    """Let torchvision read a file of weights by torch's loader for weights only, and only if its hash is right.

    By itself it unpickles whatever lies in its cache, and checks the hash of what it downloads alone.
    """
    weights.get_state_dict = lambda **_: _cached(weights.url)
    try:
        yield
    finally:
        del weights.get_state_dict


def _cached(url: str) -> dict[str, Any]:
    """Return the state dict at an address, through the cache of torch.hub.

    Raises:
        CheckpointError: what is in the cache has another hash than its name says, or is no state dict.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    named = re.search(r"-([a-f0-9]{8,})\.", file.name)
    wanted = named[1] if named else ""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), wanted or None, progress=False)
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(wanted):
        msg = f"{file} has another hash than its name says: delete it, and it is downloaded again"
        raise CheckpointError(msg)
    return read_state_dict(file).tensors


_KINDS = ("detection", "segmentation", "video", "optical_flow", "quantization")


def _library(name: str) -> Any:
    return require(name, "vision")
