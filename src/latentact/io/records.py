"""Metadata files as typed records: JSON, JSON lines, YAML and parquet are validated once, here.

An invalid file raises a `UserError` with the file, the field, the expected and the actual value. A record is
a pydantic model of the fields that are used; other fields are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from latentact.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_SHOWN = 60


class Record(BaseModel):
    """A metadata file or one line of it; values keep their JSON type (`"3"` is not 3)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


def parse_record[R: Record](kind: type[R], values: Any, where: str) -> R:
    """Validate `values` as a record.

    Args:
        kind: the record's class.
        values: the parsed content of the file.
        where: the file, or the file and the line, for messages.

    Raises:
        UserError: a field is missing or does not fit the record.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}; repair the file or copy it again.") from error


def read_record[R: Record](kind: type[R], file: Path) -> R:
    """Read a JSON file as a record.

    Raises:
        UserError: the file cannot be read, is not JSON, or is invalid.
    """
    return parse_record(kind, parse_json(read_text(file), str(file)), str(file))


def read_records[R: Record](kind: type[R], file: Path) -> list[R]:
    """Read the lines of a JSON lines file as records; empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is not JSON or is invalid.
    """
    lines = [(n, line) for n, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    return [
        parse_record(kind, parse_json(line, f"{file}, line {n}"), f"{file}, line {n}") for n, line in lines
    ]


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if file.exists() and not file.is_file():  # reading a pipe would block
            raise UserError(f"{file} must be a regular file, got a folder, pipe or device; replace it.")
        data = file.read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} must be UTF-8 text, got another encoding at byte {error.start}; save it as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); copy it again.") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Raises:
        UserError: it is not JSON, an object has two values for one key, or a string is not Unicode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                raise UserError(
                    f"{where}: {key!r} must have one value, got {found[key]!r} and {value!r}; keep one."
                )
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); repair the file or copy it again.") from error
    return _require_unicode(value, text, where)


def _require_unicode(value: Any, text: str, where: str) -> Any:
    """Return `value`, parsed from `text`, if its strings are valid Unicode.

    An escape can produce half of a character (a lone surrogate), which UTF-8 cannot encode.

    Raises:
        UserError: a string is not valid Unicode.
    """
    left, visited = [value] if "\\u" in text.lower() else [], set()
    while left:
        item = left.pop()
        if isinstance(item, str):
            if lone := next((char for char in item if "\ud800" <= char <= "\udfff"), ""):
                raise UserError(
                    f"{where} must be Unicode text, got half of a character, \\u{ord(lone):04x}; repair the "
                    f"file or copy it again."
                )
        elif isinstance(item, (dict, list)) and id(item) not in visited:
            visited.add(id(item))  # YAML can refer to an object from inside it
            left += [*item, *item.values()] if isinstance(item, dict) else item
    return value


def read_yaml(file: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: the file cannot be read or is not YAML of plain values.
    """
    import yaml

    odd = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of values with a tag
    try:
        text = read_text(file)
        return _require_unicode(yaml.safe_load(text), text, str(file))
    except (yaml.YAMLError, *odd) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not YAML ({reason}); repair the file or copy it again.") from error


@contextmanager
def naming(file: Path) -> Generator[None]:
    """Prefix the message of a `UserError` with the name of the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open a parquet file of any name; pyarrow itself only accepts UTF-8 names."""
    import pyarrow.parquet as pq

    name = os.fsencode(file)
    return pq.ParquetFile(file if name == name.decode(errors="replace").encode() else file.open("rb"))


def read_parquet(file: Path, columns: Collection[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns.

    Raises:
        UserError: the file is missing, damaged, not parquet, or lacks a column.
    """
    import pyarrow as pa

    try:
        with open_parquet(file) as opened:
            known = opened.schema_arrow.names
            lacking = [name for name in columns or () if name not in known]
            if lacking:
                raise UserError(
                    f"{file} must have the column {lacking[0]!r}, got {', '.join(known)}; copy the dataset "
                    f"again."
                )
            table = opened.read(columns=None if columns is None else list(columns))
            for column in table.columns:
                if not pa.types.is_primitive(column.type):
                    column.validate(full=True)  # finds strings that are not UTF-8
            return table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_parquet(file, error) from error


def parquet_columns(file: Path) -> list[str]:
    """Return the names of the columns of a parquet file.

    Raises:
        UserError: the file is missing, damaged or not parquet.
    """
    import pyarrow as pa

    try:
        with open_parquet(file) as opened:
            return opened.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(file, error) from error


def _not_parquet(file: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return UserError(f"{file} cannot be read as parquet ({reason}); copy the dataset again.")


def _first(error: ValidationError) -> str:
    """Describe the first problem: the field, the expected and the actual value."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(map(str, problem["loc"])) or "the content"
    if problem["type"] == "missing":
        return f"{field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a known field"
    if problem["type"] == "model_type":
        problem["msg"] = "an object"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    expected = expected.replace("greater than or equal to", "at least").replace(
        "less than or equal to", "at most"
    )
    got = repr(problem["input"])
    got = got if len(got) <= _SHOWN else f"{got[:_SHOWN]}..."
    return f"{field} must be {expected}, got {got}"
