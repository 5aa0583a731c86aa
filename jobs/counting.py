"""How many rows the sources of a corpus hold, without reading them all: from what a file says of itself, else from its head."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.reading import Unit
from distillation.storage import filesystem

HEAD_BYTES = 2 << 20
"""Read of a CSV or JSON lines file to learn how long its rows are."""


def rows_by_split(units: Sequence[Unit]) -> dict[str, float]:
    """Rows before duplicates and empty texts are dropped; what the source leaves open counts as train. Docstrings: at most so many."""
    found: dict[str, float] = {"train": 0.0, "validation": 0.0, "test": 0.0}
    seen: set[str] = set()
    for unit in units:
        if unit.rows:
            rows: float = unit.rows
        elif unit.kind in ("hub", "docstrings"):
            rows = unit.stop - unit.start
        elif unit.path in seen:  # another row group of a Parquet file that was counted whole
            continue
        else:
            seen.add(unit.path)
            rows = _rows_of_file(unit)
        found[unit.split or "train"] += rows
    return found


def _rows_of_file(unit: Unit) -> float:
    system, path = filesystem(unit.path)
    with system.open_input_file(path) as file:
        if unit.kind == "parquet":
            return float(pq.ParquetFile(file).metadata.num_rows)
        size = file.size()
        if unit.kind == "arrow":
            start = file.read(6)
            file.seek(0)
            batch = pa.ipc.open_file(file).get_batch(0) if start == b"ARROW1" else pa.ipc.open_stream(file).read_next_batch()
            return float(max(1.0, size / batch.nbytes) * batch.num_rows)
        packed = file.read(HEAD_BYTES)
    text = (_unpacked(packed) if path.endswith(".gz") else packed).decode("utf-8", "replace")
    header = 1 if unit.kind == "csv" else 0
    rows = csv.reader(io.StringIO(text)) if unit.kind == "csv" else map(str.strip, text.split("\n"))
    return (sum(1 for row in rows if row) - header) * size / len(packed)


def _unpacked(packed: bytes) -> bytes:
    """The text of the head of a gzip file, which may consist of several pieces."""
    found = b""
    while packed[:2] == b"\x1f\x8b":
        piece = zlib.decompressobj(wbits=31)
        found += piece.decompress(packed)
        packed = piece.unused_data
    return found
