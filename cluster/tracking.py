"""MLflow as a view of the journal: what of it goes where in an experiment. cluster/delivery.py says when.

Everything may be delivered twice without harm, so nothing is lost and nothing is counted twice when a process or the server is killed:
runs and models are looked up by a tag before they are created, metrics carry the journal's times, files have the same paths. The only
file that imports mlflow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from cluster.journal import Event, Journal
from cluster.links import VIEW, view_tag
from cluster.mlmodel import write_model

_log = logging.getLogger(__name__)


class Away(Exception):
    """The server cannot be used now; says why and what to do."""


def prepare_process() -> None:
    """Short time-outs, and silence where MLflow talks about itself. At its defaults one call waits 246 s for a server that is down."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for every retry


class Delivery:
    """What of a journal is in one MLflow experiment, and how the rest gets there. Used by one thread at a time."""

    def __init__(
        self, uri: str, journal: Journal, experiment: str, artifact_root: str | None, note: str | None, columns: Sequence[str]
    ) -> None:
        self.uri, self.journal, self.experiment = uri, journal, experiment
        self.artifact_root, self.note, self.columns = artifact_root, note, columns
        self.abandoned = False
        self.client: mlflow.MlflowClient | None = None
        self.experiment_id = ""
        self.runs: dict[str, str] = {}
        self.offset = self.delivered = 0
        self._identity: list[Any] = []
        self._state = journal.path.with_name(journal.path.name + ".state.json")
        self._batches: dict[str, dict[str, Any]] = defaultdict(lambda: {"metrics": [], "params": {}, "tags": {}})
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            state = json.loads(self._state.read_bytes())
            if state["identity"][:2] == [uri, journal.id]:
                self._identity, self.runs = state["identity"], state["runs"]
                self.offset, self.delivered = state["offset"], state["delivered"]

    def connect(self) -> int:
        """Find or create the experiment and take up where delivery to it stopped. Returns the number of events delivered before."""
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with _away_on(MlflowException, ImportError):  # a driver for the database may not be installed
            client = mlflow.MlflowClient(self.uri, self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                with contextlib.suppress(MlflowException):  # another process may be first; what else went wrong shows in the next line
                    client.create_experiment(self.experiment, artifact_location=self._artifact_location())
                experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise Away(f"experiment {self.experiment} can neither be found nor created")
            if experiment.lifecycle_stage != "active":
                raise Away(f"experiment {self.experiment} was deleted: restore it or set tracking.experiment")
            for name, value in self._experiment_tags().items():
                if experiment.tags.get(name) != value:
                    client.set_experiment_tag(experiment.experiment_id, name, value)
        self.client, self.experiment_id = client, experiment.experiment_id
        # A new database may give an old number to a new experiment: the time tells them apart.
        identity = [self.uri, self.journal.id, experiment.experiment_id, experiment.creation_time]
        if identity != self._identity:
            self._identity, self.offset, self.delivered, self.runs = identity, 0, 0, {}
        return self.delivered

    def step(self) -> bool:
        """Deliver the next events; False if there were none. Raises Away."""
        if self.client is None:
            self.connect()
        self._batches.clear()
        deliver = {"run": self._run, "file": self._file, "dataset": self._dataset, "model": self._model, "finish": self._finish}
        events = self.journal.events(self.offset)
        for event, offset in events:
            match event["kind"]:
                case "metrics":
                    batch = self._batches[event["key"]]
                    batch["metrics"] += [Metric(_name(n), v, event["time"], event["step"]) for n, v in event["values"].items()]
                    batch["tags"] |= {f"nonfinite/{n}": f"{v} at step {event['step']}" for n, v in event["nonfinite"].items()}
                case "params" | "tags" as kind:
                    self._batches[event["key"]][kind] |= event["values"]
                case "journal":
                    pass
                case kind:
                    self._flush()
                    with _refusals(event["key"]) if kind != "run" else _away_on(MlflowException):
                        deliver[kind](event)
                    self._save(event["seq"] + 1, offset)
        self._flush()
        if events:
            self._save(events[-1][0]["seq"] + 1, events[-1][1])
        return bool(events)

    def _save(self, delivered: int, offset: int) -> None:
        if self.abandoned:
            return
        self.delivered, self.offset = delivered, offset
        state = {"identity": self._identity, "offset": offset, "delivered": delivered, "runs": self.runs}
        beside = self._state.with_name(self._state.name + ".tmp")
        beside.write_text(json.dumps(state))
        os.replace(beside, self._state)

    def _artifact_location(self) -> str | None:
        root = self.artifact_root
        if root and "://" not in root:
            root = Path(root).resolve().as_uri()
        return root and f"{root.rstrip('/')}/{self.experiment}"

    def _experiment_tags(self) -> dict[str, str]:
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": self.columns[0],
            f"mlflow.sharedViewState.{VIEW}": view_tag(self.columns),
        }
        return tags | ({"mlflow.note.content": _cut(self.note, 20000)} if self.note else {})

    # ---------------------------------------------------------------------------------------------------------- events

    def _flush(self) -> None:
        for key, batch in self._batches.items():
            run_id = self.runs[key]
            with _refusals(key):
                for metrics in _chunks(batch["metrics"], 1000):
                    self.client.log_batch(run_id, metrics=metrics)
                self._log_params(run_id, {_name(n): _cut(v, 6000) for n, v in batch["params"].items()})
                for tags in _chunks([RunTag(_name(n), _cut(v, 8000)) for n, v in batch["tags"].items()], 100):
                    self.client.log_batch(run_id, tags=tags)
        self._batches.clear()

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        for chunk in _chunks([Param(n, v) for n, v in params.items()], 100):
            try:
                self.client.log_batch(run_id, params=chunk)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                known = self.client.get_run(run_id).data.params  # from another journal of the same run: the first value stays
                self.client.log_batch(run_id, params=[p for p in chunk if p.key not in known])

    def _find(self, key: str) -> str | None:
        query = f"tags.`distillery.run` = '{key}' AND tags.`distillery.journal` = '{self.journal.id}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0].info.run_id if found else None

    def _run(self, event: Event) -> None:
        key, name = event["key"], event["name"]
        tags = event["tags"] | {"distillery.run": key, "distillery.journal": self.journal.id}
        if event["parent"]:
            tags["mlflow.parentRunId"] = self.runs[event["parent"]]
        if event["description"]:
            tags["mlflow.note.content"] = event["description"]
        tags = {_name(n): _cut(v, 8000) for n, v in tags.items()}
        if run_id := self.runs.get(key) or self._find(key):
            self.client.update_run(run_id, "RUNNING", name)
            self.client.log_batch(run_id, tags=[RunTag(n, v) for n, v in tags.items()])
        else:
            run_id = self.client.create_run(self.experiment_id, start_time=event["time"], tags=tags, run_name=name).info.run_id
        self.runs[key] = run_id

    def _finish(self, event: Event) -> None:
        self.client.set_terminated(self.runs[event["key"]], event["status"], event["time"])

    def _dataset(self, event: Event) -> None:
        scheme = event["source"].split("://", 1)[0] if "://" in event["source"] else "local"
        dataset = Dataset(event["name"], event["digest"][:36], scheme, json.dumps({"uri": event["source"]}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])]
        self.client.log_inputs(self.runs[event["key"]], datasets=inputs)

    def _file(self, event: Event) -> None:
        if not Path(event["path"]).is_file():
            _log.warning("tracking: %s is gone and cannot be shown with %s", event["path"], event["key"])
            return
        with _upload_timeout():
            self.client.log_artifact(self.runs[event["key"]], event["path"], event["folder"] or None)

    def _model(self, event: Event) -> None:
        key, folder, run_id = event["key"], Path(event["folder"]), self.runs[event["key"]]
        if not all((folder / f"{name}.json").is_file() for name in ("config", "tokenizer_config")):
            _log.warning("tracking: %s is gone and cannot be shown with %s", folder, key)
            return
        mark = f"{self.journal.id}/{key}/{event['name']}"
        found = self.client.search_logged_models([self.experiment_id], f"tags.`distillery.model` = '{mark}'", max_results=1)
        create = self.client.create_logged_model
        model = found[0] if found else create(self.experiment_id, event["name"], run_id, tags={"distillery.model": mark})
        if model.status != "READY":
            with tempfile.TemporaryDirectory() as staging, _upload_timeout():
                write_model(folder, Path(staging), event["input_example"], model.model_id, run_id)
                self.client.log_model_artifacts(model.model_id, staging)
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        if event["registered"]:
            self._register(event["registered"], model.model_id, run_id)

    def _register(self, name: str, model_id: str, run_id: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self.client.search_model_versions(f"name = '{name}'")
        if not any(version.run_id == run_id for version in versions):
            self.client.create_model_version(name, f"models:/{model_id}", run_id, model_id=model_id)


# --------------------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def _upload_timeout() -> Iterator[None]:
    """120 s: a server answers an upload when it has passed the file on. MLflow reads the variable at every request."""
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


@contextlib.contextmanager
def _away_on(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (*kinds, RequestException, SQLAlchemyError, OSError) as error:
        raise Away(_explain(error)) from error


@contextlib.contextmanager
def _refusals(key: str) -> Iterator[None]:
    """Away if the server cannot be used now; what it refuses for good is left out with a warning, so that the rest gets through."""
    with _away_on():
        try:
            yield
        except MlflowException as error:
            status = error.get_http_status_code()
            if status >= 500 or status in (401, 403, 408, 429):
                raise Away(_explain(error)) from error
            _log.warning("tracking: the server refused a part of %s: %s", key, _explain(error))


def _explain(error: Exception) -> str:
    """One line without secrets that says what is wrong and what to set."""
    text = str(error)
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    if "CERTIFICATE" in text.upper():
        return "its certificate is not trusted: set MLFLOW_TRACKING_SERVER_CERT_PATH"
    if status == 401:
        return "401, it wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 403:
        return "403, the user may not do this, or the server does not answer to this host name: start it with --allowed-hosts"
    text = text.split("Caused by", 1)[-1].strip().split("\n")[0]
    return re.sub(r"//[^/@\s]*@", "//", text)[:200] or type(error).__name__


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(value: str, most: int) -> str:
    marker = " ... [cut]"
    return value if len(value) <= most else value[: most - len(marker)] + marker


def _name(key: str) -> str:
    """A key that MLflow accepts: other characters become ":" and their hex number, what is too long ends in a checksum."""
    name = re.sub(r"[^/\w.\- ]", lambda m: f":{ord(m[0]):02x}", key)
    name = "/".join(part if part.strip(".") else part.replace(".", ":2e") or ":" for part in name.split("/"))
    return name if len(name) <= 250 else f"{name[:241]}-{zlib.crc32(name.encode()):08x}"
