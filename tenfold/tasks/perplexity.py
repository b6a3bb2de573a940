"""Perplexity of language models, without the logits of a whole batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import DataError
from tenfold.tracing.contexts import device_of, evaluating
from tenfold.tracing.inputs import call_model, to_device
from tenfold.tracing.replay import stand_in

_CHUNK = 1 << 26  # logits that are computed at a time: 256 MiB in float32
_TILE = 2048  # words that a plain head is asked for at a time: their logits stay in the cache
_PROBE = 8  # tokens on which it is looked at whether the head alone makes the logits


def perplexity(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], progress: Callable[[int, int], None] | None = None
) -> float:
    """Return exp of the mean of −log p(token | the tokens before it), over all tokens but the first of each sequence.

    Use it to score causal language models of transformers on sequences without padding. The logits of a vocabulary of
    262,144 words exist for a few hundred tokens at a time.

    Args:
        model: returns ``logits`` (batch, length, words).
        batches: ``{"input_ids": (batch, length)}``, on any device.
        progress: called with (sequences done, sequences in all, or 0 where unknown) after each batch.

    Raises:
        DataError: there is no token to predict.
        ProfileError: the model does not run on the inputs.
    """
    device, total, count, done = device_of(model), 0.0, 0, 0
    samples = int(getattr(batches, "samples", 0))
    with evaluating(model):
        head: nn.Module | None = None
        for number, batch in enumerate(batches):
            ids = to_device(batch["input_ids"], device)
            head = _lone_head(model, ids) if number == 0 else head
            losses = token_losses(model, ids, head)
            total, count, done = total + float(losses.double().sum()), count + losses.numel(), done + len(ids)
            if progress is not None:
                progress(done, samples)
    if not count:
        msg = "there is no token to predict: sequences need at least two"
        raise DataError(msg)
    return math.exp(total / count) if total / count < 700 else math.inf


def token_losses(model: nn.Module, ids: Tensor, head: nn.Module | None) -> Tensor:
    """Return −log p of each token (batch, length − 1) given those before it, in float32.

    Args:
        model: that predicts.
        ids: the tokens (batch, length).
        head: the layer whose outputs are the logits, which then runs on a part of the tokens at a time; None to run the
            whole model on one sequence at a time.
    """
    if head is None:
        rows = [F.cross_entropy(_logits(model, row[None])[0, :-1], row[1:], reduction="none") for row in ids]
        return torch.stack(rows)
    entered = _entering(model, head, ids)[:, :-1].flatten(0, 1)
    return _losses_behind(head, entered, ids[:, 1:].flatten()).view(len(ids), -1)


def _losses_behind(head: nn.Module, entered: Tensor, wanted: Tensor) -> Tensor:
    """Return −log p of wanted words (rows,), given what enters the head (rows, width).

    Of a plain layer, a tile of the vocabulary at a time: half the time of whole rows of logits, which leave the cache.
    """
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        step = max(1, _CHUNK // head(entered[:1]).shape[-1])
        parts = zip(entered.split(step), wanted.split(step), strict=True)
        return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in parts])
    top = entered.new_full((len(entered),), -math.inf, dtype=torch.float32)
    total = torch.zeros_like(top)
    biases = itertools.repeat(None) if head.bias is None else head.bias.split(_TILE)
    for weight, bias in zip(head.weight.split(_TILE), biases, strict=False):
        logits = F.linear(entered, weight, bias).float()
        higher = torch.maximum(top, logits.amax(-1))
        total = total * (top - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(-1)
        top = higher
    right = (entered.float() * head.weight[wanted].float()).sum(-1)
    return top + total.log() - (right if head.bias is None else right + head.bias[wanted].float())


def _lone_head(model: nn.Module, ids: Tensor) -> nn.Module | None:
    """Return the layer whose outputs are the logits of a model; None where more is done to them, such as a cap."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        return None
    few = ids[:1, :_PROBE]
    whole, entered = _logits(model, few)[0], _entering(model, head, few)[0]
    alone = head(entered).float()
    if whole.shape != alone.shape or not torch.allclose(whole, alone, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        return None
    # Hooks on the head are in its outputs, and not in what its weight makes of tiles.
    wanted = F.cross_entropy(alone[:-1], few[0, 1:], reduction="none")
    tiled = _losses_behind(head, entered[:-1], few[0, 1:])
    return head if torch.allclose(wanted, tiled, rtol=1e-3, atol=1e-3) else None


def _entering(model: nn.Module, head: nn.Module, ids: Tensor) -> Tensor:
    """Return what enters the head (batch, length, width), which does not run itself."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]  # whatever the forward does to logits, it does to next to nothing

    with stand_in(head, keep):
        call_model(model, {"input_ids": ids})
    return seen[0]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output: Any = call_model(model, {"input_ids": ids})
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()
