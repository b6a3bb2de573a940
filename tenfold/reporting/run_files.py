"""Read runs from disk: a checkpoint folder, the folder of a run in stages, or a record. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenfold.errors import DataError, FileError, TenfoldError
from tenfold.files import read_text
from tenfold.records import Analysis, RunRecord, SensitivityTable, TradeOff, explain
from tenfold.records.parsing import CHANGED, parse_json, unseal

RECORD, ANALYSIS = "record.json", "analysis.json"


@dataclass(frozen=True)
class Run:
    """The record of a run, and the curves beside it.

    ``name`` is that of the folder, or of the file and the place in it.
    """

    name: str
    record: RunRecord
    analysis: Analysis | None = None
    tradeoff: TradeOff | None = None
    sensitivity: SensitivityTable | None = None


def read_run(path: str | Path, *, curves: Sequence[str | Path] = ()) -> Run:
    """Return the run in a folder that ``save`` or a run in stages wrote, or in a record.json.

    Args:
        path: the folder or the file.
        curves: JSON files that ``tenfold plan --plot`` or ``tenfold sensitivity`` wrote, to be drawn too.

    Raises:
        DataError: there is no record, or a file is not what it should be.
    """
    file = _file(Path(path))
    record = _record(_load(file), file)
    beside = file.parent / ANALYSIS
    analysis = None
    if file.name == RECORD and beside.is_file():
        try:
            analysis = Analysis.from_text(read_text(beside, "an analysis"), source=str(beside))
        except TenfoldError as error:
            raise DataError(str(error)) from error
    found: dict[str, Any] = {}
    for extra in curves:
        read = _curve(Path(extra))
        found["tradeoff" if isinstance(read, TradeOff) else "sensitivity"] = read
    return Run(_name(file), record, analysis, **found)


def read_runs(path: str | Path) -> tuple[Run, ...]:
    """Return the run at ``path``, or all runs in a JSON file that has records inside, as benchmarks write them.

    Raises:
        DataError: there is none.
    """
    file = _file(Path(path))
    value = _load(file)
    if _is_record(value):
        return (Run(_name(file), _record(value, file)),)
    found = tuple(
        Run(f"{_name(file)}: {' / '.join(keys)}", _record(record, file)) for keys, record in _records(value, ())
    )
    if not found:
        msg = f"{file} has no record of a run in it: give a folder or a record.json that tenfold wrote"
        raise DataError(msg)
    return found


def _file(path: Path) -> Path:
    if path.is_dir() and not (path / RECORD).is_file():
        msg = f"{path} has no {RECORD}: give a folder that tenfold wrote, with a record of the run"
        raise DataError(msg)
    return path / RECORD if path.is_dir() else path


def _name(file: Path) -> str:
    return file.absolute().parent.name if file.name == RECORD else file.stem


def _load(file: Path) -> Any:
    try:
        text, intact = unseal(read_text(file, "JSON"))
        value = parse_json(text)
    except FileError as error:
        raise DataError(str(error)) from error
    except ValueError as error:
        msg = f"{file} is not JSON: {error}. Give a folder that tenfold wrote, or its {RECORD}."
        raise DataError(msg) from error
    if not intact:
        msg = f"{file} {CHANGED}"
        raise DataError(msg)
    return value


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and {"before", "after", "plan", "environment"} <= set(value)


def _record(value: Any, file: Path) -> RunRecord:
    if not _is_record(value):
        msg = f"{file} is not the record of a run: give a folder or a record.json that tenfold wrote"
        raise DataError(msg)
    own = {name: item for name, item in value.items() if name != "out"}  # what --json printed will do as well
    try:
        return RunRecord.model_validate(own)
    except ValidationError as error:
        msg = f"{file} is not a record that this tenfold reads: {explain(error)}"
        raise DataError(msg) from error


def _records(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the records inside of a value, each with the keys that lead to it."""
    if _is_record(value):
        yield keys, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _records(item, (*keys, str(key)))


def _curve(file: Path) -> TradeOff | SensitivityTable:
    value = _load(file)
    kind = TradeOff if isinstance(value, dict) and "points" in value else SensitivityTable
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        msg = (
            f"{file} is neither a trade-off curve (tenfold plan --plot writes its JSON) nor a sensitivity table: "
            f"{explain(error)}"
        )
        raise DataError(msg) from error
