#!/usr/bin/env bash
# Importing the OpenVINO runtime, without any of its converters, loads its telemetry: it writes an identifier and
# statistics into the home folder and starts to send an event. With the package openvino-telemetry out of sight the
# runtime imports and runs as well, and writes nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 openvino-telemetry==2025.2.0
mkdir "$folder/first" "$folder/second"
HOME="$folder/first" "$folder/venv/bin/python" -c '
import sys
import openvino
print("openvino", openvino.__version__)
print("telemetry loaded by the import:", "openvino_telemetry" in sys.modules)
assert "openvino_telemetry" in sys.modules
'
HOME="$folder/second" "$folder/venv/bin/python" -c '
import sys
sys.modules["openvino_telemetry"] = None
import openvino
print("devices without it:", openvino.Core().available_devices)
'
written=$(cd "$folder" && find first second -type f | sort)
echo "written: ${written//$'\n'/, }"
[[ $written == *first/* && $written != *second/* ]]
