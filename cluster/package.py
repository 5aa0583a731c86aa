"""The folder that travels with a job: its file and Distillery's own code. Made from a list of what may be in it, so nothing else ever is."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distillation.errors import ConfigError, SecurityError

CODE = {
    "distillation": ("*.py",), "cluster": ("*.py",), "tuning": ("*.py", "*.css", "*.js"), "jobs": ("*.py", "recipes/*.yaml"),
}  # fmt: skip
"""Packages, and what of each may travel."""

MAX_BYTES = 5_000_000
"""Of a package. Ray allows a hundred times more, and then every node fetches it."""


@dataclass(frozen=True)
class Package:
    """A folder to be the working directory of a job."""

    folder: Path
    files: int
    bytes: int


def build(name: str, texts: Mapping[str, str], *, with_code: bool) -> Package:
    """Write the package of a name anew. texts: further files by name. Raises ConfigError if it is too large.

    It stays in the cache of this machine, so that the command that is printed can be run.
    """
    contents = {**(dict(code()) if with_code else {}), **{file: text.encode() for file, text in texts.items()}}
    size = sum(map(len, contents.values()))
    if size > MAX_BYTES:
        largest = max(contents, key=lambda file: len(contents[file]))
        raise ConfigError(
            "DST-2063", "package of a job is too large", where=name, expected=f"at most {MAX_BYTES:,} bytes",
            found=f"{size:,} bytes; the largest file is {largest}", do="Only code travels: put data into the storage",
        )  # fmt: skip
    target = home() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as beside:
        (Path(beside) / "new").mkdir()
        for file, content in contents.items():
            path = Path(beside) / "new" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if target.exists():
            os.rename(target, Path(beside) / "old")
        os.rename(Path(beside) / "new", target)
    return Package(target, len(contents), size)


def remove(package: Package) -> None:
    shutil.rmtree(package.folder, ignore_errors=True)


def home() -> Path:
    """Where packages lie on this machine."""
    base = os.environ.get("DISTILLERY_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distillery")
    return Path(os.path.expanduser(base)) / "submit"


def code() -> Iterator[tuple[str, bytes]]:
    """(path, content) of the code that runs here, sorted. Raises SecurityError for a link that leads out of it."""
    root = Path(__file__).resolve().parent.parent
    for package, patterns in CODE.items():
        found = {path for pattern in patterns for path in (root / package).glob(pattern if "/" in pattern else f"**/{pattern}")}
        for path in sorted(found):
            relative = path.relative_to(root).as_posix()
            if not path.resolve().is_relative_to(root / package):
                raise SecurityError(
                    "DST-9021", "a link among the code leads out of it", where=relative, found=str(path.resolve()),
                    do="Remove it: what it points at would travel to the cluster",
                )  # fmt: skip
            if path.is_file():
                yield relative, path.read_bytes()


def code_fingerprint() -> str:
    """Of the code that runs here; equal where the same code is installed."""
    digest = hashlib.sha256()
    for path, content in code():
        digest.update(f"{path} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]
