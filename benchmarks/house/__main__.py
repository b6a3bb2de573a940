"""Prints every line of the house's accounts, and fails where one is missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.house import seams
from benchmarks.house.budget_path import budget_files
from benchmarks.house.source import PACKAGE, ROOT, File, package_files

PRIVATE = r"noqa:.*\bSLF001"
TOO_MANY = r"noqa:.*\bPLR0913"


@dataclass(frozen=True)
class Line:
    """One line: what is counted, how many there are, how many there may be, and which they are."""

    what: str
    value: float
    most: float
    places: Sequence[str] = ()
    least: float = 0

    @property
    def ok(self) -> bool:
        """Whether the target is met."""
        return self.least <= self.value <= self.most


def lines(*, watch_budget: bool = True) -> list[Line]:
    """Return all lines; that of the budget's path runs a compression, which takes half a minute."""
    files = package_files()
    verbs = seams.widest_verbs(files)
    sizes = [file.lines for file in files]
    wide = [f"{name} {n}" for n, name in verbs if n > 8]
    code = sum(file.code_lines for file in files)
    # The 20,963 lines at the start, and the target, take the blank lines of docstrings off twice: so does this.
    counted = code - sum(file.blank_docstring_lines for file in files)
    return [
        Line("arguments of public verbs", verbs[0][0], 8, wide),
        Line("arguments of compress", {name: n for n, name in verbs}["compress"], 7),
        Line("arguments that ruff allows", seams.max_args(), 8),
        Line("noqa: PLR0913", *_counted(seams.commented(files, TOO_MANY), 0)),
        Line("pass-through **x: Any in orchestration", *_counted(seams.passed_through(files), 0)),
        Line("Budget.of(dict(...))", *_counted(seams.commented(files, r"Budget\.of\(dict\("), 0)),
        Line("files that a budget passes, up to the knapsack", *_counted(budget_files() if watch_budget else [], 5)),
        Line("tenfold.allocation missing, or importing torch", *_counted(allocation(), 0)),
        Line("_cache and memory handed around", *_counted(seams.smuggled(files), 0)),
        Line("noqa: SLF001", *_counted(seams.commented(files, PRIVATE), 5)),
        Line("classes that watch the flow of data", *_counted(seams.data_flow_modes(files), 1), least=1),
        Line("questions after a concrete format, outside formats/", *_counted(seams.concrete_formats(files), 0)),
        Line("file names that two rooms have", *_counted(seams.stems_in_two_rooms(files), 0)),
        Line("tests that twins agree", *_counted(agreements(), 0)),
        Line("lines of code", counted, 17_000, [f"{code:,} with the blank lines of docstrings taken off once"]),
        Line("files", len(files), 210),
        Line("lines of the median file", median(sizes), 130),
        Line("lines of the longest file", max(sizes), 400, [_longest(files)]),
    ]


def _counted(places: Sequence[str], most: int) -> tuple[int, int, Sequence[str]]:
    return len(places), most, places


def _longest(files: Sequence[File]) -> str:
    return max(files, key=lambda file: file.lines).name


def allocation() -> list[str]:
    """Return what is wrong with ``tenfold.allocation``: that it is not there, or that it brings torch along."""
    if not (PACKAGE / "allocation" / "__init__.py").is_file():
        return ["missing"]
    modules = [f"tenfold.allocation.{p.stem}" for p in sorted((PACKAGE / "allocation").glob("[!_]*.py"))]
    code = f"import sys, {', '.join(['tenfold.allocation', *modules])}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return (
        [] if done.returncode == 0 else [done.stderr.strip().splitlines()[-1] if done.stderr else "torch is imported"]
    )


def agreements() -> list[str]:
    """Return the tests that a second planner made necessary: they prove that it plans as the first does."""
    names = {
        "test_plans_are_those_of_plan",
        "test_plans_by_data_are_those_of_plan",
        "test_chains_of_cores_and_embeddings_too",
        "test_layers_that_are_factorized_already",
        "test_a_rank_that_a_plan_makes_full",
        "test_milliseconds_are_reckoned_as_plan_reckons",
    }
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    return sorted(f"{path.name}: {name}" for path, text in texts.items() for name in names if f"def {name}(" in text)


def main() -> None:
    """Print the lines, and what misses its target in full."""
    found = lines()
    print(f"{'':52} {'now':>8} {'target':>8}")
    for line in found:
        print(f"{line.what:52} {line.value:8g} {f'≤ {line.most:g}':>8}  {'ok' if line.ok else 'NO'}")
        if not line.ok:
            for place in line.places:
                print(f"    {place}")
    sys.exit(any(not line.ok for line in found))


if __name__ == "__main__":
    main()
