#!/usr/bin/env bash
# copy.deepcopy of a model with one scripted submodule copies the parameters of that part with a graph: they are no leaves,
# no optimizer takes them, and backward fills the gradients of the original instead. Under no_grad they are leaves, but
# no longer require gradients. Parameters outside of the scripted part are copied as usual.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from torch import nn

print("torch", torch.__version__)
model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 1))
twin = copy.deepcopy(model)
with torch.no_grad():
    quiet = copy.deepcopy(model)
for name, made in (("deepcopy", twin), ("deepcopy under no_grad", quiet)):
    print(name, {key: (p.is_leaf, p.requires_grad) for key, p in made.named_parameters()})
assert [p.is_leaf for p in twin.parameters()] == [False, False, True, True]
assert [p.requires_grad for p in quiet.parameters()] == [False, False, True, True]
twin(torch.ones(1, 3)).sum().backward()
print("gradients in the original after the copy's backward:", [p.grad is not None for p in model.parameters()])
assert [p.grad is not None for p in model.parameters()] == [True, True, False, False]
try:
    torch.optim.SGD(twin.parameters(), lr=0.1)
    raise SystemExit("changed: an optimizer takes the copy")
except ValueError as error:
    print("an optimizer:", error)
PY
