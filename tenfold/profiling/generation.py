"""How fast language models read a prompt and write on from it, and what their caches of keys and values take."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import ProfileError
from tenfold.profiling.latency.measure import Comparison, compare_latency
from tenfold.tracing.contexts import evaluating

WRITTEN = 16  # tokens that are written in one run


@dataclass(frozen=True)
class Generation:
    """Prefill and decoding of several models, measured in turns.

    Attributes:
        prefill: of one pass over the prompt, which fills the cache.
        decode: of writing ``WRITTEN`` tokens after it, one by one.
        prompt: tokens of the prompt, all samples together.
        written: tokens that one run of ``decode`` writes, all samples together.
        cache_bytes: keys and values after the prompt, by model.
    """

    prefill: Comparison
    decode: Comparison
    prompt: int
    written: int
    cache_bytes: dict[str, int]

    def tokens_per_second(self, name: str) -> tuple[float, float]:
        """Return how many tokens of the prompt a model reads in a second, and how many it writes after it."""
        read, wrote = (side.latencies[name].median_ms / 1000 for side in (self.prefill, self.decode))
        return self.prompt / read, self.written / wrote


def compare_generation(
    models: Mapping[str, nn.Module], ids: Tensor, *, seconds: float = 8.0, threads: int | None = None
) -> Generation:
    """Return how fast causal language models of transformers read a prompt and write on, and what their caches take.

    Use it where a forward over a whole text says little: decoding runs at one token for each sample, where reading the
    weights takes the time. Both are measured in turns like whole models: see ``compare_latency``.

    Args:
        models: by name; the others are compared with the first.
        ids: the prompt (batch, tokens), on the device of the models. 16 more have to fit into the positions of a model.
        seconds: about how long to measure, half of it each.
        threads: CPU threads; as many as torch uses now if None.

    Raises:
        ProfileError: a model has no cache, or does not run on the prompt.
    """
    caches = {name: _read(model, ids) for name, model in models.items()}
    prompts = {name: (_Prefill(model), ids) for name, model in models.items()}
    writers = {name: (_Decoding(model, caches[name]), ids[:, -1:]) for name, model in models.items()}
    return Generation(
        prefill=compare_latency(prompts, seconds=seconds / 2, threads=threads),
        decode=compare_latency(writers, seconds=seconds / 2, threads=threads),
        prompt=ids.numel(),
        written=WRITTEN * len(ids),
        cache_bytes={name: cache_bytes(cache) for name, cache in caches.items()},
    )


def cache_bytes(cache: Any) -> int:
    """Return what the keys and values in a cache of transformers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _tensors(cache: Any) -> Iterator[Tensor]:
    layers = getattr(cache, "layers", None)  # transformers before 4.54 iterate over pairs instead
    held = ((layer.keys, layer.values) for layer in layers) if layers is not None else (pair[:2] for pair in cache)
    for pair in held:
        yield from (tensor for tensor in pair if isinstance(tensor, Tensor))


class _Prefill(nn.Module):
    """A pass over a prompt that fills a cache, with the logits of the last token alone where a model can do that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | (
            {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        )

    def forward(self, ids: Tensor) -> Any:
        """Return what the model does; its cache among it."""
        return self.model(input_ids=ids, **self.options)


class _Decoding(nn.Module):
    """Tokens written one by one, always after the same prompt; which ones, no matter."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, token: Tensor) -> Tensor:
        """Return the logits (batch, 1, words) after the last of them."""
        cache, output = copy.deepcopy(self.cache), None
        for _ in range(WRITTEN):
            output = self.model(input_ids=token, past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits  # type: ignore[union-attr]
        return logits


@torch.no_grad()
def _read(model: nn.Module, ids: Tensor) -> Any:
    with evaluating(model):
        cache = getattr(_Prefill(model)(ids), "past_key_values", None)
    if cache is None:
        msg = f"{type(model).__name__} keeps no cache of keys and values: is it a causal language model?"
        raise ProfileError(msg)
    return cache
