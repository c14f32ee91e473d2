"""Rows of JSON Lines and Parquet files, local or at any fsspec URL."""

from __future__ import annotations

import difflib
import json
import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import IO

from rlsf_ray.errors import InputError
from rlsf_ray.records import Json

Rows = Iterator[tuple[int, Json]]  # (row number, the wanted columns)

_JSONL = (".jsonl", ".ndjson", ".json")


def file_stem(path: str) -> str:
    """The file's name without folder and ending."""
    return posixpath.basename(path.replace("\\", "/")).split(".")[0]


def read_rows(path: str, columns: Sequence[str]) -> Rows:
    """Yield (row number, row) with just `columns`. The number is the line of a JSON Lines file, the row of a Parquet
    file, both from 1.

    Raises InputError: file missing, unreadable or empty, of another kind, a broken line, a column that is not there.
    """
    import fsspec  # here and not above: `rlsf --help` needs no storage

    suffix = posixpath.splitext(path)[1].lower()
    if suffix not in (*_JSONL, ".parquet"):
        raise InputError(
            f"data file {path}: got the ending {suffix!r}, expected {', '.join(_JSONL)} or .parquet; convert the file"
        )
    num_rows = 0
    try:
        opener = fsspec.open(path, "rb")
    except (ValueError, ImportError) as error:
        raise InputError(f"data file {path} cannot be opened: {error}; check the URL and its fsspec package") from error
    try:
        with opener as file:
            for number, row in (_parquet if suffix == ".parquet" else _json_lines)(file, path, columns):
                num_rows += 1
                yield number, row
    except FileNotFoundError as error:
        raise InputError(
            f"data file {path} does not exist; check the path (relative paths start at {os.getcwd()})"
        ) from error
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error}; check the path and your access to it") from error
    if num_rows == 0:
        raise InputError(f"data file {path} is empty: got 0 rows, expected at least 1; put one prompt on each line")


def _json_lines(file: IO[bytes], path: str, columns: Sequence[str]) -> Rows:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(
                f"data file {path}, line {number}: not valid JSON ({error}); every line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"data file {path}, line {number}: got a JSON {type(row).__name__}, expected one object with named"
                " columns; write each line as {...}"
            )
        check_columns(columns, row, f"data file {path}, line {number}")
        yield number, {name: row[name] for name in columns}


def _parquet(file: IO[bytes], path: str, columns: Sequence[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        check_columns(columns, table.schema_arrow.names, f"data file {path}")
        batches: Iterable[pyarrow.RecordBatch] = table.iter_batches(columns=list(dict.fromkeys(columns)))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except pyarrow.ArrowException as error:
        raise InputError(f"data file {path} is not a readable Parquet file ({error}); write it again") from error


def check_columns(wanted: Sequence[str], found: Collection[str], where: str) -> None:
    """Raise InputError that lists the columns found, with the nearest match, when one of `wanted` is not there."""
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{where}: no column {name!r}, found {', '.join(map(repr, found)) or 'none'}{hint}."
                " Name the right column in the source (question, messages, answer, id)"
            )
