"""The second pass over a network: the plan carried out front to back, block by block, from disk to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tenfold.calibration.shares import Share
from tenfold.decompositions.covariance import Covariance
from tenfold.files import atomic_write, link, write_text
from tenfold.parallel import Workers
from tenfold.profiling import agreement
from tenfold.records import Agreement, Plan
from tenfold.runtime import Runtime
from tenfold.streaming.activations import Activations, ByBatch
from tenfold.streaming.network import Network
from tenfold.streaming.network_parts import (
    OUTER,
    BlockInputs,
    Lead,
    StoredCalls,
    Tail,
    block_calls,
    run_block,
    tail_calls,
)
from tenfold.streaming.part_tables import LEAD, TAIL, into, moved, out_of
from tenfold.streaming.ranks import Ranks
from tenfold.streaming.statistics import Statistics
from tenfold.surgery import SequentialFit, apply_, apply_sequentially, restructure_, with_errors
from tenfold.tensors.free_memory import give_back
from tenfold.tensors.tensor_file import read_tensors, write_tensors
from tenfold.tracing import copied
from tenfold.tracing.inputs import arguments

FIT = "fit blocks"


@dataclass(eq=False)
class Fitting:
    """The second pass, in a folder: parts that are there are not fitted again.

    Args:
        network: whose layers are replaced.
        plan: for the whole.
        statistics: of the first pass; None where weights alone decide.
        folder: for files of the run, which all processes see.
        runtime: workers and progress.
        ranks: the processes of the run.
    """

    network: Network
    plan: Plan
    statistics: Statistics | None
    folder: Path
    runtime: Runtime = field(default_factory=Runtime)
    ranks: Ranks = field(default_factory=Ranks)

    def run(self) -> tuple[Plan, Agreement | None]:
        """Fit all parts; return the plan with the errors of its layers, and how far the outcome agrees."""
        parts, count = (LEAD, *self.network.chain.blocks, TAIL), self.runtime.counter(FIT)
        missing = self.ranks.from_main([part for part in parts if not self._told(part).is_file()])
        for done, part in enumerate(parts):
            if part in missing:
                self._fit(part)
            count(done + 1, len(parts))
        told = {part: Plan.from_json_file(self._told(part), "a plan") for part in parts}
        fitted = {out_of(part, layer.path): layer for part, own in told.items() for layer in own.layers}
        layers = tuple(
            layer if layer.path not in fitted else fitted[layer.path].replace(path=layer.path, aliases=layer.aliases)
            for layer in self.plan.layers
        )
        return self.plan.replace(layers=layers), self.ranks.from_main(self._agreement() if self.ranks.main else None)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files of the new weights: those outside of the blocks, and those of each block."""
        return tuple(self._weights(part) for part in (TAIL, *self.network.chain.blocks))

    def _fit(self, part: str) -> None:
        """Fit a part: the files behind it first, then its weights, then what was done."""
        ranks, number = self.ranks, self._number(part)
        inside = part not in (LEAD, TAIL)
        if inside:
            told = self._fit_block(part, number)
        else:
            told = ranks.from_main(self._fit_outside(part, number) if ranks.main else self.plan)
        if part == LEAD:
            self._enter(told)
        ranks.wait()
        if ranks.main:
            write_text(self._told(part), told.to_json())
        ranks.wait()
        if self.statistics is not None and ranks.main:
            self.statistics.forget(part)
        if inside:
            for kind in ("d", "c"):
                ranks.file(self._states(kind, number)).unlink(missing_ok=True)
        give_back()

    def _fit_block(self, part: str, number: int) -> Plan:
        """Fit a block, in all processes alike, and write what the next one takes."""
        net = self.network
        with net.block(number) as block:
            dense, small = self._at(number)
            new, told = self._applied(part, block, small, dense)
            self._advance(number, block, new, dense, small)
            if self.ranks.main:
                self._write(part, {f"{part}.{name}": t for name, t in new.state_dict().items()})
        return told

    def _fit_outside(self, part: str, number: int) -> Plan:
        """Fit what lies before or after the blocks."""
        net = self.network
        with net.outer() as outer:
            if part == LEAD:
                new, told = self._applied(part, Lead(outer, net.chain), net.batches, net.batches)
                if told.factorized:  # what comes after the blocks has all else that lies outside of them
                    own = tuple(f"{out_of(part, layer.path)}." for layer in told.factorized)
                    self._write(part, {name: t for name, t in _outer_state(new).items() if name.startswith(own)})
            else:
                dense, small = self._at(number)
                filled = self._with_lead(outer, Plan.from_json_file(self._told(LEAD), "a plan"))
                new, told = self._applied(part, Tail(filled, net.chain), small, dense, Tail(outer, net.chain))
                self._write(part, _outer_state(new))
        return told

    def _applied(
        self,
        part: str,
        module: nn.Module,
        batches: Sequence[Any],
        entered: Sequence[Any],
        target: nn.Module | None = None,
    ) -> tuple[nn.Module, Plan]:
        """Return the part with its layers replaced, and its plan with their errors."""
        net, own = self.network, plan_of_part(self.plan, part, self.network.parts[part])
        if not own.factorized and not own.narrowed:
            return module, own
        if self.statistics is None:
            new = apply_(module, own, workers=self._workers(part))
            return new, with_errors(own, new)
        calibration = net.recipe.calibration
        config = SequentialFit(
            positions=calibration.positions,
            seed=net.recipe.seed,
            max_width=calibration.max_width,
            max_cache=self.runtime.cache_bytes(),
            before=self._before(part),
        )
        new = apply_sequentially(
            module,
            own,
            self._measured(part, batches),
            target=target,
            entered=self._measured(part, entered),
            output_grams=self._grams(part),
            config=config,
            progress=lambda _done, _all: None,
        )
        return new, with_errors(own, new)

    def _measured(self, part: str, batches: Sequence[Any]) -> Sequence[Any]:
        """Return the batches that a part is fitted to: all, or of a block those of this process."""
        every = self.network.measured
        if part in (LEAD, TAIL) or self.ranks.count == 1:
            return StoredCalls(every, batches.__getitem__)
        own = self.ranks.own(every)
        return Share(StoredCalls(own, batches.__getitem__), own, self.ranks)

    def _workers(self, part: str) -> Workers:
        return self.runtime.workers if part in (LEAD, TAIL) else self.ranks.workers(self.runtime.workers)

    def _grams(self, part: str) -> Mapping[str, Covariance]:
        return {} if self.statistics is None else self.statistics.output_grams(part)

    def _before(self, part: str) -> int:
        """Return how many layers are fitted in order before those of a part."""
        count = 0
        for other in (LEAD, *self.network.chain.blocks, TAIL):
            if other == part:
                break
            own = plan_of_part(self.plan, other, self.network.parts[other])
            count += sum(not layer.kind.startswith("embedding") for layer in own.factorized)
        return count

    def _enter(self, told: Plan) -> None:
        """Write what enters the first block, in the original and now."""
        net, ranks = self.network, self.ranks
        if self.statistics is None:
            return
        dense, small = (ranks.file(self._states(kind, 0)) for kind in ("d", "c"))
        for path in (dense, small):
            with atomic_write(path) as partial:
                link(self.statistics.entering(0), partial)
        if told.factorized:
            batches = {number: net.batches[number] for number in ranks.own(range(len(net.batches)))}
            with net.outer() as outer, Activations.writing(small) as write:
                BlockInputs.of(self._with_lead(outer, told), net.chain, batches, write)

    def _at(self, number: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the batches of a block, or of what comes after the last: in the original, and now."""
        net = self.network
        if self.statistics is None:
            return [], []
        every = range(len(net.batches))
        found = []
        for kind in ("d", "c"):
            stored = ByBatch(self.ranks.files(self._states(kind, number)), self.ranks.spots)
            if number == len(net.chain.blocks):
                found.append(tail_calls(net.batches, stored, every))
            else:
                found.append(block_calls(self.statistics.calls, number, stored, every))
        return found[0], found[1]

    def _advance(
        self, number: int, dense: nn.Module, new: nn.Module, entered: Sequence[Any], batches: Sequence[Any]
    ) -> None:
        """Write what the next block takes, in the original and now."""
        if self.statistics is None:
            return
        for kind, module, calls in (("d", dense, entered), ("c", new, batches)):
            with Activations.writing(self.ranks.file(self._states(kind, number + 1))) as write:
                for batch in self.ranks.own(range(len(calls))):
                    write(run_block(module, calls[batch]))

    def _with_lead(self, outer: nn.Module, told: Plan) -> nn.Module:
        """Return what lies outside of the blocks with the layers before them as they were fitted."""
        if not told.factorized:
            return outer
        lead = restructure_(Lead(copied(outer), self.network.chain), told)
        tensors, _ = read_tensors(self._weights(LEAD))
        lead.outer.load_state_dict(tensors, strict=False)  # type: ignore[union-attr]
        return lead.outer  # type: ignore[return-value]

    def _agreement(self) -> Agreement | None:
        """Return how near the outputs are to those of the original, on batches that decided nothing."""
        net = self.network
        if self.statistics is None:
            return None
        held = [i for i in range(len(net.batches)) if i not in net.measured] or list(net.measured)
        dense, small = self._at(len(net.chain.blocks))

        def both(number: int) -> Any:
            args, kwargs = arguments(dense[number])
            return (args[0], arguments(small[number])[0][0], *args[1:]), kwargs

        with net.outer() as outer:
            twin = copied(net.skeleton)
            twin.load_state_dict(outer.state_dict(), strict=False, assign=True)  # no second copy of what is large
            new = restructure_(
                Tail(twin, net.chain), plan_of_part(self.plan, TAIL, [*net.parts[LEAD], *net.parts[TAIL]])
            )
            tensors, _ = read_tensors(self._weights(TAIL))
            new.outer.load_state_dict(tensors, strict=False, assign=True)  # type: ignore[union-attr]
            calls = StoredCalls(held, both)
            first, second = _Either(Tail(outer, net.chain), 0), _Either(new, 1)
            return agreement(first, second, calls, held_out=len(held) < len(net.batches))

    def _write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        real = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        with atomic_write(self._weights(part)) as partial:
            write_tensors(partial, _apart(real), {"format": "pt"}, ())

    def _number(self, part: str) -> int:
        blocks = self.network.chain.blocks
        return 0 if part == LEAD else len(blocks) if part == TAIL else blocks.index(part)

    def _name(self, part: str) -> str:
        return part if part in (LEAD, TAIL) else f"{self._number(part):04d}"

    def _states(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:04d}"

    def _weights(self, part: str) -> Path:
        return self.folder / f"new-{self._name(part)}.safetensors"

    def _told(self, part: str) -> Path:
        return self.folder / f"done-{self._name(part)}.json"


class _Either(nn.Module):
    """What comes after the blocks, on one of two hidden states."""

    def __init__(self, tail: nn.Module, which: int) -> None:
        super().__init__()
        self.tail, self.which = tail, which

    def forward(self, dense: Tensor, small: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the network."""
        return self.tail((dense, small)[self.which], *args, **kwargs)


def plan_of_part(plan: Plan, part: str, paths: Sequence[str]) -> Plan:
    """Return what a plan says of a part of the network, with the paths that layers have in its module."""
    wanted = set(paths)
    layers = tuple(
        layer.replace(path=into(part, layer.path), aliases=()) for layer in plan.layers if layer.path in wanted
    )
    units = tuple(moved(unit, lambda path: into(part, path)) for unit in plan.units if unit.pivot in wanted)
    return plan.replace(layers=layers, units=units, fused={}, unrolled={})


def _outer_state(part: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the network in ``Lead`` or ``Tail``, by their names in the network."""
    return {name.removeprefix(f"{OUTER}."): tensor for name, tensor in part.state_dict().items()}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those that share memory with one before; a reader ties them again."""
    first: set[tuple[int, ...]] = set()
    found = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), *tensor.shape)
        if tensor.numel() and key in first:
            continue
        first.add(key)
        found[name] = tensor
    return found
