"""Copies of remote files on this node: fetched once, checked once, shared by all its processes.

A copy is written beside its name and renamed when it is whole, under a lock that the kernel frees when its holder dies. One whose checksum
was right gets a time stamp that follows from that checksum. Whoever writes to it later changes the stamp, so it is checked again: the stamp
says "checked, and untouched since" without a second file that could lie.

    $DISTILLERY_CACHE          folder; else distillery in $XDG_CACHE_HOME or ~/.cache
    $DISTILLERY_CACHE_BYTES    most that copies may take; beyond it those go first that were used longest ago
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import xxhash

from distillation.errors import ConfigError, StorageError

TEMPORARY = ".tmp-"
"""How names of files begin that are still being written, or were when a process died."""

LOCKS = 256
"""Files that share a lock wait for each other in vain now and then; a lock for each would leave a million of them."""

GRACE = 600.0
"""Seconds after its last use in which a copy is not removed: who fetched it may not have opened it yet."""

ABANDONED = 86_400.0
"""Seconds after which an unfinished file is taken for one whose process died."""

_log = logging.getLogger("distillery")


def root() -> Path:
    base = os.environ.get("DISTILLERY_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distillery")
    return Path(os.path.expanduser(base))


def folder_of(uri: str) -> Path:
    """Where copies of what lies under a URI are kept."""
    return root() / hashlib.sha256(uri.encode()).hexdigest()[:16]


def checksum(path: Path) -> str:
    """xxh3_128 of a file, read in blocks so that the pages do not count as this process's memory."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remembered_checksum(path: Path) -> str:
    """`checksum`, found in the node's cache where the file is the same as when it was last asked: inode, size, and times to the nanosecond.

    The time of change cannot be set back, so whoever writes to the file, or puts another in its place, is noticed.
    """
    status = path.stat()
    state = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = root() / ".checksums" / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
        if isinstance(known, dict) and known.get("state") == state:
            return str(known["checksum"])
    found = checksum(path)
    # Clocks of file systems are coarse: a file written just now could change again without showing it.
    if time.time_ns() - max(state[3:]) > 2_000_000_000:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            beside = note.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            beside.write_text(json.dumps({"state": state, "checksum": found}))
            os.replace(beside, note)
    return found


# ----------------------------------------------------------------------------------------------------------------- stamps


def _stamp(checksum_: str) -> int:
    """Whole seconds, which every file system keeps, in the years 1990 to 2007: no file that is written now has such a time."""
    return (631_152_000 + int(checksum_[:8], 16) % (1 << 29)) * 1_000_000_000


def is_checked(copy: Path, size: int, checksum_: str) -> bool:
    """Whether some process of this node found this checksum, and nobody wrote to the copy since. Notes that it is used."""
    with contextlib.suppress(OSError):
        status = copy.stat()
        if status.st_size == size and status.st_mtime_ns == _stamp(checksum_):
            if time.time() - status.st_atime > GRACE / 4:
                os.utime(copy, ns=(time.time_ns(), status.st_mtime_ns))
            return True
    return False


def check(path: Path, checksum_: str) -> bool:
    """Compare the content with a checksum, and stamp the copy if it is right."""
    before = path.stat()
    if checksum(path) != checksum_:
        return False
    if path.stat().st_mtime_ns == before.st_mtime_ns:  # else it was written to meanwhile
        os.utime(path, ns=(time.time_ns(), _stamp(checksum_)))
    return True


def is_sound(copy: Path, size: int | None, checksum_: str | None) -> bool:
    """Whether a copy can be used; one of another size or content is said to be damaged. Without a checksum the size has to do."""
    if checksum_ is not None and size is not None and is_checked(copy, size, checksum_):
        return True
    if not copy.is_file():
        return False
    if (size is None or copy.stat().st_size == size) and (checksum_ is None or check(copy, checksum_)):
        return True
    _log.warning("a damaged copy is fetched again: %s", copy)
    return False


# ------------------------------------------------------------------------------------------------------------------ locks


@contextlib.contextmanager
def only_one(copy: Path) -> Iterator[None]:
    """One process and thread of this node at a time for a file. Where the cache lies on a file system without locks, several."""
    folder = root() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    number = int(hashlib.sha256(str(copy).encode()).hexdigest()[:8], 16) % LOCKS
    descriptor = os.open(folder / f"{number:02x}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)  # frees the lock; so does the kernel when the process dies


# ------------------------------------------------------------------------------------------------------------------ space


def require_space(folder: Path, need: int) -> None:
    """Raise StorageError where the disk of a folder has less than `need` bytes left. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < need:
        raise StorageError(
            "DST-5001", "not enough space", where=str(folder), expected=f"{need / 1e9:.2f} GB free", found=f"{free / 1e9:.2f} GB",
            do="Free some, or set DISTILLERY_CACHE to a folder on a larger disk of this node",
        )  # fmt: skip


def limit() -> int | None:
    """Bytes that copies may take. Raises ConfigError."""
    text = os.environ.get("DISTILLERY_CACHE_BYTES", "")
    if text and not (text.isdecimal() and int(text)):
        raise ConfigError("DST-2091", "size of the cache is no number", where="DISTILLERY_CACHE_BYTES", expected="bytes", found=text)
    return int(text) if text else None


def _ctime(status: os.stat_result) -> float:
    return status.st_ctime


def make_room(need: int) -> None:
    """Remove the copies that were used longest ago until `need` more bytes stay below the limit; also what dead processes left.

    Removing what another process has mapped is harmless: its pages stay until it ends. What is used now or was just fetched is kept,
    so the limit can be passed for as long as more than it is in use.
    """
    most = limit()
    if most is None:
        return
    now, total, found = time.time(), need, []
    for path in root().rglob("*"):
        with contextlib.suppress(OSError):
            if path.parent.name in (".locks", ".checksums") or not path.is_file():
                continue
            status = path.stat()
            total += status.st_size
            idle = now - max(status.st_atime, _ctime(status))
            if idle > (ABANDONED if path.name.startswith(TEMPORARY) else GRACE):
                found.append((status.st_atime, status.st_size, path))
    for _, size, path in sorted(found):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
