"""MLflow as a view of the journal: what of it goes where in an experiment. cluster/delivery.py says when.

Everything may be delivered twice without harm, so nothing is lost and nothing is counted twice when a process or the server is killed:
runs and models are looked up by a tag before they are created, metrics carry the journal's times, files have the same paths. Only this
file and the two it is made of, cluster/attachments.py and cluster/outages.py, import mlflow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from cluster.attachments import attach
from cluster.config import TrackingConfig
from cluster.journal import RUN_MARK, Journal
from cluster.links import VIEW, read_state, state_file, view_tag
from cluster.logfile import Event
from cluster.outages import Away, away_on, refusals

_log = logging.getLogger(__name__)

MOST_EVENTS = 2000
"""Read at once. What they say of one run goes out together."""

STATE_LINES = 1000
"""After so many the file that says how far delivery is is written anew."""


class Target(NamedTuple):
    """Where in MLflow a journal goes, and what the page above its runs shows."""

    config: TrackingConfig
    default_uri: str
    """Holds where `config.uri` is None."""
    default_experiment: str
    """Holds where `config.experiment` is None."""
    artifact_root: str | None
    """Folder for the files of a new experiment; None if the server has one."""
    note: str | None = None
    """Markdown above the runs, as long as the journal has no note of its own."""
    columns: Sequence[str] = ("test/accuracy",)
    """Metrics to show, at least one; the runs are sorted by the first."""
    ascending: bool = False
    """Whether less of the first is better."""

    @property
    def uri(self) -> str:
        return self.config.uri or self.default_uri

    @property
    def experiment(self) -> str:
        return self.config.experiment or self.default_experiment


@dataclass
class _Waiting:
    """What some events say of one run, in the order in which it goes out."""

    started: int = 0
    """Time of the first declaration, as the run's start."""
    name: str | None = None
    """As declared last; None: not declared again."""
    parent: str | None = None
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    attached: list[Event] = field(default_factory=list)
    """Data sets, files and models."""
    finish: Event | None = None

    def add(self, event: Event) -> None:
        match event["kind"]:
            case "run":
                self.started = self.started or event["time"]
                self.name, self.parent, self.finish = event["name"], event["parent"], None
                self.tags |= event["tags"] | ({"mlflow.note.content": event["description"]} if event["description"] else {})
            case "params":
                self.params |= event["values"]
            case "tags":
                self.tags |= event["values"]
            case "metrics":
                self.metrics += [Metric(_name(n), v, event["time"], event["step"]) for n, v in event["values"].items()]
                self.tags |= {f"nonfinite/{n}": f"{v} at step {event['step']}" for n, v in event["nonfinite"].items()}
            case "finish":
                self.finish = event
            case _:
                self.attached.append(event)


class Delivery:
    """What of a journal is in one MLflow experiment, and how the rest gets there. Used by one thread at a time."""

    def __init__(self, target: Target, journal: Journal) -> None:
        self.target, self.journal = target, journal
        self.abandoned = False
        self.client: mlflow.MlflowClient | None = None
        self.experiment_id = ""
        self.runs: dict[str, str] = {}
        self.offset = self.delivered = 0
        self._identity: dict[str, Any] = {}
        self._waiting: dict[str, _Waiting] = defaultdict(_Waiting)
        self._note: str | None = None
        self._reached: tuple[int, int] | None = None  # number and offset behind what waits
        self._certain = False  # whether every run that was created is in `runs`
        self._new: dict[str, str] = {}  # of `runs`, not yet in the file
        self._saves = 0
        state = read_state(journal.path)
        if state and (state["uri"], state["journal"]) == (target.uri, journal.id):
            self._identity = {name: state[name] for name in ("uri", "journal", "experiment_id", "created")}
            self.runs, self.offset, self.delivered = state["runs"], state["offset"], state["delivered"]

    def connect(self) -> int:
        """Find or create the experiment and take up where delivery to it stopped. Returns the number of events delivered before."""
        uri, name = self.target.uri, self.target.experiment
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with away_on(MlflowException, ImportError):  # a driver for the database may not be installed
            client = mlflow.MlflowClient(uri, uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                with contextlib.suppress(MlflowException):  # another process may be first; what else went wrong shows in the next line
                    client.create_experiment(name, artifact_location=self._artifact_location())
                experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise Away(f"experiment {name} can neither be found nor created")
            if experiment.lifecycle_stage != "active":
                raise Away(f"experiment {name} was deleted: restore it or set tracking.experiment")
            for tag, value in self._experiment_tags().items():
                if experiment.tags.get(tag) != value:
                    client.set_experiment_tag(experiment.experiment_id, tag, value)
        self.client, self.experiment_id = client, experiment.experiment_id
        # A new database may give an old number to a new experiment: the time tells them apart.
        identity = {"uri": uri, "journal": self.journal.id, "experiment_id": self.experiment_id, "created": experiment.creation_time}
        if identity != self._identity:
            self._identity, self.offset, self.delivered, self.runs = identity, 0, 0, {}
        return self.delivered

    def step(self) -> bool:
        """Deliver the next events, or what is left of them since the server went away. Returns whether more may wait. Raises Away."""
        if self.client is None:
            self.connect()
        resumed = self._reached is not None
        if not resumed:
            self._read()
        if self._reached is None:
            return False
        full = self._reached[0] - self.delivered == MOST_EVENTS
        self._find_runs()
        for key in list(self._waiting):
            if self.abandoned:
                return False
            self._deliver(key, self._waiting[key])
            del self._waiting[key]
        if self._note is not None:
            with refusals("the note"):
                self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", _cut(self._linked(self._note), 20000))
            self._note = None
        self._save()
        return full or resumed

    def _read(self) -> None:
        events = self.journal.events(self.offset, MOST_EVENTS)
        for event, offset in events:
            match event["kind"]:
                case "journal":
                    pass
                case "note":
                    self._note = event["markdown"]
                case _:
                    self._waiting[event["key"]].add(event)
            self._reached = event["seq"] + 1, offset

    def _save(self) -> None:
        """Add a line: where delivery is, and the runs that are new. The first of a process, and then every STATE_LINES, a new file."""
        if self.abandoned:
            return
        assert self._reached is not None
        (self.delivered, self.offset), self._reached = self._reached, None
        whole = self._saves % STATE_LINES == 0
        state = {"kind": "delivered", "seq": self._saves, "time": int(time.time() * 1000), **self._identity}
        state |= {"delivered": self.delivered, "offset": self.offset, "runs": self.runs if whole else self._new}
        path = state_file(self.journal.path)
        beside = path.with_name(path.name + ".tmp") if whole else path
        with beside.open("w" if whole else "a") as file:
            file.write(json.dumps(state) + "\n")
        if whole:
            os.replace(beside, path)
        self._new, self._saves = {}, self._saves + 1

    def _artifact_location(self) -> str | None:
        root = self.target.artifact_root
        if root and "://" not in root:
            root = Path(root).resolve().as_uri()
        return root and f"{root.rstrip('/')}/{self.target.experiment}"

    def _experiment_tags(self) -> dict[str, str]:
        columns, ascending, note = self.target.columns, self.target.ascending, self.target.note
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": columns[0],
            "mlflow.experiment.primaryMetric.greaterIsBetter": str(not ascending).lower(),
            f"mlflow.sharedViewState.{VIEW}": view_tag(columns, ascending=ascending),
        }
        return tags | ({"mlflow.note.content": _cut(note, 20000)} if note and not self.journal.has_note else {})

    def _linked(self, note: str) -> str:
        return RUN_MARK.sub(lambda mark: self.runs[mark[1]], note).replace("{experiment}", self.experiment_id)

    # ------------------------------------------------------------------------------------------------------------ runs

    def _find_runs(self) -> None:
        """Take up runs that a killed process created and did not note, or a server without being able to say so."""
        new = [waiting.started for key, waiting in self._waiting.items() if key not in self.runs]
        if self._certain or not new:
            return
        since = min(new) if self.offset else 0  # all that were created behind the offset are among these; without a state, all
        query = f"tags.`distillery.journal` = '{self.journal.id}' AND attributes.start_time >= {since}"
        token = None
        with away_on(MlflowException):
            while True:
                page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
                for run in page:
                    self._note_run(run.data.tags["distillery.run"], run.info.run_id)
                if not (token := page.token):
                    break
        self._certain = True

    def _note_run(self, key: str, run_id: str) -> None:
        self.runs[key] = self._new[key] = run_id

    def _deliver(self, key: str, waiting: _Waiting) -> None:
        """A run: created, or opened again; then in as few calls as possible what there is to say; then its end."""
        if key not in self.runs:
            self._create(key, waiting)
        elif waiting.name is not None:
            with refusals(key):
                self.client.update_run(self.runs[key], "RUNNING", waiting.name)
        metrics = _chunks(waiting.metrics, 800)
        params = _chunks([Param(n, v) for n, v in {_name(n): _cut(v, 6000) for n, v in waiting.params.items()}.items()], 50)
        tags = _chunks([RunTag(_name(n), _cut(v, 8000)) for n, v in waiting.tags.items()], 50)
        for batch in zip_longest(metrics, params, tags, fillvalue=()):
            self._log(key, *batch)
        while waiting.attached:
            with refusals(key):
                attach(self.client, self.experiment_id, self.runs[key], waiting.attached[0], self.journal.id)
            waiting.attached.pop(0)
        if waiting.finish:
            with refusals(key):
                self.client.set_terminated(self.runs[key], waiting.finish["status"], waiting.finish["time"])

    def _create(self, key: str, waiting: _Waiting) -> None:
        tags = {_name(n): _cut(v, 8000) for n, v in waiting.tags.items()}
        tags |= {"distillery.run": key, "distillery.journal": self.journal.id}
        if waiting.parent:
            tags["mlflow.parentRunId"] = self.runs[waiting.parent]
        self._certain = False
        with away_on(MlflowException):  # nothing of it can be delivered without it
            run = self.client.create_run(self.experiment_id, start_time=waiting.started, tags=tags, run_name=waiting.name)
        self._note_run(key, run.info.run_id)
        self._certain = True
        waiting.tags.clear()

    def _log(self, key: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> None:
        """One call; where the server refuses something in it, one for each kind. The first value of a parameter stays."""
        run_id = self.runs[key]
        with refusals(key):
            try:
                self.client.log_batch(run_id, metrics, params, tags)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                known = self.client.get_run(run_id).data.params
                for part in ({"metrics": metrics}, {"params": [p for p in params if p.key not in known]}, {"tags": tags}):
                    if any(part.values()):
                        with refusals(key):
                            self.client.log_batch(run_id, **part)


# ----------------------------------------------------------------------------------------------------------- helpers


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(value: str, most: int) -> str:
    marker, value = " ... [cut]", value.replace("\0", "\\0")  # PostgreSQL has no such character
    return value if len(value) <= most else value[: most - len(marker)] + marker


def _name(key: str) -> str:
    """A key that MLflow accepts: other characters become ":" and their hex number, what is too long ends in a checksum."""
    name = re.sub(r"[^/\w.\- ]", lambda m: f":{ord(m[0]):02x}", key)
    name = "/".join(part if part.strip(".") else part.replace(".", ":2e") or ":" for part in name.split("/"))
    return name if len(name) <= 250 else f"{name[:241]}-{zlib.crc32(name.encode()):08x}"
