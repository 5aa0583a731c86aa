"""Records of many parts as one Arrow table: a manifest of a million parts stays a small file that names it, and opening it maps it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

MANY = 4096
"""Parts of an artifact beyond which their records are not in the manifest itself."""

SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("checksum", pa.binary(16)),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
    ]
)


class FileRecord(BaseModel):
    """What a file must look like. For parts also what is inside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    checksum: str
    """xxh3_128 of the content, hexadecimal."""
    rows: int = 0
    tokens: int = 0


class Parts(Sequence[FileRecord]):
    """Records of the parts of one split, out of a table: made when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> FileRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FileRecord]: ...
    def __getitem__(self, index: int | slice) -> FileRecord | Sequence[FileRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _record({name: self._table[name][index % len(self)].as_py() for name in FileRecord.model_fields})

    def __iter__(self) -> Iterator[FileRecord]:
        for batch in self._table.select(list(FileRecord.model_fields)).to_batches(max_chunksize=4096):
            yield from map(_record, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(a == b for a, b in zip(self, other, strict=True))

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self._table[name])


def numbers(parts: Sequence[FileRecord], column: str) -> np.ndarray:
    """A column of numbers of parts. [parts] int64"""
    return parts.column(column) if isinstance(parts, Parts) else np.array([getattr(part, column) for part in parts], np.int64)


def total(parts: Sequence[FileRecord], column: str) -> int:
    """Sum of a column over parts."""
    return int(numbers(parts, column).sum())


def _record(row: Mapping[str, Any]) -> FileRecord:
    return FileRecord.model_construct(**{**row, "checksum": row["checksum"].hex()})


def write_table(path: Path, splits: Mapping[str, Sequence[FileRecord]]) -> None:
    """All records in order, as an uncompressed Arrow stream."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for split, parts in splits.items():
            for start in range(0, len(parts), 65536):
                some = parts[start : start + 65536]
                columns = {name: [getattr(part, name) for part in some] for name in FileRecord.model_fields}
                columns["checksum"] = [bytes.fromhex(checksum) for checksum in columns["checksum"]]
                writer.write_table(pa.table({"split": [split] * len(some), **columns}, schema=SCHEMA))


def read_table(path: Path) -> dict[str, Parts]:
    """What `write_table` wrote, memory-mapped. Raises ValueError where it is something else."""
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        table = reader.read_all()
    if table.schema != SCHEMA:
        raise ValueError("a table of other columns")
    splits = table["split"].combine_chunks().to_numpy(zero_copy_only=False)
    changes = [0, *(np.flatnonzero(splits[1:] != splits[:-1]) + 1).tolist(), len(splits)] if len(splits) else [0]
    return {str(splits[a]): Parts(table.slice(a, b - a)) for a, b in itertools.pairwise(changes)}
