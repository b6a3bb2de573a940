#!/usr/bin/env bash
# A forward that takes gradients itself, such as a force field, runs under no_grad (it enables gradients where it needs
# them), and not inside torch.utils.flop_counter.FlopCounterMode: hooks of the counter's module tracker put a node into
# the graph that the inner autograd.grad may not pass. A module without children of its own does not show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(3, 1)

    def forward(self, places):
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            return torch.autograd.grad(self.energy(places).sum(), places)[0]


model, places = Forces(), torch.ones(2, 3)
with torch.no_grad():
    print("alone:", tuple(model(places).shape))
try:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(places)
    raise SystemExit(f"changed: it runs, and counts {counter.get_total_flops()}")
except RuntimeError as error:
    print("inside the counter:", type(error).__name__, str(error)[:110])
    assert "_will_engine_execute_node" in str(error), error
PY
