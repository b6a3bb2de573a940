"""What a streamed run takes at most, of memory and of disk, said before it begins.

Memory is that of the part of the network that takes the most, in the step that takes the most: while statistics of its
layers are gathered and judged, while what each layer could become is looked at, while its layers are fitted. None of it
depends on how many parts or how many batches there are. Of the disk, what lies there at once is followed step by step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.calibration.calibrate import judging_draws
from tenfold.calibration.gradients import output_sketch_rows
from tenfold.calibration.moment_sums import moment_bytes, sketch_rows
from tenfold.calibration.needs import statistics_bytes
from tenfold.decompositions.covariance import is_tall
from tenfold.records import LayerSpec
from tenfold.records.sizes import size_in_words
from tenfold.streaming.chain import meta_inputs
from tenfold.streaming.network import Network
from tenfold.streaming.part_tables import LEAD, TAIL
from tenfold.streaming.skeletons import on_meta
from tenfold.tracing.contexts import evaluating, layer_by_layer
from tenfold.tracing.inputs import call_model, tensors_in
from tenfold.tracing.samples import count_samples
from tenfold.tracing.trace import storage_of

# Of the statistics of one layer, while these are decomposed: covariance, eigenvectors, roots, and what LAPACK works in.
_AT_WORK = 9
_LIBRARIES = 128 << 20  # code and buffers of libraries that are loaded once they compute, and holes in the heap
_ROWS = 256 << 10  # bytes of a layer's rows in the option table, as text


@dataclass(frozen=True)
class Needs:
    """What a streamed run takes at most, in bytes; ``Streamed.needs``.

    Use it to choose a machine, or what else to run beside.

    Attributes:
        memory: of the whole process at once.
        disk: of files between blocks and of the new weights, in the folder of the run.
        weights: those of the new weights, which are in ``out`` too where that is another disk.
        start: what the process had taken before.
        widest: the part that takes the most memory.
        terms: what that part takes it for.
        max_cache: bytes of activations that are held while layers are fitted, of the original and of the new block.
        max_width: inputs wider than this are sketched; None for as wide as the recipe says.
    """

    memory: int
    disk: int
    weights: int
    start: int
    widest: str
    terms: Mapping[str, int]
    max_cache: int
    max_width: int | None = None

    def in_words(self) -> str:
        """Return it as one line."""
        shown = ", ".join(f"{name} {size_in_words(size)}" for name, size in self.terms.items())
        return (
            f"streaming takes up to {size_in_words(self.memory)} of memory ({self.widest}: {shown}), and "
            f"{size_in_words(self.disk)} of disk"
        )


def needs_of(network: Network, cache: int, start: int | None = None) -> Needs:
    """Return what a run over a network takes at most.

    Args:
        network: looked at, with its recipe and its data.
        cache: bytes of activations that are held within one block, of the original and of the new one.
        start: bytes that the process takes already; measured if None.
    """
    return Estimate.of(network).needs(cache, network.recipe.calibration.max_width, start)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of a network and its data before a run: of each part what it holds, of each depth what passes it.

    Attributes:
        network: that is to be compressed.
        specs: layers by part that may be factorized.
        weights: bytes of the weights of each part.
        passing: what a forward of the largest batch makes.
    """

    network: Network
    specs: Mapping[str, Mapping[str, LayerSpec]]
    weights: Mapping[str, int]
    passing: Passing = field(repr=False)

    @classmethod
    def of(cls, network: Network) -> Estimate:
        """Look at a network; nothing is computed."""
        spec_of = {layer.path: layer.spec for layer in network.profile.layers if layer.spec is not None}
        specs = {
            part: {path: spec_of[path] for path in paths if path in spec_of and path not in network.kept}
            for part, paths in network.parts.items()
        }
        sizes = dict.fromkeys(network.parts, 0)
        for name, tensor in network.skeleton.state_dict().items():
            path = next((path for path in network.chain.blocks if name.startswith(f"{path}.")), TAIL)
            sizes[path] += tensor.nbytes
        sizes[LEAD] = sizes[TAIL]  # both are the network without its blocks
        return cls(network, specs, sizes, Passing.of(network))

    def needs(self, cache: int, widest: int | None, start: int | None = None) -> Needs:
        """Return what a run takes with so large a cache, inputs wider than ``widest`` being sketched."""
        start = resident() if start is None else start
        masks = self.passing.masks
        parts = {part: self._most(part, cache, widest) for part in self.specs}
        part = max(parts, key=lambda part: sum(parts[part].values()))
        terms = parts[part] | ({"masks": masks} if masks else {}) | {"the process": start + _LIBRARIES}
        stored = self._stored(widest)
        weights = int(self._share() * (sum(self.weights.values()) - self.weights[LEAD]))
        disk = self._disk(stored, weights)
        return Needs(sum(terms.values()), disk, weights, start, part, terms, cache, widest)

    def _most(self, part: str, cache: int, widest: int | None) -> dict[str, int]:
        """Return what a part takes in the step in which it takes the most."""
        weights, made = self.weights[part], self.passing.made[part]
        read = {"weights": 2 * weights}  # and what is read, or written
        if not self.network.batches:
            return read | {"one layer": max((own.alone for own in self._layers(part, widest)), default=0)}
        layers = self._layers(part, widest)
        if not layers:
            return read | {"activations": made}
        summed, fits = sum(own.summed for own in layers), sum(own.fits for own in layers)
        kept, grams = sum(own.moments + own.gram for own in layers), sum(own.gram for own in layers)
        work, targets = max(own.work for own in layers), max(own.targets for own in layers)
        one = {"weights": weights}
        steps: list[dict[str, int]] = [
            one | {"statistics": 2 * summed, "judged fits": fits, "activations": made},
            one | {"statistics": summed, "judged fits": fits, "one layer": work},
            one | {"statistics": kept, "one layer": work},
            read | {"statistics": grams + targets, "one layer": work, "activations": made // 2, "cache": 2 * cache},
            {"weights": 3 * weights},
        ]
        return max(steps, key=lambda step: sum(step.values()))

    def _layers(self, part: str, widest: int | None) -> list[_Layer]:
        """Return what each layer of a part takes; of a head whose inputs alone are looked at hardly anything."""
        plain = self.passing.last if self.network.recipe.calibration.loss == "outputs" else ""
        linear = {
            path for path, spec in self.specs[part].items() if spec.kind == "linear"
        }  # convolutions share nothing
        shared = {path for path in linear if self.passing.shared.get(path) in linear}
        return [
            _Layer(spec, widest, even=path == plain, shared=path in shared) for path, spec in self.specs[part].items()
        ]

    def _stored(self, widest: int | None) -> dict[str, int]:
        """Return what the first pass leaves of each part for the second, in bytes."""
        data = bool(self.network.batches)
        return {part: sum(_ROWS + data * own.gram for own in self._layers(part, widest)) for part in self.specs}

    def _share(self) -> float:
        """Return what share of the weights a budget leaves at most, where that is known."""
        budget = self.network.recipe.budget
        one_type = len({tensor.dtype for tensor in self.network.skeleton.parameters()}) == 1
        return min(budget.bytes or 1.0, (budget.params or 1.0) if one_type else 1.0)

    @property
    def _lead(self) -> int:
        """Bytes of the layers before the blocks that may change, of which there is a file of their own."""
        layers = (self.network.skeleton.get_submodule(path) for path in self.specs[LEAD])
        return sum(tensor.nbytes for layer in layers for tensor in layer.parameters())

    def _disk(self, stored: Mapping[str, int], weights: int) -> int:
        """Return what lies on the disk at most, step by step."""
        net = self.network
        blocks, depth, changed = net.chain.blocks, len(net.chain.blocks), bool(self.specs[LEAD])
        if not net.batches:
            return sum(stored.values()) + weights + self._lead
        every, deciding, sent = self.passing.shares(net)
        x, calibration = self.passing.hidden, [size * deciding for size in self.passing.hidden]
        first = x[0] * every
        most = first + sum(calibration[1:]) + x[depth] * sent
        left = stored[TAIL]
        for number in reversed(range(depth)):
            left += stored[blocks[number]]
            most = max(most, first + sum(calibration[1 : number + 1]) + (x[number] + x[number + 1]) * sent + left)
        left = sum(stored.values())
        lead = new = self._lead
        for number, path in enumerate(blocks):
            new += self.weights[path]
            entered = (2 if number else int(changed)) * x[number] * every  # at first it is what entered already
            most = max(most, first + entered + 2 * x[number + 1] * every + left + min(new, lead + weights))
            left -= stored[path]
        return int(max(most, first + 2 * x[depth] * every + left + lead + weights)) + 1


@dataclass(frozen=True, eq=False)
class Passing:
    """What a forward of the largest batch makes, as one on the meta device shows.

    Attributes:
        made: by part the bytes that a forward and a backward pass hold.
        hidden: bytes of what enters each block, and of what the last one puts out.
        numbers: entries of the inputs of that batch.
        masks: bytes of the masks of all batches, which are held.
        last: path of the layer that puts out what the network does; empty if there is none.
        shared: by path of a layer, the first of those before it that take the very same tensor.
    """

    made: Mapping[str, int]
    hidden: tuple[int, ...]
    numbers: int
    masks: int
    last: str
    shared: Mapping[str, str]

    @classmethod
    def of(cls, network: Network) -> Passing:
        """Run the model on the meta device."""
        batch = max(network.batches, key=_numbers, default=network.example)
        seen, model = _Seen(network), on_meta(network.skeleton)
        with ExitStack() as stack:
            for context in (evaluating(model), layer_by_layer(), _watching(model, seen)):
                stack.enter_context(context)
            call_model(model, meta_inputs(batch))
        whole = dict(seen.held)
        whole[TAIL] += 2 * seen.returned  # of the original and of the new network, when these are compared
        masks = sum(_mask_bytes(own) for own in network.batches)
        return cls(whole, tuple(seen.hidden), max(1, _numbers(batch)), masks, seen.last, seen.shared)

    def shares(self, network: Network) -> tuple[float, float, float]:
        """Return how much larger than that batch are: all of them, those that decide, those that gradients are of."""
        sizes, settings = [_numbers(batch) / self.numbers for batch in network.batches], network.recipe.calibration
        judges = [network.batches[i] for i in network.judging]
        draws = judging_draws(settings, count_samples(judges) if judges else 0)
        sent = settings.draws * sum(sizes[i] for i in network.fitting) + draws * sum(sizes[i] for i in network.judging)
        return sum(sizes), sum(sizes[i] for i in network.measured), sent


class _Seen:
    """What a forward makes, by the part of the network that it is in."""

    def __init__(self, network: Network) -> None:
        self.part, self.blocks, self.places = LEAD, network.chain.blocks, network.chain.places
        self.held = dict.fromkeys((LEAD, *self.blocks, TAIL), 0)
        self.hidden: list[int] = []
        self.returned, self.last = 0, ""
        self.outputs: dict[str, Tensor] = {}
        self.layers = {layer.path for layer in network.profile.layers if layer.spec is not None}
        self.shared: dict[str, str] = {}
        self._taken: tuple[Any, str] = (None, "")  # by the layer before, and the first that took it
        self._known: dict[tuple[str, int | None], Tensor] = {}  # held, or another could get the same memory

    def save(self, tensor: Tensor) -> Tensor:
        """Take note of a tensor that the backward pass needs."""
        key = self.part, storage_of(tensor)
        if key not in self._known and not isinstance(tensor, nn.Parameter):
            self._known[key] = tensor
            self.held[self.part] += tensor.untyped_storage().nbytes()
        return tensor

    def take(self, path: str, given: Any) -> None:
        """Take note of what enters a layer: those with one input have one second moment of it."""
        if path not in self.layers:
            return
        tensor = next(tensors_in(given), None)
        before, first = self._taken
        if tensor is not None and tensor is before:
            self.shared[path] = first
        else:
            self._taken = tensor, path

    def enter(self, number: int, args: Any, kwargs: Any) -> None:
        """Take note that a block begins."""
        self.part = self.blocks[number]
        self.hidden.append(list(tensors_in((args, kwargs)))[self.places[number]].nbytes)

    def made(self, path: str, output: Any) -> None:
        """Take note of what a module without children puts out: judging holds a copy, and there are gradients."""
        tensors = list(tensors_in(output))
        self.held[self.part] += sum(2 * max(tensor.nbytes, 4 * tensor.numel()) for tensor in tensors)
        if len(tensors) == 1:
            self.outputs[path] = tensors[0]

    def end(self, output: Any) -> None:
        """Take note of what the network puts out."""
        tensors = list(tensors_in(output))
        self.returned = sum(tensor.nbytes for tensor in tensors)
        self.last = next((path for path, own in self.outputs.items() if any(own is t for t in tensors)), "")

    def leave(self, number: int, output: Any) -> None:
        """Take note that a block ends."""
        self.part = TAIL
        if number + 1 == len(self.blocks):
            self.hidden.append(next(tensors_in(output)).nbytes)


@contextmanager
def _watching(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """Let a model on the meta device say what its forward makes."""
    with ExitStack() as stack:
        for number, path in enumerate(seen.blocks):
            block = model.get_submodule(path)
            stack.enter_context(
                block.register_forward_pre_hook(
                    lambda _module, args, kwargs, number=number: seen.enter(number, args, kwargs), with_kwargs=True
                )
            )
            stack.enter_context(block.register_forward_hook(lambda _m, _a, out, number=number: seen.leave(number, out)))
        for path, module in model.named_modules():
            if not any(True for _ in module.children()):
                stack.enter_context(
                    module.register_forward_pre_hook(
                        lambda _module, args, kwargs, path=path: seen.take(path, (args, kwargs)), with_kwargs=True
                    )
                )
                stack.enter_context(module.register_forward_hook(lambda _m, _a, out, path=path: seen.made(path, out)))
        stack.enter_context(model.register_forward_hook(lambda _m, _a, out: seen.end(out)))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(seen.save, lambda tensor: tensor))
        yield


class _Layer:
    """What a layer takes, in bytes.

    Args:
        spec: of the layer.
        widest: inputs and outputs wider than this are sketched.
        even: whether all its outputs matter alike, as those of a head that nothing follows.
        shared: whether the second moment of its inputs is that of another layer.
    """

    def __init__(self, spec: LayerSpec, widest: int | None, *, even: bool = False, shared: bool = False) -> None:
        groups, outputs, *rest = spec.group_shape
        inputs, rows, sketched = prod(rest), output_sketch_rows(spec, widest), sketch_rows(spec, widest) is not None
        own = moment_bytes({"": spec}, widest=widest)
        gram = 8 * groups * outputs if even else statistics_bytes(spec, widest) - own
        held = 0 if shared else own
        self.summed = held + gram  # of the samples that are fitted to, or of those that judge
        self.moments = (1 + sketched) * held  # of both: rows of sketches are one beside the other
        self.gram = gram if even or rows is None else 16 * groups * (rows + 2) * outputs
        self.targets = moment_bytes({"": spec}, targets=True, widest=widest)
        decomposed = own + (gram if rows is None else 0)
        self.work = _AT_WORK * decomposed + 2 * (gram if rows is not None else 0) + 24 * groups * outputs * inputs
        self.alone = 24 * groups * outputs * inputs + _AT_WORK * 8 * groups * min(outputs, inputs) ** 2  # no statistics
        tall = spec.kind == "linear" and is_tall(torch.empty(groups, outputs, inputs, device="meta"))
        self.fits = 8 * groups * (inputs * inputs if tall else 2 * outputs * min(outputs, inputs))


def _numbers(batch: Any) -> int:
    """Return how many numbers the largest tensor of a batch has."""
    return max((tensor.numel() for tensor in tensors_in(batch)), default=0)


def _mask_bytes(batch: Any) -> int:
    """Return what blocks may be given for the mask of a batch, a number for each pair of tokens."""
    named = batch.items() if isinstance(batch, Mapping) else ()
    padded = (t for name, t in named if str(name).endswith("mask") and isinstance(t, Tensor) and not bool(t.all()))
    return sum(4 * t.numel() * t.shape[-1] for t in padded)


def resident() -> int:
    """Return the bytes of memory that this process takes now; where the system does not say, those it ever took."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no file
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
