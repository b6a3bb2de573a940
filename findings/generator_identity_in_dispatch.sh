#!/usr/bin/env bash
# A torch.Generator that is handed to an operation reaches a TorchDispatchMode as another Python object: "is" and a
# dictionary by the object never find it, and only the address of the C++ object tells that it is the same one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__)
mine, seen = torch.Generator().manual_seed(0), []


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append((kwargs or {}).get("generator"))
        return func(*args, **(kwargs or {}))


with Watch():
    torch.randn(2, generator=mine)
(theirs,) = [generator for generator in seen if generator is not None]
print("the same object:", theirs is mine, "| equal:", theirs == mine, "| the same generator:", theirs._cdata == mine._cdata)
assert theirs is not mine
assert theirs != mine
assert theirs._cdata == mine._cdata
PY
