"""Well-known networks by name, with random weights: ``build("torchvision:resnet18")`` gives model and inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import require
from tenfold.registry import did_you_mean

_kept_alive: list[torch.library.Library] = []  # operator definitions die with the object that made them


@dataclass(frozen=True)
class Subject:
    """A network and example inputs, as ``tenfold.profile`` takes them."""

    name: str
    model: nn.Module
    inputs: Any


def build(name: str, *, batch: int = 1, size: int | None = None, seed: int = 0, **options: Any) -> Subject:
    """Return the network called ``"family:variant"`` with random weights, and inputs for it.

    Args:
        name: ``torchvision:NAME`` for any classifier of torchvision, ``transformers:bert-base``,
            ``torch:transformer-encoder``, ``torch:lstm`` or ``torch:gru``.
        batch: examples in the input.
        size: pixels per side, or length of the sequence.
        seed: of weights and inputs.
        options: further arguments of the network's constructor.

    Example:
        >>> subject = build("torch:lstm", input_size=4, hidden_size=8, size=5)
        >>> subject.inputs.shape
        torch.Size([1, 5, 4])
    """
    family, _, variant = name.partition(":")
    known = {"torchvision": _torchvision, "transformers": _bert, "torch": _torch}
    if family not in known or not variant:
        msg = f"unknown network {name!r}: write family:variant. {did_you_mean(family, known)}"
        raise ValueError(msg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = known[family](variant, batch, size, options)
    return Subject(name, model.eval(), inputs)


def _torchvision(variant: str, batch: int, size: int | None, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    supply_torchvision_ops()
    models: Any = require("torchvision.models", "vision")
    if size is not None and variant.startswith("vit"):
        options = {"image_size": size, **options}
    side = size or 224
    return models.get_model(variant, weights=None, **options), torch.randn(batch, 3, side, side)


def _bert(variant: str, batch: int, size: int | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    if variant != "bert-base":
        msg = f"unknown network transformers:{variant}. Known: transformers:bert-base."
        raise ValueError(msg)
    supply_torchvision_ops()  # which transformers imports
    transformers: Any = require("transformers", "hf")
    config = transformers.BertConfig(**options)
    length = size or 128
    ids = torch.randint(0, config.vocab_size, (batch, length))
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": torch.ones(batch, length).long()}


def _torch(variant: str, batch: int, size: int | None, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    build_one: dict[str, Callable[..., nn.Module]] = {
        "transformer-encoder": _encoder,
        "lstm": nn.LSTM,
        "gru": nn.GRU,
    }
    if variant not in build_one:
        msg = f"unknown network torch:{variant}. {did_you_mean(variant, build_one)}"
        raise ValueError(msg)
    if variant == "transformer-encoder":
        options = {"width": 768, "heads": 12, "hidden": 3072, "layers": 12, **options}
        features = options["width"]
    else:
        options = {"input_size": 256, "hidden_size": 512, "num_layers": 2, "batch_first": True, **options}
        features = options["input_size"]
    return build_one[variant](**options), torch.randn(batch, size or 128, features)


def _encoder(width: int, heads: int, hidden: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, layers)


def supply_torchvision_ops() -> None:
    """Define the two operators that torchvision needs at import where its compiled library does not load.

    A torchvision wheel built for CUDA finds no CUDA libraries beside a CPU-only torch, and then fails to import because
    it attaches fake kernels to operators that do not exist. No classifier runs them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _kept_alive:
        return
    compiled = next(Path(found.origin).parent.glob("_C.*"), None)
    try:
        if compiled is not None:
            torch.ops.load_library(str(compiled))
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)
