"""What rivals know of the layers: second moments of inputs and of loss gradients, and how much each block changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.language.protocol import Protocol, entering

EDGE = 1 / 8  # of the tokens at both ends of a sequence, whose gradients LEMS leaves out
NORMS = (0.1, 10.0)  # times the mean norm: into this range LEMS scales the gradients of tokens


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration sequences.

    Attributes:
        inputs: Σ x xᵀ (in, in) of what enters a layer, by path.
        gradients: Σ g gᵀ (out, out) of the gradients of the language modelling loss at its output.
        change: 1 − cosine of what enters and what leaves a block, averaged over tokens, by path (MoDeGPT, ShortGPT).
    """

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    change: dict[str, float]

    @classmethod
    def of(cls, protocol: Protocol) -> Statistics:
        """Return those of a protocol, from its folder where they were collected before."""
        config = protocol.config
        file = protocol.runs / f"statistics-{config['calibration']}x{config['sequence']}-{config['seed']}.safetensors"
        if not file.is_file():
            protocol.runs.mkdir(parents=True, exist_ok=True)
            save_file(_collected(protocol), file)
        groups: dict[str, dict[str, Tensor]] = {"inputs": {}, "gradients": {}, "change": {}}
        for name, tensor in load_file(file).items():
            group, _, path = name.partition("/")
            groups[group][path] = tensor
        change = {path: float(value) for path, value in groups["change"].items()}
        return cls(groups["inputs"], groups["gradients"], change)


def _collected(protocol: Protocol) -> dict[str, Tensor]:
    model, sums = protocol.model, _Sums()
    head = model.get_output_embeddings()  # type: ignore[operator]
    with sums.watching(model, protocol):
        for number, batch in enumerate(protocol.calibration):
            ids = batch["input_ids"]
            with torch.enable_grad():
                hidden = entering(model, head, ids)
            hidden.backward(_at_hidden(head, hidden.detach(), ids))
            print(f"statistics: {number + 1} of {len(protocol.calibration)} batches", flush=True)
    return sums.result()


def _at_hidden(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of the summed loss at what enters the head, some tokens at a time."""
    gradient = torch.zeros_like(hidden)
    for row, (states, tokens) in enumerate(zip(hidden, ids, strict=True)):
        for start in range(0, len(tokens) - 1, 128):
            part = states[start : start + 128][: len(tokens) - 1 - start].requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(head(part).float(), tokens[start + 1 : start + 1 + len(part)], reduction="sum")
            gradient[row, start : start + len(part)] = torch.autograd.grad(loss, part)[0]
    return gradient


class _Sums:
    """Hooks that add up, layer by layer."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.change: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def watching(self, model: nn.Module, protocol: Protocol) -> Iterator[None]:
        frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad = False
        with ExitStack() as stack:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
            stack.enter_context(embedding.register_forward_hook(lambda _m, _a, out: out.requires_grad_()))
            for path, layer in protocol.layers.items():
                stack.enter_context(layer.register_forward_hook(self._layer(path)))
            for path in protocol.blocks:
                stack.enter_context(model.get_submodule(path).register_forward_hook(self._block(path)))
            yield
        for parameter in frozen:
            parameter.requires_grad = True

    def _layer(self, path: str) -> Any:
        def leave(_module: nn.Module, args: Any, output: Tensor) -> None:
            self._add(self.inputs, path, args[0].detach().flatten(0, -2))
            output.register_hook(lambda gradient: self._add(self.gradients, path, _even(gradient)))

        return leave

    def _block(self, path: str) -> Any:
        def leave(_module: nn.Module, args: Any, output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            kept = F.cosine_similarity(args[0].detach(), left.detach(), dim=-1).mean()
            self.change[path].append(float(1 - kept))

        return leave

    @staticmethod
    def _add(sums: dict[str, Tensor], path: str, rows: Tensor) -> None:
        own = (rows.mT @ rows).float()
        sums[path] = sums[path].add_(own) if path in sums else own

    def result(self) -> dict[str, Tensor]:
        found = {f"inputs/{path}": own for path, own in self.inputs.items()}
        found |= {f"gradients/{path}": own for path, own in self.gradients.items()}
        return found | {f"change/{p}": torch.tensor(sum(v) / len(v)) for p, v in self.change.items()}


def _even(gradient: Tensor) -> Tensor:
    """Return the gradients of the tokens that count (rows, out), their norms within a range of the mean."""
    edge = int(EDGE * gradient.shape[1])
    rows = gradient[:, edge : gradient.shape[1] - edge].flatten(0, -2)
    norms = rows.norm(dim=1, keepdim=True)
    mean = norms.mean()
    return rows * (norms.clamp(NORMS[0] * mean, NORMS[1] * mean) / norms.clamp_min(1e-30))
