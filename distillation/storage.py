"""One root, local or remote, under which every artifact lives; and the one way files get there.

A file appears under its name only when it is whole: locally it is written beside, synced and renamed; object stores make an upload
visible at once. Remote files are read through a copy in the node's cache ($DISTILLERY_CACHE), fetched once per node.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from distillation.errors import ConfigError, InputError, SecurityError, StorageError

SCHEMES = ("s3", "gs", "abfs", "hdfs")
"""What may stand before :// in a path, besides a plain local path."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a path or URI, and the path inside it. Only `SCHEMES` and local paths are allowed."""
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme[1].lower() not in SCHEMES:
        raise SecurityError(
            "DST-9001", "scheme of a path is not allowed", where=uri, expected="a local path or " + ", ".join(f"{s}://" for s in SCHEMES),
            found=f"{scheme[1]}://", do="Copy the data to one of these first",
        )  # fmt: skip
    if "@" in uri.split("://", 1)[1].split("/", 1)[0]:
        raise SecurityError("DST-9002", "a path must not carry a password", do="Give credentials through the environment of the nodes")
    try:
        return pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise ConfigError("DST-2003", "path cannot be understood", where=uri, found=str(error), expected="scheme://bucket/path") from error


class Storage:
    """Files by their path relative to a root. Picklable: workers get it by value."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._filesystem, self.root = filesystem(uri)
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def path(self, relative: str = "") -> str:
        """Full path inside the file system; refuses to leave the root."""
        parts = [p for p in relative.split("/") if p]
        if ".." in parts or relative.startswith("/") or "\0" in relative:
            raise SecurityError("DST-9003", "a path leaves the storage", where=repr(relative))
        return "/".join([self.root.rstrip("/"), *parts])

    def exists(self, relative: str) -> bool:
        info = self._filesystem.get_file_info(self.path(relative))
        return bool(info.type != pafs.FileType.NotFound)

    def list(self, relative: str) -> list[str]:
        """Sorted names directly under a folder; empty where there is no folder."""
        selector = pafs.FileSelector(self.path(relative), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def read(self, relative: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        with self._filesystem.open_input_stream(self.path(relative)) as stream:
            return bytes(stream.read())

    def write(self, relative: str, content: bytes) -> None:
        with self.writing(relative) as path:
            path.write_bytes(content)

    @contextlib.contextmanager
    def writing(self, relative: str) -> Iterator[Path]:
        """A local path to write one file at; it appears under its name when the block ends well, and leaves no trace otherwise."""
        target = self.path(relative)
        folder = Path(target).parent if self.is_local else _cache_folder(self.uri)
        beside = folder / f".tmp-{uuid.uuid4().hex}"
        try:
            with _storage_errors(target):
                folder.mkdir(parents=True, exist_ok=True)
                yield beside
                _sync(beside)
                if self.is_local:
                    os.replace(beside, target)
                    _sync(folder)
                else:
                    pafs.copy_files(str(beside), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self._filesystem)
        finally:
            beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing_folder(self, relative: str, last: str) -> Iterator[Path]:
        """Like `writing`, for a folder of files. Remotely the file named `last` is uploaded last and so marks the folder as whole.

        An existing folder of that name is replaced.
        """
        target = self.path(relative)
        parent = Path(target).parent if self.is_local else _cache_folder(self.uri)
        beside = parent / f".tmp-{uuid.uuid4().hex}"
        try:
            with _storage_errors(target):
                beside.mkdir(parents=True)
                yield beside
                files = sorted((p for p in beside.rglob("*") if p.is_file()), key=lambda p: (p.name == last, str(p)))
                if self.is_local:
                    for file in files:
                        _sync(file)
                    _sync(beside)
                    if os.path.exists(target):
                        old = f"{beside}-old"
                        os.rename(target, old)
                        os.rename(beside, target)
                        shutil.rmtree(old)
                    else:
                        os.rename(beside, target)
                    _sync(parent)
                else:
                    for file in files:
                        with self.writing(f"{relative}/{file.relative_to(beside).as_posix()}") as path:
                            shutil.copyfile(file, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def fetch(self, relative: str, size: int | None = None) -> Path:
        """Local path of a file: itself, or its copy in the node's cache. A copy of another size than `size` is fetched again.

        Raises FileNotFoundError.
        """
        source = self.path(relative)
        if self.is_local:
            if not os.path.isfile(source):
                raise FileNotFoundError(source)
            return Path(source)
        copy = _cache_folder(self.uri) / relative
        if not copy.is_file() or (size is not None and copy.stat().st_size != size):
            copy.parent.mkdir(parents=True, exist_ok=True)
            beside = copy.with_name(f".tmp-{uuid.uuid4().hex}")
            try:
                with _storage_errors(str(copy)):
                    pafs.copy_files(source, str(beside), source_filesystem=self._filesystem, destination_filesystem=pafs.LocalFileSystem())
                    os.replace(beside, copy)
            finally:
                beside.unlink(missing_ok=True)
        return copy

    def delete(self, relative: str) -> None:
        """Remove a file or folder and, for remote storage, its cached copy. Nothing there is fine."""
        with contextlib.suppress(FileNotFoundError):
            if self._filesystem.get_file_info(self.path(relative)).type == pafs.FileType.Directory:
                self._filesystem.delete_dir(self.path(relative))
            else:
                self._filesystem.delete_file(self.path(relative))
        if not self.is_local:
            shutil.rmtree(_cache_folder(self.uri) / relative, ignore_errors=True)
            with contextlib.suppress(OSError):
                (_cache_folder(self.uri) / relative).unlink()

    def require_writable(self, need_bytes: int = 0) -> None:
        """Write, read back and delete a small file; for local storage also compare free space. Raises StorageError."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"distillery")
        try:
            if self.read(probe) != b"distillery":
                raise StorageError("DST-5003", "storage returned other bytes than were written", where=self.uri)
        finally:
            self.delete(probe)
        if self.is_local and (free := shutil.disk_usage(self.root).free) < need_bytes:
            raise StorageError(
                "DST-5001", "not enough space", where=self.root, expected=f"{need_bytes / 1e9:.2f} GB free", found=f"{free / 1e9:.2f} GB",
                do="Free some, or set cluster.storage to a larger disk",
            )  # fmt: skip


def fetch_tree(uri: str) -> Path:
    """Local path of a folder given by path or URI: itself, or a fresh copy in the node's cache."""
    system, root = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        if not os.path.isdir(root):
            raise InputError("DST-3001", "folder does not exist", where=root)
        return Path(root)
    storage = Storage(uri)
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    infos = [info for info in system.get_file_info(selector) if info.type == pafs.FileType.File]
    if not infos:
        raise InputError("DST-3001", "folder does not exist or is empty", where=uri)
    for info in infos:
        storage.fetch(info.path[len(root.rstrip("/")) + 1 :], info.size)
    return _cache_folder(uri)


def _cache_folder(uri: str) -> Path:
    base = os.environ.get("DISTILLERY_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distillery")
    return Path(os.path.expanduser(base)) / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Turn what a disk or object store refuses into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        raise StorageError(
            "DST-5001" if full else "DST-5002", "no space left" if full else "storage cannot be written", where=path,
            expected="room for the file" if full else "a writable path", found=str(error),
            do="Free some space, or set cluster.storage to another place" if full else "Check cluster.storage and its permissions",
        ) from error  # fmt: skip
