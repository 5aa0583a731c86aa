"""What all readers of a corpus share: units of reading, and tables of a few thousand rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from distillation.config import ImageClassification, TaskConfig

CHUNK_ROWS = 4096
CHUNK_CHARACTERS = 1 << 23
"""A table is handed on when it has this many rows or characters: memory does not depend on the size of a file."""

SCHEMA = pa.schema([("text", pa.string()), ("label", pa.string()), ("split", pa.string())])
"""`text` is the canonical content of a row, which decides what is a duplicate and makes its id: a text, or JSON of two texts or of words."""
PIXELS = pa.schema([("text", pa.binary()), ("label", pa.string()), ("split", pa.string())])
"""Of images: `text` are their pixels, a byte each, row by row, the channels of a pixel side by side."""

Row = tuple[str | bytes, str | None]
"""Canonical content and canonical label, see `cluster.columns`."""


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one task reads from its start to its end."""

    kind: Literal["parquet", "csv", "jsonl", "arrow", "hub", "docstrings", "text", "source", "digits"]
    path: str
    """File, data set or package."""
    split: str | None
    """Where its rows belong; None: decided by their content."""
    start: int = 0
    """First row (counted from 0) of a row group or range of rows."""
    stop: int = 0
    """End of the range; for docstrings the most paragraphs, for source code the most files."""
    group: int = 0
    """Row group of a Parquet file."""
    bytes: int = 0
    """Roughly how much there is to read."""
    rows: float = 0
    """Roughly how many rows, where the source can tell (0: it cannot)."""
    subset: str | None = None
    revision: str | None = None
    source_split: str | None = None
    """Of a data set of the hub."""
    mode: str = ""
    """How plain text or source code is cut into rows."""


def tables(rows: Iterable[Row], split: str | None, task: TaskConfig) -> Iterator[pa.Table]:
    """Rows of (content, label) as tables of `SCHEMA`, for images of `PIXELS`."""
    schema = PIXELS if isinstance(task, ImageClassification) else SCHEMA
    contents: list[str | bytes] = []
    labels: list[str | None] = []
    size = 0
    for content, label in rows:
        contents.append(content)
        labels.append(label)
        size += len(content)
        if len(contents) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield _table(contents, labels, split, schema)
            contents, labels, size = [], [], 0
    if contents:
        yield _table(contents, labels, split, schema)


def _table(contents: list[str | bytes], labels: list[str | None], split: str | None, schema: pa.Schema) -> pa.Table:
    columns = zip((contents, labels, [split] * len(contents)), schema.types, strict=True)
    return pa.Table.from_arrays([pa.array(values, kind) for values, kind in columns], schema=schema)
