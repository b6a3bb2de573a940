"""The pictures of reports in README and docs: of a committed checkpoint, by a headless Chromium.

python -m benchmarks.pages.pictures [--out FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tenfold.reporting.report import write_report
from tenfold.reporting.run_files import read_run
from tests.browser import chromium

ROOT = Path(__file__).parents[2]
LAYER = "layer3.4.conv2"
PICK = f"const pick = document.getElementById('pick'); pick.value = '{LAYER}'; pick.dispatchEvent(new Event('change'))"


def main() -> None:
    """Draw the top of the page, and the spectrum of a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder, "profile")) as browser:
        page = write_report(read_run(ROOT / "benchmarks" / "checkpoints" / "resnet56"), Path(folder, "report.html"))
        browser.size(1280, 1240)
        browser.open(page)
        browser.picture(options.out / "report.png", whole=False)
        browser.size(1280, 660)
        browser.run(f"(() => {{ {PICK}; }})()")
        browser.run("document.getElementById('layer').scrollIntoView({ block: 'start', behavior: 'instant' })")
        browser.picture(options.out / "spectra.png", whole=False)


if __name__ == "__main__":
    main()
