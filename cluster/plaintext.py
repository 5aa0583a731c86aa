"""Plain text files as documents, read line by line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from cluster import files
from cluster.columns import as_text
from cluster.config import TextCorpus
from cluster.lines import text_lines
from cluster.reading import Row, Unit, tables
from distillation.config import TaskConfig
from distillation.errors import InputError

HEAD_LINES = 4096
"""Read of a file to learn how many documents it holds, and whether it is text at all."""
READER_VERSION = 1
"""Of the rules below: what they yield is part of a corpus's fingerprint."""


def describe(corpus: TextCorpus) -> dict[str, Any]:
    """Checksums of the files, after a look at the head of each. Raises InputError for one that is missing, empty or not UTF-8."""
    found = _files(corpus)
    for file in (file for group in found.values() for file in group):
        _documents_in_head(file, corpus.documents)
    identities = {split: sorted(files.identity(file) for file in group) for split, group in found.items()}
    return {"reader": READER_VERSION, "documents": corpus.documents, **identities}


def units(corpus: TextCorpus) -> list[Unit]:
    """One for each file."""
    return [
        Unit(
            "text", file.uri, split, bytes=_bytes(file),
            rows=_documents_in_head(file, corpus.documents), mode=corpus.documents,
        )
        for split, group in _files(corpus).items()
        for file in group
    ]  # fmt: skip


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of the documents of a file; none has a label. Raises InputError naming the line that is no text."""
    path = unit.path.partition("?")[0] if "://" in unit.path else unit.path
    with files.named(path), files.opened(unit.path) as stream:
        documents = cut(text_lines(stream, path), unit.mode)
        rows: Iterator[Row] = ((as_text(document, path), None) for document in documents)
        yield from tables(rows, unit.split, task)


def cut(lines: Iterator[str], mode: str) -> Iterator[str]:
    """Lines with their ends as documents: file, blank_line or heading. What holds nothing but white space is left out."""
    held: list[str] = []
    for line in lines:
        if (mode == "heading" and is_heading(line)) or (mode == "blank_line" and not line.strip()):
            if text := "".join(held).strip():
                yield text
            held = []
        held.append(line)
    if text := "".join(held).strip():
        yield text


def is_heading(line: str) -> bool:
    """Whether a line is a title as WikiText writes it: " = Title = ", but not " = = Section = = "."""
    text = line.strip()
    inner = text[2:-2].strip()
    return text.startswith("= ") and text.endswith(" =") and inner != "" and not (inner.startswith("= ") or inner.endswith(" ="))


def _files(corpus: TextCorpus) -> dict[str, list[files.File]]:
    named = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    return {split: files.find(patterns, files.PLAIN) for split, patterns in named.items() if not isinstance(patterns, float)}


def _documents_in_head(file: files.File, mode: str) -> float:
    """Roughly how many documents a file holds. Raises InputError where its head is not text, or blank."""
    with files.named(file.path), files.opened(file.uri) as stream:
        head = list(islice(text_lines(stream, file.path), HEAD_LINES))
    size = sum(len(line.encode()) for line in head)
    documents = sum(1 for _ in cut(iter(head), mode))
    if not documents and len(head) < HEAD_LINES:
        raise InputError("DST-3405", "file is empty", where=file.path, expected="text", found="white space")
    if mode == "file" or len(head) < HEAD_LINES:
        return max(1, documents)
    return max(1.0, documents * _bytes(file) / size)


def _bytes(file: files.File) -> int:
    return file.size * (4 if file.path.endswith(".gz") else 1)
