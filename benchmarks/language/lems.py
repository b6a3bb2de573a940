"""LEMS (ICML 2026, https://lems-svd.github.io): ranks by the divergence that each layer causes alone, KFAC-SVD fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.language.pairs import Spectrum, rank_of, spectra, with_ranks
from benchmarks.language.protocol import Protocol
from tenfold.allocation.knapsack import solve
from tenfold.records import write_text
from tenfold.tracing.replay import stand_in

REMOVED = 0.1  # at which a layer's divergence is measured
KEPT = (0.3, 0.95)  # shares of a layer that its ranks may have, unless it stays dense
STEP = 8
ALPHAS, GAMMAS = (0.0, 1.0, 2.0), (2.0, 5.0)  # of the depth factor; gamma 0 is tried once (the paper: 10 random trials)


def lems(protocol: Protocol) -> Callable[[float], nn.Module]:
    """Return what makes a model of a share."""
    found = spectra(protocol, "kfac")
    harms = _harms(protocol, found)

    def at(share: float) -> nn.Module:
        best, least = None, np.inf
        for alpha, gamma in [(0.0, 0.0), *product(ALPHAS, GAMMAS)]:
            model = with_ranks(protocol, found, _ranks(protocol, found, harms, share, _depth(protocol, alpha, gamma)))
            divergence = protocol.divergence(model)
            print(f"LEMS at {share}: alpha {alpha}, gamma {gamma}: KL {divergence:.4f}", flush=True)
            if best is None or divergence < least:
                best, least = model, divergence
        assert best is not None
        return best

    return at


def _harms(protocol: Protocol, found: dict[str, Spectrum]) -> dict[str, float]:
    """Return the KL of the network with one layer at a time truncated, kept in a file as it grows."""
    config = protocol.config
    name = f"lems-{config['calibration']}x{config['sequence']}-{config['kl']}-{config['seed']}.json"
    file = protocol.runs / name
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    model, before = protocol.copied(), _Before(protocol)
    for path, layer in protocol.layers.items():
        if path in known:
            continue
        parent, _, name = path.rpartition(".")
        own = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, found[path].pair(rank_of(layer, 1 - REMOVED), layer.bias))
        with before.settled(model, path):
            known[path] = protocol.divergence(model)
        setattr(model.get_submodule(parent), name, own)
        write_text(file, json.dumps(known, indent=1) + "\n")
        print(f"LEMS: {path} alone: KL {known[path]:.5f}", flush=True)
    return known


class _Before:
    """What the blocks of the dense model put out on the held-out sequences, so that a prefix need not run again."""

    def __init__(self, protocol: Protocol) -> None:
        self._blocks = protocol.blocks
        self._outputs: dict[str, list[Tensor]] = {path: [] for path in protocol.blocks}
        with torch.no_grad(), ExitStack() as stack:
            for path in protocol.blocks:
                stack.enter_context(protocol.model.get_submodule(path).register_forward_hook(self._keep(path)))
            for ids in protocol.held_out.split(1):
                protocol.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]

    def _keep(self, path: str) -> Callable[..., None]:
        return lambda _module, _args, output: self._outputs[path].append(output)

    @contextmanager
    def settled(self, model: nn.Module, path: str) -> Iterator[None]:
        """Let the blocks before that of a layer return what they did, sequence after sequence."""
        with ExitStack() as stack:
            for block in self._blocks:
                if path.startswith(f"{block}."):
                    break
                kept = iter(self._outputs[block])
                stack.enter_context(stand_in(model.get_submodule(block), lambda *_, kept=kept, **__: next(kept)))
            yield


def _depth(protocol: Protocol, alpha: float, gamma: float) -> dict[str, float]:
    """Return 1 + γ · Σ_{k ≥ block} (k+1)^−α, the sum by its largest value, for each layer."""
    terms = np.arange(1, len(protocol.blocks) + 1, dtype=float) ** -alpha
    after = terms[::-1].cumsum()[::-1] / terms.sum()
    number = {block: i for i, block in enumerate(protocol.blocks)}
    return {
        path: 1 + gamma * after[next(number[b] for b in number if path.startswith(f"{b}."))] for path in protocol.layers
    }


def _ranks(
    protocol: Protocol, found: dict[str, Spectrum], harms: dict[str, float], share: float, depth: dict[str, float]
) -> dict[str, int | None]:
    """Return the ranks, in steps of 8, with the least modelled harm within the share; None for dense."""
    choices: dict[str, list[int | None]] = {}
    harm, cost = [], []
    for path, layer in protocol.layers.items():
        low, high = (rank_of(layer, kept) for kept in KEPT)
        ranks = list(range(-(-low // STEP) * STEP, high + 1, STEP))
        tail = found[path].energies.flip(0).cumsum(0).flip(0).numpy()  # what is lost from each rank on
        at_one = tail[rank_of(layer, 1 - REMOVED)]
        choices[path] = [*ranks, None]
        harm.append([*(harms[path] * depth[path] * tail[r] / at_one for r in ranks), 0.0])
        cost.append([*(r * sum(layer.weight.shape) for r in ranks), layer.weight.numel()])
    chosen = solve(harm, cost, [share * protocol.linear_params]).choice
    return {path: choices[path][i] for path, i in zip(choices, chosen, strict=True)}
