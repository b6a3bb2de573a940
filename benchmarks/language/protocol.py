"""What all methods share: the model, its layers, its texts, and how a result is scored."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.tasks.causal_lm import CausalLM
from tenfold.tasks.perplexity import perplexity
from tenfold.tasks.text_files import TokenBatches, packed
from tenfold.tracing.replay import stand_in


@dataclass(frozen=True, eq=False)
class Protocol:
    """A model and texts, cut as the YAML file says.

    Attributes:
        task: that opens both.
        config: the YAML file.
        sst: file of SST's sentences, a label before each; None to score no other text.
        runs: folder for what is computed once.
    """

    task: CausalLM
    config: dict[str, Any]
    sst: Path | None
    runs: Path

    @cached_property
    def model(self) -> nn.Module:
        """The dense model; methods work on copies."""
        return self.task.dense()

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the blocks, in order."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return {p: m for p, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head}

    @cached_property
    def blocks(self) -> list[str]:
        """The paths of the blocks, in order: the list of modules that holds the layers."""
        (path,) = {
            p for p, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and f"{p}.0." in self._first
        }
        return [f"{path}.{i}" for i in range(len(self.model.get_submodule(path)))]  # type: ignore[arg-type]

    @property
    def _first(self) -> str:
        return next(iter(self.layers)) + "."

    @property
    def linear_params(self) -> int:
        """Numbers in the linear layers."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    def copied(self) -> nn.Module:
        """Return a copy that shares embedding and head with the original."""
        shared = {id(p): p for m in (self.model.get_input_embeddings(),) for p in m.parameters()}  # type: ignore[operator]
        return copy.deepcopy(self.model, shared)

    # --- texts ---

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """The batches that every method looks at."""
        settings = {"batch_size": 2, "seed": self.config["seed"]}
        return list(self.task.calibration_batches(self.config["calibration"], **settings))

    @cached_property
    def held_out(self) -> Tensor:
        """Sequences of training texts that no fit has seen, for choices among plans."""
        batches = self.task.validation_batches(self.config["kl"], batch_size=1)
        return torch.cat([inputs["input_ids"] for inputs, _ in batches])

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return the perplexities of a model."""
        found = {"test": self.task.evaluate(model, limit=self.config["test"], batch_size=2)}
        if self.sst is not None:
            found["elsewhere"] = perplexity(model, self._elsewhere)
        return found

    @cached_property
    def _elsewhere(self) -> TokenBatches:
        lines = [line.partition(" ")[2] for line in (self.sst or Path()).read_text(encoding="utf-8").splitlines()]
        ids = packed(lines, self.task.processor, self.config["sequence"], self.sst)
        return TokenBatches(ids[: self.config["elsewhere"]], 2, self.task.vocabulary)

    # --- the divergence of the network, by which some methods choose ---

    def divergence(self, model: nn.Module, *, temperature: float = 0.6, after: int = 256, every: int = 4) -> float:
        """Return KL(dense ‖ model) of next tokens on the held-out sequences, averaged.

        As LEMS measures it: temperature 0.6, positions after 256 (of 2,048 there, after half of a sequence here); every
        fourth position, because the head of 262,144 words costs more than the rest of the network.
        """
        total, count = 0.0, 0
        for ids, dense in zip(self.held_out.split(1), self._dense_logits(temperature, after, every), strict=True):
            for own, wanted in zip(self._log_probs(model, ids, temperature, after, every), dense, strict=True):
                total += float(F.kl_div(own, wanted, log_target=True, reduction="sum"))
                count += len(own)
        return total / count if math.isfinite(total) else math.inf

    @cached_property
    def _kept_logits(self) -> dict[tuple[float, int, int], list[list[Tensor]]]:
        return {}

    def _dense_logits(self, *how: Any) -> list[list[Tensor]]:
        if how not in self._kept_logits:
            self._kept_logits[how] = [self._log_probs(self.model, ids, *how) for ids in self.held_out.split(1)]
        return self._kept_logits[how]

    @torch.no_grad()
    def _log_probs(self, model: nn.Module, ids: Tensor, temperature: float, after: int, every: int) -> list[Tensor]:
        head = model.get_output_embeddings()  # type: ignore[operator]
        after = min(after, ids.shape[1] // 2)
        hidden = entering(model, head, ids)[0, after::every]
        return [(head(part).float() / temperature).log_softmax(-1) for part in hidden.split(32)]


def entering(model: nn.Module, head: nn.Module, ids: Tensor) -> Tensor:
    """Return what enters the head (batch, length, width), which does not run."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    with stand_in(head, keep):
        model(input_ids=ids, use_cache=False)
    return seen[0]
