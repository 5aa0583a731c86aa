"""Source code of installed Python: whole files for language models, or words with what each is in its place. Read, never imported."""

from __future__ import annotations

import builtins
import io
import keyword
import platform
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.columns import row_of
from cluster.config import SourceCorpus
from cluster.kinds import inputs_of, label_of
from cluster.libraries import relative, root_of, source_files, versions
from cluster.reading import Row, Unit, tables
from distillation.config import TaskConfig

ROW_WORDS = 60
LEAST_WORDS = 4
LITERAL = 16
"""Characters of a string or comment that are kept: what it is shows at its start."""
ROW_BYTES = 500
"""Of source, roughly, that give a row of words."""
READER_VERSION = 1
"""Of the rules below: what they yield is part of a corpus's fingerprint."""

BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_") and not keyword.iskeyword(name))
OPEN, CLOSE = frozenset("([{"), frozenset(")]}")
STARTS = frozenset(name for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name))
ENDS = frozenset(name for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name))
"""Python 3.12 and later cut f-strings into pieces; here they are one word, as before."""


def describe(corpus: SourceCorpus) -> dict[str, Any]:
    """Version of Python and of every library. Raises InputError for one that is not installed."""
    found = versions(corpus.packages)
    rules = {"reader": READER_VERSION, "python": platform.python_version()}
    return {**rules, "packages": found, "per_package": corpus.per_package, "kind": corpus.kind}


def units(corpus: SourceCorpus) -> list[Unit]:
    """One for each library."""
    made = []
    for package in corpus.packages:
        chosen = source_files(root_of(package))[: corpus.per_package]
        size = sum(path.stat().st_size for path in chosen)
        rows = len(chosen) if corpus.kind == "documents" else max(1, size // ROW_BYTES)
        made.append(Unit("source", package, None, stop=corpus.per_package, bytes=size, rows=rows, mode=corpus.kind))
    return made


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of the first `unit.stop` files of a library. Files come in an order given by a hash of their path."""
    return tables(_rows(unit, task), None, task)


def _rows(unit: Unit, task: TaskConfig) -> Iterator[Row]:
    root = root_of(unit.path)
    (column,), label = inputs_of(task), label_of(task) or ""
    for path in source_files(root)[: unit.stop]:
        if (text := _text(path)) is None:
            continue
        where = f"{unit.path}, {relative(path, root)}"
        if unit.mode == "documents":
            yield row_of(task, {column: text, label: unit.path}, where)
            continue
        for words, kinds in rows_of_words(text):
            yield row_of(task, {column: words, label: kinds}, where)


def _text(path: Path) -> str | None:
    """A source file in the encoding that it names; None if it is in none: libraries ship templates and broken files for their tests."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content := path.read_bytes()).readline)
        text = io.TextIOWrapper(io.BytesIO(content), encoding).read()
        text.encode()
    except (SyntaxError, UnicodeError, LookupError):
        return None
    return text


# ---------------------------------------------------------------------------------------------------------------- words


def rows_of_words(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Words and their classes: a row for each top-level function or class, cut at the end of a statement after at most 60 words.

    Other top-level statements share rows. Nothing for a file that this Python cannot cut into tokens.
    """
    try:
        statements = list(_statements(text))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return
    row: list[tuple[str, str]] = []
    for opens, words in statements:
        if row and (opens or len(row) + len(words) > ROW_WORDS):
            yield from _row(row)
            row = []
        while len(words) > ROW_WORDS:
            yield from _row(words[:ROW_WORDS])
            words = words[ROW_WORDS:]
        row = row + words
    yield from _row(row)


def _row(words: list[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    if len(words) >= LEAST_WORDS:
        yield [word for word, _ in words], [kind for _, kind in words]


def _statements(text: str) -> Iterator[tuple[bool, list[tuple[str, str]]]]:
    """Logical lines: whether one begins a top-level function or class (with its decorators), and its words with their classes.

    Raises TokenError or SyntaxError where there is something that is no Python.
    """
    lines = list(io.StringIO(text))
    line, depth, decorated, inside = _Line(), 0, False, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name == "ERRORTOKEN":
            raise tokenize.TokenError(token.string, token.start)
        if name in STARTS or name in ENDS:
            inside += 1 if name in STARTS else -1
            if name in STARTS and inside == 1:
                line.add("STRING", _literal(lines[token.start[0] - 1][token.start[1] :]))
        elif inside or name in ("NL", "ENCODING"):
            continue
        elif name in ("INDENT", "DEDENT"):
            depth += 1 if name == "INDENT" else -1
        elif name in ("NEWLINE", "ENDMARKER"):
            if line.words:
                first = line.first
                begins = depth == 0 and first in ("def", "class", "async", "@")
                yield begins and not decorated, line.words
                decorated = depth == 0 and first == "@"
            line = _Line()
        else:
            line.add(name, token.string)


def _literal(text: str) -> str:
    return " ".join(text.splitlines()[0][:LITERAL].split())


@dataclass
class _Line:
    """Words of a logical line, each with its class once the word after it is known."""

    words: list[tuple[str, str]] = field(default_factory=list)
    brackets: list[str] = field(default_factory=list)
    """Open ones; those of the parameters of a function are "def", those of a call "call"."""

    @property
    def first(self) -> str:
        return next((word for word, kind in self.words if kind != "COMMENT"), "")

    def add(self, name: str, word: str) -> None:
        if name in ("STRING", "COMMENT"):
            self.words.append((_literal(word), name))
        elif name == "NUMBER":
            self.words.append((word[:LITERAL], name))
        elif name == "NAME":
            self.words.append((word, self._name(word)))
        else:
            self._operator(word)
            self.words.append((word, "OP"))

    def _operator(self, word: str) -> None:
        if word in OPEN:
            kind = self.words[-1][1] if self.words else ""
            called = word == "(" and kind in ("NAME", "ATTRIBUTE", "BUILTIN", "FUNCTION", "CLASS")
            self.brackets.append("def" if kind == "FUNCTION" and word == "(" else "call" if called else word)
        elif word in CLOSE and self.brackets:
            self.brackets.pop()
        elif word == "=" and self.words and self._in("call") and self.words[-1][1] in ("NAME", "BUILTIN") and self._begins(1):
            self.words[-1] = (self.words[-1][0], "ARGUMENT")

    def _name(self, word: str) -> str:
        """What a name is: decided by the words before it, so that it cannot be told from the name alone."""
        before = self.words[-1][0] if self.words else ""
        if keyword.iskeyword(word):
            return "KEYWORD"
        if before in ("def", "class"):
            return "FUNCTION" if before == "def" else "CLASS"
        if self.first in ("import", "from"):
            return "MODULE"
        if before == ".":
            return "ATTRIBUTE"
        if self._in("def") and self._begins(0):
            return "PARAMETER"
        return "BUILTIN" if word in BUILTINS else "NAME"

    def _in(self, kind: str) -> bool:
        return bool(self.brackets) and self.brackets[-1] == kind

    def _begins(self, back: int) -> bool:
        """Whether the word `back` places before the end of the line begins an entry in brackets; stars may stand before it."""
        place = len(self.words) - back - 1
        if place >= 1 and self.words[place][0] in ("*", "**"):
            place -= 1
        return place >= 0 and self.words[place][0] in ("(", ",")
