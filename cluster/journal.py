"""What is to be recorded of a job, as an append-only file of JSON lines. MLflow is a view of it (cluster/tracking.py).

Recording costs one write and one flush and never waits for a server; it survives a killed process. One process writes and delivers a
journal at a time: it holds the lock. The first line names the journal, so that two journals never share a run.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cluster.logfile import Event, LogFile, read

Scalar = str | int | float | bool | None
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_MARK = re.compile(r"\{run:([^{}]*)\}")
"""In a note: {run:KEY} becomes the run's id in MLflow."""

_log = logging.getLogger(__name__)


class Journal:
    """Runs by a stable key, such as "docstrings/L3-1a2b". Thread-safe; not picklable.

    Raises ConflictError if another process has it open, InputError if a line in the middle cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = LogFile(path)
        self.path = self._file.path
        self._steps: dict[str, dict[str, int]] = {}
        self._params: dict[str, dict[str, str]] = {}
        self._began: dict[str, int] = {}
        self._times: dict[str, int] = {}
        self._unfinished: dict[str, None] = {}
        self._statuses: dict[str, Status] = {}
        self.has_note = False
        first: Event | None = None
        for event in self._file.replay():
            first = first or event
            self._remember(event)
        self.id = str((first or self._write("journal", id=uuid.uuid4().hex))["id"])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Recording afterwards is an error."""
        self._file.close()

    @property
    def count(self) -> int:
        """Number of events."""
        return self._file.count

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
        with self._file.lock:
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
        with self._file.lock:
            known = self._steps.get(key, {})
            new = {name: float(value) for name, value in values.items() if step > known.get(name, -1)}
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

    def model(
        self,
        key: str,
        folder: Path,
        *,
        name: str,
        input_example: Sequence[str],
        registered: str | None = None,
        alias: str | None = None,
    ) -> None:
        """A text classifier as `save_pretrained` wrote it, read at delivery.

        registered: also a version of this registered model; alias: a name such as "champion" that moves to the version recorded last.
        """
        assert (folder / "config.json").is_file(), folder
        assert (folder / "config.json").is_file(), folder
        assert registered or not alias, "only a registered model has aliases"
        content = {"folder": str(folder.resolve()), "name": name, "input_example": list(input_example)}
        self._append("model", key, **content, registered=registered, alias=alias)

    def note(self, markdown: str) -> None:
        """What stands above all runs, in place of what stood there. Folded up, MLflow shows its first line.

        `{run:KEY}` becomes the id of that run in MLflow and `{experiment}` that of the experiment, so a picture that was logged with a run is
        shown by `![front](get-artifact?path=front.png&run_uuid={run:KEY})`: as wide as it is, without its right side if that is over 800 px.
        """
        unknown = [key for key in RUN_MARK.findall(markdown) if key not in self._times]
        assert not unknown, f"runs {unknown} were not declared"
        self._write("note", markdown=markdown)

    def finish(self, key: str, status: Status) -> None:
        self._append("finish", key, status=status)

    def finish_unfinished(self, status: Status) -> list[str]:
        """End every run that has not ended, at the time of its last event. Returns their keys."""
        keys = list(self._unfinished)
        for key in keys:
            self._append("finish", key, status=status, time=self._times[key], closed=True)
        return keys

    # ------------------------------------------------------------------------------------------------------------ read

    def status(self, key: str) -> Status | None:
        """How a run ended last; None if it has not, or was only closed behind a process that died."""
        return self._statuses.get(key)

    def began(self, key: str) -> int:
        """When a run was first declared, in milliseconds."""
        return self._began[key]

    def events(self, offset: int = 0, most: int = 2000) -> list[tuple[Event, int]]:
        """Up to `most` events from a byte offset on, each with the offset behind it. A line that is not whole is not there yet."""
        return list(islice(read(self.path, offset), most))

    # --------------------------------------------------------------------------------------------------------- private

    def _append(self, kind: str, key: str, **content: Any) -> None:
        assert kind == "run" or key in self._times, f"run {key} was not declared"
        self._write(kind, key=key, **content)

    def _write(self, kind: str, **content: Any) -> Event:
        with self._file.lock:
            event = self._file.write(kind, **content)
            self._remember(event)
            return event

    def _remember(self, event: Event) -> None:
        key = event.get("key", "")
        match event["kind"]:
            case "journal":
                return
            case "note":
                self.has_note = True
                return
            case "run":
                self._began.setdefault(key, event["time"])
                self._unfinished[key] = None
                self._statuses.pop(key, None)
            case "finish":
                self._unfinished.pop(key, None)
                if not event.get("closed"):
                    self._statuses[key] = event["status"]
            case "params":
                self._params.setdefault(key, {}).update(event["values"])
            case "metrics":
                names = map(sys.intern, (*event["values"], *event["nonfinite"]))  # thousands of runs have the same names
                self._steps.setdefault(key, {}).update(dict.fromkeys(names, event["step"]))
        self._times[key] = event["time"]
