#!/usr/bin/env bash
# torch.linalg.lstsq on the CPU, called again with the same matrix and the same right side, gives other last digits each
# time with its default driver, gelsy: which columns it pivots depends on what happened to be in memory. The other
# drivers repeat themselves. Neither torch.use_deterministic_algorithms nor one thread changes that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False
torch.manual_seed(0)
matrix, right = torch.randn(16, 16), torch.randn(16, 5)


def solutions(driver):
    """Return how many different solutions there are, with other small allocations in between, as in any program."""
    seen, kept = set(), []
    for turn in range(300):
        kept.append(torch.randint(0, 2**31 - 1, (2 + turn % 37,), dtype=torch.int32))
        kept = kept[-5:] if turn % 3 == 0 else kept
        options = {} if driver is None else {"driver": driver}
        seen.add(torch.linalg.lstsq(matrix, right, **options).solution.numpy().tobytes())
    return len(seen)


found = {driver: solutions(driver) for driver in (None, "gelsy", "gels", "gelsd", "gelss")}
print("different solutions in 300 calls, by driver (None: the default):", found)
assert found[None] > 1
assert found["gelsy"] > 1
assert found["gels"] == found["gelsd"] == found["gelss"] == 1
PY
