"""What all readers of a corpus share: units of reading, the check of a text and of a label, and tables of a few thousand rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from distillation.errors import InputError

CHUNK_ROWS = 4096
CHUNK_CHARACTERS = 1 << 23
"""A table is handed on when it has this many rows or characters: memory does not depend on the size of a file."""

SCHEMA = pa.schema([("text", pa.string()), ("label", pa.string()), ("split", pa.string())])


@dataclass(frozen=True)
class Unit:
    """A piece of a source that one task reads from its start to its end."""

    kind: Literal["parquet", "csv", "jsonl", "arrow", "hub", "docstrings"]
    path: str
    """File, data set or package."""
    split: str | None
    """Where its rows belong; None: decided by their content."""
    start: int = 0
    """First row (counted from 0) of a row group or range of rows."""
    stop: int = 0
    """End of the range; for docstrings the most paragraphs."""
    group: int = 0
    """Row group of a Parquet file."""
    bytes: int = 0
    """Roughly how much there is to read."""
    subset: str | None = None
    revision: str | None = None
    source_split: str | None = None
    """Of a data set of the hub."""


def as_text(value: Any, where: str) -> str:
    """The text of a row; "" where there is none. Raises InputError if it is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            "DST-3410", "text has a wrong type", where=where, expected="a string", found=f"{type(value).__name__} {value!r:.40}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            "DST-3411", "text is not valid Unicode", where=where, expected="UTF-8", found=f"half a surrogate pair in {value!r:.40}"
        ) from None
    return value


def as_label(value: Any, names: tuple[str, ...] | None, where: str) -> str | None:
    """The name of a row's label; None where there is none (null or ""). With `names`, an integer is a place in them.

    Raises InputError if it is neither a string nor an integer, or not one of `names`.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(
            "DST-3412",
            "label has a wrong type",
            where=where,
            expected="a string or an integer",
            found=f"{type(value).__name__} {value!r:.40}",
        )
    if names is None or value in names:
        return as_text(str(value), where)
    text = str(value)
    if text.lstrip("-").isdecimal() and text.isascii():
        if 0 <= int(text) < len(names):
            return names[int(text)]
        raise InputError(
            "DST-3414",
            "label is out of range",
            where=where,
            expected=f"0 to {len(names) - 1}",
            found=text,
            do="Correct the row or task.labels",
        )
    raise InputError(
        "DST-3413", "label is not among the names", where=where, expected=", ".join(names), found=repr(text)[:60],
        do="Correct the row or task.labels",
    )  # fmt: skip


def tables(rows: Iterable[tuple[str, str | None]], split: str | None) -> Iterator[pa.Table]:
    """Rows of (text, label) as tables of `SCHEMA`."""
    texts: list[str] = []
    labels: list[str | None] = []
    characters = 0
    for text, label in rows:
        texts.append(text)
        labels.append(label)
        characters += len(text)
        if len(texts) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield _table(texts, labels, split)
            texts, labels, characters = [], [], 0
    if texts:
        yield _table(texts, labels, split)


def _table(texts: list[str], labels: list[str | None], split: str | None) -> pa.Table:
    return pa.Table.from_arrays(
        [pa.array(texts, pa.string()), pa.array(labels, pa.string()), pa.array([split] * len(texts), pa.string())], schema=SCHEMA
    )
