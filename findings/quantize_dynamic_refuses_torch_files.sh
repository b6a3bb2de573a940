#!/usr/bin/env bash
# ONNX Runtime's quantize_dynamic refuses a file that torch.onnx.export wrote of one linear layer: the file notes shapes
# of initializers among its values, the quantizer transposes the weight and leaves the note, and shape inference then
# finds two shapes. The same file without those notes is quantized and runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.2.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
print("torch", torch.__version__, "| onnxruntime", onnxruntime.__version__)
net = torch.nn.Linear(8, 4).eval()
torch.onnx.export(net, (torch.zeros(1, 8),), "net.onnx", verbose=False, external_data=False)
try:
    quantize_dynamic("net.onnx", "int8.onnx")
    refused = ""
except Exception as error:
    refused = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
print("as torch wrote it:", refused or "quantized")
bare = onnx.load("net.onnx")
noted = {value.name for value in bare.graph.value_info} & {held.name for held in bare.graph.initializer}
print("initializers that are noted among the values:", sorted(noted))
del bare.graph.value_info[:]
onnx.save(bare, "bare.onnx")
quantize_dynamic("bare.onnx", "int8.onnx")
(out,) = onnxruntime.InferenceSession("int8.onnx").run(None, {bare.graph.input[0].name: torch.ones(1, 8).numpy()})
print("without the notes: quantized, and runs to", out.shape)
assert refused
assert noted
PY
