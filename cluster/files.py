"""Parquet, CSV, JSON lines and Arrow files, local or remote: found, checked before anything starts, and read in a stream.

Every error names the file, and where there is one the line or row, counted from 1 (the header of a CSV file is line 1).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.lines import csv_dicts, csv_rows, json_rows, not_utf8
from cluster.reading import CHUNK_ROWS, Unit, as_label, as_text, tables
from distillation.config import TaskConfig
from distillation.errors import InputError
from distillation.storage import filesystem
from distillation.store import checksum

Kind = Literal["parquet", "csv", "jsonl", "arrow"]
ENDINGS: dict[str, Kind] = {
    ".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".arrow": "arrow",
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file that was found: `uri` opens it, `path` is what people see."""

    uri: str
    path: str
    kind: Kind
    size: int
    modified: int
    """Nanoseconds since the epoch."""
    local: bool


# ------------------------------------------------------------------------------------------------------------------ find


def find(patterns: str | Sequence[str]) -> list[File]:
    """Files that paths or globs name, sorted. Raises InputError where one names nothing, no plain file or an empty one."""
    found = {file.path: file for pattern in ([patterns] if isinstance(patterns, str) else patterns) for file in _matches(pattern)}
    return [found[path] for path in sorted(found)]


def _matches(pattern: str) -> list[File]:
    remote = "://" in pattern
    uri, _, query = pattern.partition("?") if remote else (os.path.abspath(os.path.expanduser(pattern)), "", "")
    scheme = uri.split("://", 1)[0] + "://" if remote else ""
    suffix = f"?{query}" if query else ""
    wildcard = re.search(r"[*?\[]", uri)
    with _named(pattern):
        if wildcard is None or (not remote and os.path.lexists(uri)):
            system, path = filesystem(uri + suffix)
            infos = [system.get_file_info(path)]
        else:
            # Only the folder before the first wildcard is a valid URI.
            folder = uri[: wildcard.start()].rpartition("/")[0] or "/"
            system, path = filesystem(folder + suffix)
            rest = uri[len(folder.rstrip("/")) + 1 :]
            selector = pafs.FileSelector(path, allow_not_found=True, recursive="/" in rest or "**" in rest)
            expression = re.compile(re.escape(path.rstrip("/") + "/") + _expression(rest))
            infos = [
                info for info in system.get_file_info(selector)
                if expression.fullmatch(info.path) and info.type != pafs.FileType.Directory and not info.base_name.startswith(".")
            ]  # fmt: skip
            if not infos:
                raise InputError("DST-3401", "no file matches", where=pattern, expected="at least one file", found="none")
    return [_checked(scheme + info.path, scheme + info.path + suffix, info, not remote) for info in infos]


def _expression(glob: str) -> str:
    """Regular expression of a glob: * and ? stay inside a folder, ** does not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        pieces.get(p) or (p.replace("[!", "[^", 1) if re.fullmatch(r"\[[^\]]+\]", p) else re.escape(p))
        for p in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", glob)
    )


def _checked(path: str, uri: str, info: pafs.FileInfo, local: bool) -> File:
    if info.type == pafs.FileType.NotFound:
        raise InputError("DST-3402", "file does not exist", where=path)
    if info.type != pafs.FileType.File:
        raise InputError("DST-3403", "not a regular file", where=path, expected="a file or a glob", found=info.type.name.lower())
    kind = next((kind for ending, kind in ENDINGS.items() if path.lower().endswith(ending)), None)
    if kind is None:
        raise InputError("DST-3404", "format of a file is not known", where=path, expected=", ".join(ENDINGS), found=Path(path).name)
    if info.size == 0:
        raise InputError("DST-3405", "file is empty", where=path, expected="rows", found="0 bytes")
    return File(uri, path, kind, info.size, info.mtime_ns or 0, local)


def identity(file: File) -> list[Any]:
    """What stands for a file's content in a fingerprint: a checksum where it is local, else the time of its last change."""
    return [Path(file.path).name, file.size, checksum(Path(file.path)) if file.local else file.modified]


def check(splits: Mapping[str, Sequence[File]], task: TaskConfig) -> None:
    """Look at the head of every file: its columns and their types. Raises InputError naming the file, or both that differ."""
    first: dict[str, tuple[str, str]] = {}
    for split, files in splits.items():
        for file in files:
            kinds = columns(file, task)
            required = (task.text,) if split == "train" else (task.text, task.label)
            for column in required:
                _require(column, kinds, file.path)
            for column in (task.text, task.label):
                kind = kinds.get(column)
                if kind in (None, "null"):
                    continue
                path, other = first.setdefault(column, (file.path, kind))
                if other != kind:
                    raise InputError(
                        "DST-3408", "files have mixed schemas", where=f"{path} and {file.path}",
                        expected=f"one type of column {column!r}", found=f"{other} in the first and {kind} in the second",
                        do="Write the column with the same type everywhere",
                    )  # fmt: skip


def _require(column: str, present: Mapping[str, Any], path: str) -> None:
    if column not in present:
        raise InputError(
            "DST-3407", "column is missing", where=path, expected=repr(column), found=", ".join(map(str, present)) or "no column",
            do="Set task.text and task.label to the names of the columns",
        )  # fmt: skip


def columns(file: File, task: TaskConfig) -> dict[str, str]:
    """Columns of a file and "string", "integer" or "null" for each; for JSON lines those of the first row."""
    with _named(file.path):
        if file.kind in ("parquet", "arrow"):
            schema = _parquet(file.uri).schema_arrow if file.kind == "parquet" else _arrow(file.uri).schema
            return {field.name: _kind(field.type, field.name, file.path, task) for field in schema}
        with _bytes(file.uri) as stream:
            if file.kind == "csv":
                return dict.fromkeys(next(csv_rows(stream, file.path), (1, []))[1], "string")
            for number, row in json_rows(stream, file.path):
                where = f"{file.path}:line {number}"
                as_text(row.get(task.text), where)
                as_label(row.get(task.label), None, where)
                return {str(k): "null" if v in (None, "") else "integer" if isinstance(v, int) else "string" for k, v in row.items()}
    raise InputError("DST-3405", "file is empty", where=file.path, expected="rows", found="no line")


def _kind(found: pa.DataType, name: str, path: str, task: TaskConfig) -> str:
    values = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values):
        return "string"
    if pa.types.is_null(values):
        return "null"
    if name == task.text:
        raise InputError("DST-3410", "text has a wrong type", where=f"{path}: column {name!r}", expected="a string", found=str(found))
    if name == task.label and not pa.types.is_integer(values):
        raise InputError(
            "DST-3412", "label has a wrong type", where=f"{path}: column {name!r}", expected="a string or an integer", found=str(found)
        )
    return "integer" if pa.types.is_integer(values) else str(found)


# ------------------------------------------------------------------------------------------------------------------ read


def units(file: File, split: str | None) -> list[Unit]:
    """One for each row group of a Parquet file, one for any other file."""
    if file.kind != "parquet":
        return [Unit(file.kind, file.uri, split, bytes=file.size * (4 if file.path.endswith(".gz") else 1))]
    with _named(file.path):
        metadata = _parquet(file.uri).metadata
    found, start = [], 0
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        if described.num_rows:
            found.append(Unit("parquet", file.uri, split, start=start, group=group, bytes=described.total_byte_size))
        start += described.num_rows
    return found


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of a unit's rows, see `reading.SCHEMA`. Raises InputError naming the file and the row."""
    path = unit.path.partition("?")[0] if "://" in unit.path else unit.path
    with _named(path):
        if unit.kind == "parquet":
            with _parquet(unit.path) as file:
                wanted = [name for name in (task.text, task.label) if name in file.schema_arrow.names]
                batches = file.iter_batches(batch_size=CHUNK_ROWS, row_groups=[unit.group], columns=wanted, use_threads=False)
                yield from tables(_batch_rows(batches, path, unit.start, task), unit.split)
        elif unit.kind == "arrow":
            yield from tables(_batch_rows(_arrow_batches(unit.path), path, 0, task), unit.split)
        else:
            with _bytes(unit.path) as stream:
                lines = csv_dicts(stream, path) if unit.kind == "csv" else json_rows(stream, path)
                yield from tables(_line_rows(lines, path, task), unit.split)


def _batch_rows(batches: Iterator[pa.RecordBatch], path: str, start: int, task: TaskConfig) -> Iterator[tuple[str, str | None]]:
    row = start
    for batch in batches:
        _require(task.text, dict.fromkeys(batch.schema.names), path)
        for name in batch.schema.names:
            if name in (task.text, task.label):
                _kind(batch.schema.field(name).type, name, path, task)
        texts = _values(batch.column(task.text), path, row)
        labels = _values(batch.column(task.label), path, row) if task.label in batch.schema.names else [None] * len(texts)
        for text, label in zip(texts, labels, strict=True):
            row += 1
            where = f"{path}:row {row}"
            yield as_text(text, where), as_label(label, task.labels, where)


def _values(column: pa.Array, path: str, start: int) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        for place, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}:row {start + place + 1}", error, 0) from None
        raise


def _line_rows(lines: Iterator[tuple[int, dict[str, Any]]], path: str, task: TaskConfig) -> Iterator[tuple[str, str | None]]:
    first: tuple[int, type] | None = None
    for number, row in lines:
        where = f"{path}:line {number}"
        _require(task.text, row, where)
        value = row.get(task.label)
        label = as_label(value, task.labels, where)
        if label is not None:
            first = first or (number, type(value))
            if type(value) is not first[1]:
                raise InputError(
                    "DST-3412", "label has another type than before", where=where, expected=f"{first[1].__name__} as in line {first[0]}",
                    found=type(value).__name__, do="Write the label with the same type everywhere",
                )  # fmt: skip
        yield as_text(row[task.text], where), label


# ------------------------------------------------------------------------------------------------------------------ open


def _parquet(uri: str) -> pq.ParquetFile:
    system, path = filesystem(uri)
    return pq.ParquetFile(system.open_input_file(path), memory_map=False, pre_buffer=False)


def _arrow(uri: str) -> Any:
    """Reader of an Arrow file, or of an Arrow stream as `datasets` writes it."""
    system, path = filesystem(uri)
    file = system.open_input_file(path)
    start = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)


def _arrow_batches(uri: str) -> Iterator[pa.RecordBatch]:
    reader = _arrow(uri)
    if isinstance(reader, pa.ipc.RecordBatchStreamReader):
        yield from reader
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


@contextlib.contextmanager
def _bytes(uri: str) -> Iterator[BinaryIO]:
    system, path = filesystem(uri)
    with io.BufferedReader(system.open_input_file(path), 1 << 20) as raw:
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unpacked, io.BufferedReader(unpacked, 1 << 20) as stream:
                yield stream
        else:
            yield raw


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever a damaged or unreachable file makes a reader raise, as an InputError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "DST-3406", "file cannot be read", where=path, expected="a whole file of the kind its ending says", found=found,
            do="It may be cut off or damaged: copy it again",
        ) from error  # fmt: skip
