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

from cluster.columns import from_csv, row_of
from cluster.kinds import checked_kind, inputs_of, kind_of, kind_of_value, label_of, require, required, wanted
from cluster.lines import csv_dicts, csv_rows, json_rows, not_utf8
from cluster.reading import CHUNK_ROWS, Row, Unit, tables
from distillation.cache import remembered_checksum
from distillation.config import ImageClassification, TaskConfig
from distillation.errors import InputError
from distillation.places import filesystem

Kind = Literal["parquet", "csv", "jsonl", "arrow", "text"]
ENDINGS: dict[str, Kind] = {
    ".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".arrow": "arrow",
}  # fmt: skip
IMAGE_ROWS = 64
"""Of a Parquet file that are unpacked at once, where a row is an image."""
PLAIN: dict[str, Kind] = {"": "text"}
"""Of plain text: any ending."""


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


def find(patterns: str | Sequence[str], endings: Mapping[str, Kind] = ENDINGS) -> list[File]:
    """Files that paths or globs name, sorted. Raises InputError where one names nothing, no plain file or an empty one."""
    named = [patterns] if isinstance(patterns, str) else patterns
    found = {file.path: file for pattern in named for file in _matches(pattern, endings)}
    return [found[path] for path in sorted(found)]


def _matches(pattern: str, endings: Mapping[str, Kind]) -> list[File]:
    remote = "://" in pattern
    uri, _, query = pattern.partition("?") if remote else (os.path.abspath(os.path.expanduser(pattern)), "", "")
    scheme = uri.split("://", 1)[0] + "://" if remote else ""
    suffix = f"?{query}" if query else ""
    wildcard = re.search(r"[*?\[]", uri)
    with named(pattern):
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
    return [_checked(scheme + info.path, scheme + info.path + suffix, info, endings, not remote) for info in infos]


def _expression(glob: str) -> str:
    """Regular expression of a glob: * and ? stay inside a folder, ** does not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        pieces.get(p) or (p.replace("[!", "[^", 1) if re.fullmatch(r"\[[^\]]+\]", p) else re.escape(p))
        for p in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", glob)
    )


def _checked(path: str, uri: str, info: pafs.FileInfo, endings: Mapping[str, Kind], local: bool) -> File:
    if info.type == pafs.FileType.NotFound:
        raise InputError("DST-3402", "file does not exist", where=path)
    if info.type != pafs.FileType.File:
        raise InputError("DST-3403", "not a regular file", where=path, expected="a file or a glob", found=info.type.name.lower())
    kind = next((kind for ending, kind in endings.items() if path.lower().endswith(ending)), None)
    if kind is None:
        raise InputError("DST-3404", "format of a file is not known", where=path, expected=", ".join(endings), found=Path(path).name)
    if info.size == 0:
        raise InputError("DST-3405", "file is empty", where=path, expected="rows", found="0 bytes")
    return File(uri, path, kind, info.size, info.mtime_ns or 0, local)


def identity(file: File) -> list[Any]:
    """What stands for a file's content in a fingerprint: a checksum where it is local, else the time of its last change."""
    return [Path(file.path).name, file.size, remembered_checksum(Path(file.path)) if file.local else file.modified]


def check(splits: Mapping[str, Sequence[File]], task: TaskConfig) -> None:
    """Look at the head of every file: its columns and their types. Raises InputError naming the file, or both that differ."""
    first: dict[str, tuple[str, str]] = {}
    for split, files in splits.items():
        for file in files:
            kinds = columns(file, task)
            require(task, required(task, split), kinds, file.path)
            for column in wanted(task):
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


def columns(file: File, task: TaskConfig) -> dict[str, str]:
    """Columns of a file and the kind of each, see `kinds.kind_of`; for JSON lines those of the first row."""
    with named(file.path):
        if file.kind in ("parquet", "arrow"):
            schema = _parquet(file.uri).schema_arrow if file.kind == "parquet" else _arrow(file.uri).schema
            return {field.name: checked_kind(task, field.name, kind_of(field.type), file.path, str(field.type)) for field in schema}
        with opened(file.uri) as stream:
            if file.kind == "csv":
                return dict.fromkeys(next(csv_rows(stream, file.path), (1, []))[1], "string")
            for number, row in json_rows(stream, file.path):
                where = f"{file.path}:line {number}"
                row_of(task, row, where)
                return {str(k): checked_kind(task, str(k), kind_of_value(v), where, kind_of_value(v)) for k, v in row.items()}
    raise InputError("DST-3405", "file is empty", where=file.path, expected="rows", found="no line")


# ------------------------------------------------------------------------------------------------------------------ read


def units(file: File, split: str | None) -> list[Unit]:
    """One for each row group of a Parquet file, one for any other file."""
    if file.kind != "parquet":
        return [Unit(file.kind, file.uri, split, bytes=file.size * (4 if file.path.endswith(".gz") else 1))]
    with named(file.path):
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
    with named(path):
        if unit.kind == "parquet":
            with _parquet(unit.path) as file:
                names = [name for name in wanted(task) if name in file.schema_arrow.names]
                rows = IMAGE_ROWS if isinstance(task, ImageClassification) else CHUNK_ROWS
                batches = file.iter_batches(batch_size=rows, row_groups=[unit.group], columns=names, use_threads=False)
                yield from tables(_batch_rows(batches, path, unit.start, task), unit.split, task)
        elif unit.kind == "arrow":
            yield from tables(_batch_rows(_arrow_batches(unit.path), path, 0, task), unit.split, task)
        else:
            with opened(unit.path) as stream:
                lines = csv_dicts(stream, path) if unit.kind == "csv" else json_rows(stream, path)
                yield from tables(_line_rows(lines, path, task, unit.kind == "csv"), unit.split, task)


def _batch_rows(batches: Iterator[pa.RecordBatch], path: str, start: int, task: TaskConfig) -> Iterator[Row]:
    row = start
    for batch in batches:
        require(task, inputs_of(task), dict.fromkeys(batch.schema.names), path)
        names = [name for name in wanted(task) if name in batch.schema.names]
        for name in names:
            kind = batch.schema.field(name).type
            checked_kind(task, name, kind_of(kind), path, str(kind))
        columns_ = [_values(batch.column(name), path, row) for name in names]
        for values in zip(*columns_, strict=True):
            row += 1
            yield row_of(task, dict(zip(names, values, strict=True)), f"{path}:row {row}")


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


def _line_rows(lines: Iterator[tuple[int, dict[str, Any]]], path: str, task: TaskConfig, csv: bool) -> Iterator[Row]:
    first: tuple[int, type] | None = None
    column = label_of(task)
    for number, row in lines:
        where = f"{path}:line {number}"
        require(task, inputs_of(task), row, where)
        typed = from_csv(task, row, where) if csv else row
        content, label = row_of(task, typed, where)
        value = None if column is None else typed.get(column)
        for entry in value if isinstance(value, list) else [value]:
            if entry in (None, "") or isinstance(entry, float):
                continue
            first = first or (number, type(entry))
            if type(entry) is not first[1]:
                raise InputError(
                    "DST-3412", "label has another type than before", where=where, expected=f"{first[1].__name__} as in line {first[0]}",
                    found=type(entry).__name__, do="Write the label with the same type everywhere",
                )  # fmt: skip
        yield content, label


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
def opened(uri: str) -> Iterator[BinaryIO]:
    system, path = filesystem(uri)
    with io.BufferedReader(system.open_input_file(path), 1 << 20) as raw:
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unpacked, io.BufferedReader(unpacked, 1 << 20) as stream:
                yield stream
        else:
            yield raw


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Whatever a damaged or unreachable file makes a reader raise, as an InputError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "DST-3406", "file cannot be read", where=path, expected="a whole file of the kind its ending says", found=found,
            do="It may be cut off or damaged: copy it again",
        ) from error  # fmt: skip
