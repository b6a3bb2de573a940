"""Law 13 as users meet it: one model for each format, with a layer of every kind, run in every way it can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.checkpoint import load, save
from tenfold.exporting import EXPORTERS
from tenfold.exporting.parity import check_parity
from tenfold.formats import Factorization
from tenfold.planning import plan
from tenfold.profiling import profile
from tenfold.runtimes.program import program_of
from tenfold.surgery import apply
from tenfold.testing.format_laws import dense_layer
from tenfold.testing.geometries import Geometry, served
from tenfold.testing.laws import expect, expect_close, law
from tenfold.testing.weights import random_bias, random_weight, some_ranks

Format = type[Factorization]

_TOLERANCE = 1e-5


class Exhibition(nn.Module):
    """Layers side by side, each with an input of its own: one export tells about all of them."""

    def __init__(self, layers: list[Geometry]) -> None:
        super().__init__()
        specs = [at.spec for at in layers]
        self.layers = nn.ModuleList(
            dense_layer(s, random_weight(s, torch.float32), random_bias(s, torch.float32)) for s in specs
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs of the layers."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def kinds_of(format: Format) -> list[Geometry]:
    """Return one geometry of each kind that a format serves and whose first axis is a batch.

    Kinds differ in the type of layer and the number of axes; where there are none or two, also in whether there are
    groups, strides, a padding row, another padding mode, or a sequence.
    """
    kinds: dict[tuple[Any, ...], Geometry] = {}
    for at in served(format):
        s = at.spec
        if len(at.in_shape) == (1 if s.kind == "linear" else 1 + s.axes if s.axes else 0):
            continue  # a single sample: no batch
        key: tuple[Any, ...] = (s.kind, s.axes)
        if s.axes == 2:
            key += (s.groups > 1, max(s.stride) > 1, s.padding_mode != "zeros")
        elif s.axes == 0:
            key += (s.padding_idx is None, len(at.in_shape))
        kinds.setdefault(key, at)
    return list(kinds.values())


def check_everywhere(format: Format, folder: Path) -> None:
    """Raise LawBroken unless a model gives the same outputs eagerly, loaded, exported, in ONNX Runtime and compiled.

    torch.compile takes the model as one graph; batches of three sizes go through each file. Files are written to
    ``folder``.
    """
    layers = kinds_of(format)
    dense = Exhibition(layers).eval()
    inputs = tuple(_batch(at, 3) for at in layers)
    with law(13, format.name(), ", ".join(at.name for at in layers)), torch.no_grad():
        cost = profile(dense, inputs)
        made = plan(dense, cost, {"rule": "fixed", "formats": format.name()})
        wanted = {f"layers.{i}": some_ranks(format, at.spec, 3)[0] for i, at in enumerate(layers)}
        made = made.replace(
            layers=tuple(
                old.replace(action="factorize", format=format.name(), rank=wanted[old.path], reason="under test")
                for old in made.layers
            )
        )
        small = apply(dense, made)
        save(small, made, folder / "saved")
        loaded, _ = load(Exhibition(layers).eval(), folder / "saved")
        others: dict[str, Any] = {"loaded": loaded}
        program = program_of(small, inputs, dynamic_batch=True)
        for target in ("torch-export", "onnx"):
            exporter, file = EXPORTERS.get(target)(), folder / target
            exporter.write(program, file, opset=None)
            others[target] = exporter.open(file)
            check_parity(small, others[target], inputs, dynamic_batch=True, tolerance=_TOLERANCE)
        torch.compiler.reset()  # what earlier formats compiled counts against a limit
        others["torch.compile"] = torch.compile(small, backend="eager", fullgraph=True)
        outputs = small(*inputs)
        for name, other in others.items():
            found = other(*inputs)
            found = (found,) if isinstance(found, Tensor) else found  # files of one output have no tuple
            expect(len(found) == len(outputs), f"{name} gives {len(found)} outputs, not {len(outputs)}")
            for at, a, b in zip(layers, found, outputs, strict=True):
                expect_close(f"{name}: the output of {at.name}", a, b, _TOLERANCE)


def _batch(at: Geometry, size: int) -> Tensor:
    """Return inputs for a layer, with another number of samples than the table of geometries has."""
    return Geometry(at.name, at.spec, (size, *at.in_shape[1:])).inputs(torch.float32)
