"""One root, local or remote, under which every artifact lives; and the one way files get there.

A file appears under its name only when it is whole: locally it is written beside, synced and renamed; object stores make an upload
visible at once. Remote files are read through a copy in the node's cache (`cache`), fetched once per node.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow.fs as pafs
from safetensors import SafetensorError

from distillation import cache
from distillation.cache import TEMPORARY
from distillation.errors import InputError, SecurityError, StorageError
from distillation.places import filesystem as filesystem

CHUNK_BYTES = 8 << 20
"""Of a file that is copied from or to an object store: one request each."""


class Storage:
    """Files by their path relative to a root. Picklable: workers get it by value."""

    def __init__(self, uri: str) -> None:
        self._filesystem, self.root = filesystem(uri)
        self.is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        # Absolute, because workers start in another folder.
        self.uri = self.root if self.is_local else uri

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    @property
    def arrow(self) -> pafs.FileSystem:
        """The pyarrow filesystem, for libraries that take one."""
        return self._filesystem

    def path(self, relative: str = "") -> str:
        """Full path inside the file system; refuses to leave the root."""
        parts = [p for p in relative.split("/") if p]
        if ".." in parts or relative.startswith("/") or "\0" in relative:
            raise SecurityError("DST-9003", "a path leaves the storage", where=repr(relative))
        return "/".join([self.root.rstrip("/"), *parts])

    def exists(self, relative: str) -> bool:
        self._look_again(relative)
        with _storage_errors(self.path(relative), "read"):
            info = self._filesystem.get_file_info(self.path(relative))
        return bool(info.type != pafs.FileType.NotFound)

    def list(self, relative: str) -> list[str]:
        """Sorted names directly under a folder, without files that are still being written; empty where there is no folder."""
        return sorted(self.sizes(relative))

    def sizes(self, relative: str) -> dict[str, int]:
        """Bytes of everything directly under a folder by its name, of folders 0; what `list` leaves out is left out."""
        selector = pafs.FileSelector(self.path(relative), allow_not_found=True)
        with _storage_errors(self.path(relative), "read"):
            infos = self._filesystem.get_file_info(selector)
        return {info.base_name: info.size or 0 for info in infos if not info.base_name.startswith(TEMPORARY)}

    def read(self, relative: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        self._look_again(relative)
        with _storage_errors(self.path(relative), "read"):
            try:
                return self._read(relative)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                return self._read(relative)  # another node of a network file system has just replaced it

    def _read(self, relative: str) -> bytes:
        with self._filesystem.open_input_stream(self.path(relative)) as stream:
            return bytes(stream.read())

    def _look_again(self, relative: str) -> None:
        """NFS remembers for up to a minute that a name was not there. To open its folder makes it ask the server whether that changed."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.close(os.open(os.path.dirname(self.path(relative)), os.O_RDONLY | os.O_DIRECTORY))

    def write(self, relative: str, content: bytes) -> None:
        with self.writing(relative) as path:
            path.write_bytes(content)

    @contextlib.contextmanager
    def writing(self, relative: str) -> Iterator[Path]:
        """A local path to write one file at; it appears under its name when the block ends well, and leaves no trace otherwise.

        Of errors in the block only those about that file, or a full disk, become a StorageError; others are the caller's and stay.
        """
        target = self.path(relative)
        folder = Path(target).parent if self.is_local else cache.folder_of(self.uri)
        beside = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with _storage_errors(target, "written"):
                folder.mkdir(parents=True, exist_ok=True)
            with _block_errors(target, beside):
                yield beside
            assert beside.is_file(), "the block wrote no file"
            with _storage_errors(target, "written"):
                if self.is_local:
                    _sync(beside)
                    os.replace(beside, target)
                    _sync(folder)
                else:
                    # Not pyarrow's copy_files: it drops what an upload says last.
                    with open(beside, "rb") as file, self._filesystem.open_output_stream(target) as stream:
                        shutil.copyfileobj(file, stream, CHUNK_BYTES)
                    self._forget(relative)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()

    @contextlib.contextmanager
    def writing_folder(self, relative: str, last: str) -> Iterator[Path]:
        """Like `writing`, for a folder of files. Remotely the file named `last` is uploaded last and so marks the folder as whole.

        An existing folder of that name is replaced: nobody ever sees a mixture of the two, but for a moment there may be neither.
        """
        target = self.path(relative)
        parent = Path(target).parent if self.is_local else cache.folder_of(self.uri)
        beside = parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with _storage_errors(target, "written"):
                beside.mkdir(parents=True)
            with _block_errors(target, beside):
                yield beside
            files = sorted((p for p in beside.rglob("*") if p.is_file()), key=lambda p: (p.name == last, str(p)))
            if self.is_local:
                with _storage_errors(target, "written"):
                    for path in [*files, *(p for p in beside.rglob("*") if p.is_dir()), beside]:
                        _sync(path)
                    _replace_folder(beside, target)
                    _sync(parent)
            else:
                self.delete(f"{relative}/{last}")
                self.delete(relative)
                for file in files:
                    with self.writing(f"{relative}/{file.relative_to(beside).as_posix()}") as copy:
                        shutil.copyfile(file, copy)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def fetch(self, relative: str, size: int | None = None, checksum: str | None = None, *, again: bool = False) -> Path:
        """Local path of a file: itself, or its copy in the node's cache.

        A copy of another size or checksum is fetched again, with `again` any copy is. It is not said whether what was fetched is as expected.
        However many processes of a node ask at once, one fetches. Raises FileNotFoundError, and StorageError where there is no room.
        """
        source = self.path(relative)
        if self.is_local:
            if not os.path.isfile(source):
                raise FileNotFoundError(source)
            return Path(source)
        copy = cache.folder_of(self.uri) / relative
        if not again and size is not None and checksum is not None and cache.is_checked(copy, size, checksum):
            return copy
        with _storage_errors(source, "read"), cache.only_one(copy):
            if again or not cache.is_sound(copy, size, checksum):
                cache.require_space(copy.parent, size or 0)
                cache.make_room(size or 0)
                self._download(source, copy, checksum)
        return copy

    def _download(self, source: str, copy: Path, checksum: str | None) -> None:
        beside = copy.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            # Not pyarrow's copy_files: it asks the server once more for the size of a file.
            with self._filesystem.open_input_stream(source) as stream, open(beside, "wb") as file:
                shutil.copyfileobj(stream, file, CHUNK_BYTES)
            if checksum is not None:
                cache.check(beside, checksum)
            os.replace(beside, copy)
        finally:
            beside.unlink(missing_ok=True)

    def delete(self, relative: str) -> None:
        """Remove a file or folder and, for remote storage, its cached copy. Nothing there is fine."""
        with contextlib.suppress(FileNotFoundError), _storage_errors(self.path(relative), "written"):
            if self._filesystem.get_file_info(self.path(relative)).type == pafs.FileType.Directory:
                self._filesystem.delete_dir(self.path(relative))
            else:
                self._filesystem.delete_file(self.path(relative))
        self._forget(relative)

    def _forget(self, relative: str) -> None:
        """Drop the cached copy of a remote file or folder that has changed."""
        if not self.is_local:
            copy = cache.folder_of(self.uri) / relative
            shutil.rmtree(copy, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                copy.unlink()

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
    """Local path of a folder given by path or URI: itself, or a copy in the node's cache that is brought up to date."""
    system, root = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        if not os.path.isdir(root):
            raise InputError("DST-3001", "folder does not exist", where=root)
        return Path(root)
    storage, folder = Storage(uri), cache.folder_of(uri)
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    with _storage_errors(root, "read"):
        infos = [info for info in system.get_file_info(selector) if info.type == pafs.FileType.File]
    if not infos:
        raise InputError("DST-3001", "folder does not exist or is empty", where=uri)
    names = {info.path[len(root.rstrip("/")) + 1 :]: info for info in infos}
    for name, info in names.items():
        copy = folder / name
        stale = copy.is_file() and copy.stat().st_mtime_ns != info.mtime_ns
        # Time stamps are coarse: a file written just now could change again without showing it, so its copy counts as stale.
        stamp = info.mtime_ns if time.time_ns() - info.mtime_ns > 2_000_000_000 else 0
        os.utime(storage.fetch(name, info.size, again=stale), ns=(stamp, stamp))
    for copy in [p for p in folder.rglob("*") if p.is_file()]:
        if copy.relative_to(folder).as_posix() not in names and not copy.name.startswith(TEMPORARY):
            copy.unlink(missing_ok=True)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(beside: Path, target: str) -> None:
    """Give `beside` the name `target`. If another process does the same at once, one of the two stays."""
    old = f"{beside}-old"
    while True:
        try:
            os.rename(beside, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
            shutil.rmtree(old)


@contextlib.contextmanager
def _storage_errors(path: str, doing: Literal["read", "written"]) -> Iterator[None]:
    """Turn what a disk or object store refuses into a StorageError that names the path; FileNotFoundError is left to the caller."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refused(path, error, doing) from error


@contextlib.contextmanager
def _block_errors(path: str, beside: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        about_it = str(getattr(error, "filename", None) or "").startswith(str(beside)) and not isinstance(error, FileNotFoundError)
        if not (about_it or _is_full(error)):
            raise
        raise _refused(path, error, "written") from error


ADVICE = {
    "ACCESS_DENIED": "Give this node credentials that may read and write there: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role",
    "INVALID_ACCESS_KEY_ID": "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of this node, and AWS_ENDPOINT_URL_S3",
    "SIGNATURE_DOES_NOT_MATCH": "Check AWS_SECRET_ACCESS_KEY of this node, and its clock",
    "NO_SUCH_BUCKET": "Make the bucket first, or correct cluster.storage",
    "NETWORK_CONNECTION": "Check the endpoint (AWS_ENDPOINT_URL_S3 or endpoint_override), the region, and the network of this node",
    "HTTP status 5": "The server is overloaded or broken: wait and run again, it goes on where it stopped; AWS_MAX_ATTEMPTS lets it try longer",
    "SLOW_DOWN": "Too many requests at once: run again, it goes on where it stopped; AWS_MAX_ATTEMPTS lets it try longer",
}
"""What to do, by what the AWS library says."""


def _is_full(error: BaseException) -> bool:
    # pyarrow and safetensors do not always set errno.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _refused(path: str, error: BaseException, doing: Literal["read", "written"]) -> StorageError:
    if _is_full(error):
        do = "Free some space, or set cluster.storage to another place"
        return StorageError("DST-5001", "no space left", where=path, expected="room for the file", found=str(error), do=do)
    code, found = "DST-5002" if doing == "written" else "DST-5004", str(error).strip().splitlines()[0]
    do = next(
        (advice for sign, advice in ADVICE.items() if sign in found), "Check cluster.storage, its permissions and whether it can be reached"
    )
    return StorageError(code, f"storage cannot be {doing}", where=path, found=found, expected=f"a path that can be {doing}", do=do)
