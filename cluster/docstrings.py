"""Real text that every machine has: first paragraphs of docstrings of installed Python code, labelled with the library's name.

Source files are parsed with `ast`, never imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.columns import as_label, as_text
from cluster.config import DocstringsCorpus
from cluster.kinds import label_of
from cluster.libraries import STDLIB, root_of, source_files, versions
from cluster.reading import Unit, tables
from distillation.config import TaskConfig

LEAST_WORDS = 5
SOURCE_BYTES = 10 << 20
"""Of a library, roughly."""
READER_VERSION = 2
"""Of the rules below: what they yield is part of a corpus's fingerprint."""


def describe(corpus: DocstringsCorpus) -> dict[str, Any]:
    """Version of Python and of every library. Raises InputError for one that is not installed."""
    found = versions(corpus.packages)
    return {"reader": READER_VERSION, "python": platform.python_version(), "packages": found, "per_package": corpus.per_package}


def units(corpus: DocstringsCorpus) -> list[Unit]:
    """One for each library."""
    return [Unit("docstrings", package, None, stop=corpus.per_package, bytes=SOURCE_BYTES) for package in corpus.packages]


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of up to `unit.stop` different paragraphs of one library. Files come in an order given by a hash of their path."""
    where = f"corpus.packages: {unit.path}"
    label = as_label(unit.path, getattr(task, "labels", None), where) if label_of(task) else None
    return tables(((as_text(text, where), label) for text in _paragraphs(unit.path, unit.stop)), None, task)


def _paragraphs(package: str, most: int) -> Iterator[str]:
    own_name = _own_name(package)
    seen: set[str] = set()
    for path in source_files(root_of(package)):
        for docstring in _docstrings(path):
            text = own_name.sub("library", " ".join(docstring.split("\n\n", 1)[0].split()))
            if len(text.split()) < LEAST_WORDS or text in seen or not text.isprintable():
                continue
            seen.add(text)
            yield text
            if len(seen) == most:
                return


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of one file; none if this Python cannot parse it: libraries ship templates and code for other versions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (found := ast.get_docstring(node)):
            yield found


def _own_name(package: str) -> re.Pattern[str]:
    """Where a library's own names stand in a text: they would give the label away.

    A long name is replaced anywhere (NumPy, pytorch, mlflow_client); a short one only where it is a word or a part of CamelCase
    (Ray, ray.get, RayActor, but not array).
    """
    names = {package, *importlib.metadata.packages_distributions().get(package, ())} - {STDLIB}
    pieces = [
        f"(?i:(?:py)?{re.escape(name)})"
        if len(name) >= 5
        else f"(?<![A-Za-z])(?i:{re.escape(name)})(?![a-z])|{re.escape(name.capitalize())}(?![a-z])"
        for name in sorted(names, key=lambda name: (-len(name), name))
    ]
    return re.compile("|".join(pieces) or r"(?!)")
