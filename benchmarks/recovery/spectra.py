"""Spectra and error curves for the reports of the committed checkpoints, from the weights that these were made of.

    python -m benchmarks.recovery.spectra --weights-dir FOLDER

Weights are ``FOLDER/NETWORK.safetensors``. Writes ``analysis.json`` into each folder of ``benchmarks/checkpoints``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.recovery.run import CHECKPOINTS
from tenfold.planning import analyse
from tenfold.profiling import profile
from tenfold.records import write_text
from tenfold.records.parsing import seal
from tenfold.reporting.run_files import read_run
from tenfold.tasks import load_task


def main() -> None:
    """Write the analysis of every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, required=True, help="folder with NETWORK.safetensors")
    options = parser.parse_args()
    for folder in sorted(path.parent for path in CHECKPOINTS.glob("*/record.json")):
        record = read_run(folder).record
        task = load_task(str(record.task))
        model = task.dense(options.weights_dir / f"{str(record.task).partition(':')[2]}.safetensors")
        found = analyse(model, profile(model, task.example_inputs()), record.plan, fits=True)
        write_text(folder / "analysis.json", seal(found.model_dump_json()))


if __name__ == "__main__":
    main()
