"""Imports all that a run takes: for a server that forks processes, which then start at once."""

from __future__ import annotations

import scipy.optimize  # noqa: F401
import torch._dynamo
import torch.onnx  # noqa: F401

from benchmarks.zoo import supply_torchvision_ops
from tenfold.errors import require

supply_torchvision_ops()
_ = require("transformers", "hf").LlamaForCausalLM  # imported when it is asked for
