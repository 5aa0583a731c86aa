"""Real text that every machine has: first paragraphs of docstrings of installed Python code, labelled with the library's name.

Source files are parsed with `ast`, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.config import DocstringsCorpus
from cluster.reading import Unit, tables
from distillation.errors import InputError

STDLIB = "stdlib"
LEAST_WORDS = 5
SOURCE_BYTES = 10 << 20
"""Of a library, roughly."""
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
READER_VERSION = 1
"""Of the rules below: what they yield is part of a corpus's fingerprint."""


def describe(corpus: DocstringsCorpus) -> dict[str, Any]:
    """Version of Python and of every library. Raises InputError for one that is not installed."""
    owners = importlib.metadata.packages_distributions()
    versions = {}
    for package in corpus.packages:
        root = _root(package)
        if package == STDLIB:
            versions[package] = platform.python_version()
        elif owners.get(package):
            versions[package] = " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(owners[package])))
        else:
            listed = [(_relative(path, root), path.stat().st_size) for path in _files(root)]
            versions[package] = hashlib.sha256(repr(listed).encode()).hexdigest()[:32]
    return {"reader": READER_VERSION, "python": platform.python_version(), "packages": versions, "per_package": corpus.per_package}


def units(corpus: DocstringsCorpus) -> list[Unit]:
    """One for each library."""
    return [Unit("docstrings", package, None, stop=corpus.per_package, bytes=SOURCE_BYTES) for package in corpus.packages]


def read(unit: Unit) -> Iterator[pa.Table]:
    """Tables of up to `unit.stop` different paragraphs of one library. Files come in an order given by a hash of their path."""
    return tables(((text, unit.path) for text in _paragraphs(unit.path, unit.stop)), None)


def _paragraphs(package: str, most: int) -> Iterator[str]:
    own_name = _own_name(package)
    root = _root(package)
    seen: set[str] = set()
    for path in _files(root):
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


def _root(package: str) -> Path:
    """Folder of a library, or its file if it is a single one."""
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    raise InputError(
        "DST-3420", "library is not installed", where=f"corpus.packages: {package}", expected="the name of an importable Python library",
        found="none of that name" if spec is None else "no Python source", do="Install it or take it out of corpus.packages",
    )  # fmt: skip


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = [p for p in root.rglob("*.py") if p.is_file() and not SKIPPED.intersection(p.relative_to(root).parts[:-1])]
    return sorted(found, key=lambda p: hashlib.sha256(_relative(p, root).encode()).digest())
