"""What goes to MLflow beside numbers: the data sets, files and models of a run. Delivered twice, each is there once."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException

from cluster.logfile import Event
from cluster.mlmodel import write_model
from cluster.outages import upload_timeout

_log = logging.getLogger(__name__)


def attach(client: MlflowClient, experiment_id: str, run_id: str, event: Event, journal_id: str) -> None:
    """Carry out an event of a journal with one of these kinds."""
    match event["kind"]:
        case "dataset":
            _dataset(client, run_id, event)
        case "file":
            _file(client, run_id, event)
        case "model":
            _model(client, experiment_id, run_id, event, mark=f"{journal_id}/{event['key']}/{event['name']}")
        case kind:
            raise AssertionError(kind)


def _dataset(client: MlflowClient, run_id: str, event: Event) -> None:
    scheme = event["source"].split("://", 1)[0] if "://" in event["source"] else "local"
    dataset = Dataset(event["name"], event["digest"][:36], scheme, json.dumps({"uri": event["source"]}))
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])


def _file(client: MlflowClient, run_id: str, event: Event) -> None:
    if not Path(event["path"]).is_file():
        _log.warning("tracking: %s is gone and cannot be shown with %s", event["path"], event["key"])
        return
    with upload_timeout():
        client.log_artifact(run_id, event["path"], event["folder"] or None)


def _model(client: MlflowClient, experiment_id: str, run_id: str, event: Event, mark: str) -> None:
    """mark: by it the model is found again."""
    folder = Path(event["folder"])
    if not (folder / "config.json").is_file():
        _log.warning("tracking: %s is gone and cannot be shown with %s", folder, event["key"])
        return
    found = client.search_logged_models([experiment_id], f"tags.`distillery.model` = '{mark}'", max_results=1)
    create = client.create_logged_model
    model = found[0] if found else create(experiment_id, event["name"], run_id, tags={"distillery.model": mark})
    if model.status != "READY":
        with tempfile.TemporaryDirectory() as staging, upload_timeout():
            write_model(folder, Path(staging), event["input_example"], model.model_id, run_id)
            client.log_model_artifacts(model.model_id, staging)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if event["registered"]:
        _register(client, event, model)


def _register(client: MlflowClient, event: Event, model: LoggedModel) -> None:
    """A version, once; and the alias, unless a later event gave it to another version: old events that come again move nothing back.

    The version is named by where its files are: for "models:/ID", what MLflow shows with a server, a database is looked up in the process's
    default store, whatever the client's.
    """
    name, alias, where = event["registered"], event.get("alias"), model.artifact_location
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{model.source_run_id}'")
    version = next((v for v in versions if v.source == where), None)
    if version is None:
        version = client.create_model_version(name, where, model.source_run_id, model_id=model.model_id)
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version.version}])})
    moved = f"distillery.{alias}"
    if alias and event["time"] >= int(client.get_registered_model(name).tags.get(moved, 0)):
        client.set_registered_model_alias(name, alias, version.version)
        client.set_registered_model_tag(name, moved, str(event["time"]))
