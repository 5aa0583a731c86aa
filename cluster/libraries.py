"""Installed Python libraries: where their source lies and which version it is. Source files are read, never imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from distillation.errors import InputError

STDLIB = "stdlib"
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def versions(packages: Sequence[str]) -> dict[str, str]:
    """What stands for the source of every library in a fingerprint. Raises InputError for one that is not installed."""
    owners = importlib.metadata.packages_distributions()
    found = {}
    for package in packages:
        root = root_of(package)
        if package == STDLIB:
            found[package] = platform.python_version()
        elif owners.get(package):
            found[package] = " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(owners[package])))
        else:
            listed = [(relative(path, root), path.stat().st_size) for path in source_files(root)]
            found[package] = hashlib.sha256(repr(listed).encode()).hexdigest()[:32]
    return found


def root_of(package: str) -> Path:
    """Folder of a library, or its file if it is a single one. Raises InputError if it is not installed or has no source."""
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


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def source_files(root: Path) -> list[Path]:
    """Python files below a library's folder without its tests, in an order given by a hash of their path."""
    if root.is_file():
        return [root]
    found = [p for p in root.rglob("*.py") if p.is_file() and not SKIPPED.intersection(p.relative_to(root).parts[:-1])]
    return sorted(found, key=lambda p: hashlib.sha256(relative(p, root).encode()).digest())
