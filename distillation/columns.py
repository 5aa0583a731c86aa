"""Rows of Arrow files, memory-mapped: a column is addressed by the number of the row, whichever part it lies in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa


class Columns:
    """Rows of one split over its parts, memory-mapped; a column is addressed by the row's number in the split.

    `offsets[i]` is the first row of part i. Reading touches only the pages that hold the rows asked for.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        batches = []
        for path in paths:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                batches.append(reader.read_next_batch())
        self._open(batches)

    @classmethod
    def of(cls, table: pa.Table) -> Columns:
        """Rows that are in memory."""
        columns = cls([])
        columns._open(table.combine_chunks().to_batches())
        return columns

    def _open(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = list(batches)
        self.offsets = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._lists: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
        self._tables: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def schema(self) -> pa.Schema:
        return self._batches[0].schema if self._batches else pa.schema([])

    def whole(self, name: str) -> np.ndarray:
        """A fixed-width column of all rows, copied into memory. [rows]"""
        if not self._batches:
            return np.zeros(0, dtype=np.int32)
        return np.concatenate([_flat(batch.column(name)) for batch in self._batches])

    def values(self, name: str) -> Iterator[np.ndarray]:
        """All values of a list column, part by part, as views on the mapped file."""
        for batch in self._batches:
            yield _flat(batch.column(name).flatten())

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part and place inside it of each row."""
        parts = np.searchsorted(self.offsets, rows, side="right") - 1
        return parts, rows - self.offsets[parts]

    def strings(self, name: str, rows: np.ndarray) -> list[str]:
        parts, places = self.locate(rows)
        columns = {p: self._batches[p].column(name) for p in np.unique(parts)}
        return [columns[p][int(i)].as_py() for p, i in zip(parts, places, strict=True)]

    def ragged(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """Values of a list column for each row, as views on the mapped file."""
        parts, places = self.locate(rows)
        views = {p: self._list_view(p, name) for p in np.unique(parts)}
        pairs = zip(parts, places, strict=True)
        return [values[offsets[i] : offsets[i + 1]] for (offsets, values), i in ((views[p], i) for p, i in pairs)]

    def fixed(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A fixed-size-list column at these rows, copied into memory. [len(rows), width]"""
        parts, places = self.locate(rows)
        first = self._table_view(0, name)
        out = np.empty((len(rows), first.shape[1]), dtype=first.dtype)
        for part in np.unique(parts):
            here = parts == part
            out[here] = self._table_view(part, name)[places[here]]
        return out

    def positions(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of fixed-size lists, or of lists of them, one for each position of these rows, copied. [positions, width]"""
        if pa.types.is_fixed_size_list(self.schema.field(name).type):
            return self.fixed(name, rows)
        width = self.schema.field(name).type.value_type.list_size
        found = [values.reshape(-1) for values in self.ragged(name, rows)]
        return np.concatenate(found).reshape(-1, width)

    def _list_view(self, part: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        key = (int(part), name)
        if key not in self._lists:
            column = self._batches[part].column(name)
            values = column.values
            if pa.types.is_fixed_size_list(values.type):
                self._lists[key] = _flat(column.offsets), _flat(values.flatten()).reshape(len(values), values.type.list_size)
            else:
                self._lists[key] = _flat(column.offsets), _flat(values)
        return self._lists[key]

    def _table_view(self, part: int, name: str) -> np.ndarray:
        key = (int(part), name)
        if key not in self._tables:
            column = self._batches[part].column(name)
            self._tables[key] = _flat(column.flatten()).reshape(len(column), column.type.list_size)
        return self._tables[key]


def _flat(array: pa.Array) -> np.ndarray:
    """View of a fixed-width Arrow array without nulls."""
    return np.asarray(array.to_numpy(zero_copy_only=True))
