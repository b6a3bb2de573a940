#!/usr/bin/env bash
# torch: counting the multiplications of one linear layer with FlopCounterMode imports the compiler.
#
# The dispatch function of every TorchDispatchMode is wrapped so that the compiler leaves it alone, and the first call of
# that wrapper imports torch._dynamo: about 800 modules, 70 MiB and a second of processor time, for a count that needs
# none of them. In a short-lived process that is more than the forward itself. Seen with torch 2.13.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6

"$folder/venv/bin/python" - <<'PY'
import resource
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
layer(x)
before = "torch._dynamo" in sys.modules
modules, mib, seconds = len(sys.modules), peak_mib(), time.process_time()
with FlopCounterMode(display=False) as counter:
    layer(x)
after = "torch._dynamo" in sys.modules
print(f"torch {torch.__version__}: {counter.get_total_flops()} FLOPs counted")
print(f"torch._dynamo imported before: {before}, after: {after}")
print(f"{len(sys.modules) - modules} modules, {peak_mib() - mib} MiB, {time.process_time() - seconds:.2f} s of processor time")
sys.exit(not (not before and after and len(sys.modules) - modules > 400))
PY
