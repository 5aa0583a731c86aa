"""What is to be recorded of a job, as an append-only file of JSON lines. MLflow is a view of it (cluster/tracking.py).

Recording costs one write and one flush and never waits for a server; it survives a killed process. One process writes and delivers a
journal at a time: it holds the lock. The first line names the journal, so that two journals never share a run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distillation.errors import ConflictError, InputError

Scalar = str | int | float | bool | None
Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]

_log = logging.getLogger(__name__)


class Journal:
    """Runs by a stable key, such as "docstrings/L3-1a2b". Thread-safe; not picklable.

    Raises ConflictError if another process has it open, InputError if a line in the middle cannot be read.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConflictError(
                "DST-8101", "another process records this job", where=str(self.path), do="Wait until it has ended, or stop it"
            ) from None
        self._lock = threading.RLock()
        self.count = 0
        self._steps: dict[tuple[str, str], int] = {}
        self._params: dict[str, dict[str, str]] = {}
        self._times: dict[str, int] = {}
        self._unfinished: dict[str, None] = {}
        try:
            self.id = self._replay()
        except InputError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Recording afterwards is an error."""
        self._file.close()

    # ---------------------------------------------------------------------------------------------------------- record

    def run(
        self,
        key: str,
        *,
        name: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> None:
        """Declare a run below the run `parent`. The same key again is the same run, going on. `description` is Markdown."""
        assert "'" not in key, key
        assert parent is None or parent in self._times, f"parent {parent} of {key} was not declared"
        self._append("run", key, name=name, parent=parent, tags=dict(tags or {}), description=description)

    def params(self, key: str, flat: Mapping[str, Scalar]) -> None:
        """Settings of a run. A parameter is written once: another value for it is left out, with a warning."""
        with self._lock:
            known = self._params.get(key, {})
            changed = sorted(name for name, value in flat.items() if known.get(name, str(value)) != str(value))
            new = {name: str(value) for name, value in flat.items() if name not in known}
            if new:
                self._append("params", key, values=new)
        if changed:
            _log.warning("tracking: %s keeps the first value of %s", key, ", ".join(changed))

    def tags(self, key: str, values: Mapping[str, str]) -> None:
        """Notes on a run; the last value of a tag counts."""
        self._append("tags", key, values=dict(values))

    def metrics(self, key: str, values: Mapping[str, float], step: int) -> None:
        """Measurements at a step. A metric that already has this step or a later one is left out: a restarted worker repeats steps.

        MLflow turns infinity into 1.8e308, so values that are not finite become a tag "nonfinite/<metric>".
        """
        with self._lock:
            new = {name: float(value) for name, value in values.items() if step > self._steps.get((key, name), -1)}
            finite = {name: value for name, value in new.items() if math.isfinite(value)}
            odd = {name: str(value) for name, value in new.items() if name not in finite}
            if new:
                self._append("metrics", key, values=finite, step=step, nonfinite=odd)

    def file(self, key: str, path: Path, folder: str = "") -> None:
        """A file to show with the run, under `folder`. It is read at delivery, so it must stay where it is."""
        assert path.is_file(), path
        self._append("file", key, path=str(path.resolve()), folder=folder)

    def dataset(self, key: str, name: str, digest: str, source: str, context: str) -> None:
        """A data set that the run read. `digest`: a fingerprint; MLflow keeps its first 36 characters."""
        self._append("dataset", key, name=name, digest=digest, source=source, context=context)

    def model(self, key: str, folder: Path, *, name: str, input_example: Sequence[str], registered: str | None = None) -> None:
        """A text classifier as `save_pretrained` wrote it, read at delivery; also as a new version of the model `registered`."""
        assert (folder / "config.json").is_file(), folder
        assert (folder / "tokenizer_config.json").is_file(), folder
        self._append("model", key, folder=str(folder.resolve()), name=name, input_example=list(input_example), registered=registered)

    def finish(self, key: str, status: Status) -> None:
        self._append("finish", key, status=status)

    def finish_unfinished(self, status: Status) -> list[str]:
        """End every run that has not ended, at the time of its last event. Returns their keys."""
        keys = list(self._unfinished)
        for key in keys:
            self._append("finish", key, status=status, time=self._times[key])
        return keys

    # ------------------------------------------------------------------------------------------------------------ read

    def events(self, offset: int = 0, most: int = 2000) -> list[tuple[Event, int]]:
        """Up to `most` events from a byte offset on, each with the offset behind it. A line that is not whole is not there yet."""
        found: list[tuple[Event, int]] = []
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if len(found) == most or not line.endswith(b"\n"):
                    break
                offset += len(line)
                found.append((self._parse(line, offset - len(line)), offset))
        return found

    def _parse(self, line: bytes, offset: int) -> Event:
        try:
            event = json.loads(line)
            event["kind"], event["seq"], event["time"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "DST-3501", "tracking journal was altered", where=f"{self.path} at byte {offset}", found=repr(line[:60]),
                do="Move the file away and run again: finished work is found, recording starts anew",
            ) from error  # fmt: skip
        return dict(event)

    # --------------------------------------------------------------------------------------------------------- private

    def _replay(self) -> str:
        """Take up what the file holds, cut off a torn last line, and return the journal's id."""
        offset, first = 0, None
        while found := self.events(offset):
            for event, offset in found:  # noqa: B007
                first = first or event
                self._remember(event)
        self._file.truncate(offset)
        if first is None:
            first = {"kind": "journal", "id": uuid.uuid4().hex}
            self._write(first)
        return str(first["id"])

    def _append(self, kind: str, key: str, **content: Any) -> None:
        with self._lock:
            assert kind == "run" or key in self._times, f"run {key} was not declared"
            self._write({"kind": kind, "key": key, **content})

    def _write(self, event: Event) -> None:
        event = {"seq": self.count, "time": int(time.time() * 1000), **event}
        self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self._remember(event)

    def _remember(self, event: Event) -> None:
        self.count += 1
        key = event.get("key", "")
        match event["kind"]:
            case "journal":
                return
            case "run":
                self._unfinished[key] = None
            case "finish":
                self._unfinished.pop(key, None)
            case "params":
                self._params.setdefault(key, {}).update(event["values"])
            case "metrics":
                for name in (*event["values"], *event["nonfinite"]):
                    self._steps[key, name] = event["step"]
        self._times[key] = event["time"]
