"""An append-only file of JSON lines with one writer at a time: what a journal and a search's ledger are kept in.

A line is written and flushed at once, so it survives a killed process. A torn last line, of a process killed in the middle of it, is cut off.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from distillation.errors import ConflictError, InputError

Event = dict[str, Any]
"""A line: `kind`, `seq` (its number), `time` (milliseconds since 1970), and what the kind brings."""


class LogFile:
    """Thread-safe; not picklable. Raises ConflictError if another process has it open for writing.

    `lock` is held while a line is written; whoever decides by what was written before holds it too.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        self.count = 0
        self.lock = threading.RLock()
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConflictError(
                "DST-8101", "another process records this job", where=str(self.path), do="Wait until it has ended, or stop it"
            ) from None

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Writing afterwards is an error."""
        self._file.close()

    def replay(self) -> Iterator[Event]:
        """Every line so far, once, before anything is written. Raises InputError if one in the middle cannot be read."""
        offset = 0
        try:
            for event, offset in read(self.path):  # noqa: B007
                self.count += 1
                yield event
        except InputError:
            self.close()
            raise
        self._file.truncate(offset)

    def write(self, kind: str, **content: Any) -> Event:
        with self.lock:
            event = {"seq": self.count, "time": int(time.time() * 1000), "kind": kind, **content}
            self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
            self.count += 1
            return event


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Lines from a byte offset on, each with the offset behind it; needs no lock. A line that is not whole is not there yet.

    Raises InputError (DST-3501) where a line cannot be read, FileNotFoundError.
    """
    with path.open("rb") as file:
        file.seek(offset)
        before: int | None = None
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
                event["kind"], event["time"]
                if before is not None and event["seq"] != before + 1:
                    raise ValueError("a line is missing")
                before = int(event["seq"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "DST-3501", "tracking journal was altered", where=f"{path} at byte {offset}", found=repr(line[:60]),
                    do="Move the file away and run again: finished work is found, recording starts anew",
                ) from error  # fmt: skip
            offset += len(line)
            yield event, offset
