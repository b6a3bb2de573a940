"""What all records share: frozen, strict, versioned, and YAML or JSON both ways. No torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tenfold.errors import DataError, FileError, TenfoldError
from tenfold.files import read_text, write_text
from tenfold.patterns import as_patterns
from tenfold.records.parsing import CHANGED, parse, parse_json, seal, unseal
from tenfold.registry import as_names

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_patterns)]


class Record(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again."""
        return type(self).model_validate({**{k: getattr(self, k) for k in type(self).model_fields}, **changes})

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        """Return the record as YAML in the order of its fields."""
        values = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, width=118, allow_unicode=True, default_flow_style=None)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Return what ``repr`` shows: what differs from its default."""
        fields = type(self).model_fields
        return [(name, value) for name, value in self if not _same(value, fields[name].default)]

    @classmethod
    def from_text(cls, text: str, *, source: str = "text") -> Self:
        """Read a record from YAML or JSON (which is YAML), sealed or not.

        Raises:
            TenfoldError: the text is neither, is not the one that was sealed, or is not a record of this type; the
                message names the field.
        """
        text, intact = unseal(text)
        try:
            record = cls.model_validate(parse(text))
        except ValidationError as error:
            msg = f"{source} is not a valid {cls.__name__}: {explain(error)}"
            raise TenfoldError(msg) from error
        except ValueError as error:
            msg = f"{source} is not valid YAML: {error}"
            raise TenfoldError(msg) from error
        if not intact:
            msg = f"{source} {CHANGED}"
            raise TenfoldError(msg)
        return record

    def save_sealed(self, path: Path) -> None:
        """Write the record as JSON with a digest: for files that tenfold reads again and nobody edits."""
        write_text(path, seal(self.to_json()))

    @classmethod
    def from_json_file(cls, path: str | Path, what: str) -> Self:
        """Read a record from a JSON file; ``what`` it holds is for messages.

        Raises:
            DataError: the file cannot be read, is something else, was damaged, or was written by another version.
        """
        try:
            text, intact = unseal(read_text(Path(path), what))
            record = cls.model_validate(parse_json(text))
        except FileError as error:
            raise DataError(str(error)) from error
        except ValidationError as error:
            msg = f"{path} is not {what} that this tenfold reads: {explain(error)}"
            raise DataError(msg) from error
        except ValueError as error:
            msg = f"{path} is not {what} that this tenfold reads: {error}"
            raise DataError(msg) from error
        if not intact:
            msg = f"{path} {CHANGED}"
            raise DataError(msg)
        return record


def _same(value: Any, default: Any) -> bool:
    # Arrays have no one answer to ==, and no field has an array as its default.
    return value is default or (type(value) is type(default) and bool(value == default))


class Spec:
    """Base of the geometries: frozen dataclasses, because planning derives hundreds of thousands of them.

    Where a record holds one, it is validated as it is read; what is derived from it is not validated again.
    """

    __slots__ = ()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def refusal(error: ValidationError) -> Exception | None:
    """Return the error that a validator of ours raised first, if that is what a validation error is about."""
    raised = error.errors()[0].get("ctx", {}).get("error")
    return raised if isinstance(raised, TenfoldError) else None


def explain(error: ValidationError) -> str:
    """Return the first problems of a validation error in one line."""
    problems = [
        f"{'.'.join(str(part) for part in e['loc']) or 'top level'}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()[:3]
    ]
    return "; ".join(problems)
