"""What tests of recording share: where to, and what is in MLflow."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from cluster.config import TrackingConfig
from cluster.delivery import Target

databases = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
JOB, STUDENT = "docstrings", "docstrings/L3-1a2b"


def target(uri: str, folder: Path | None = None, **more: object) -> Target:
    """folder: for files, where there is no server."""
    config = TrackingConfig(uri=uri, strict=bool(more.pop("strict", False)))
    return Target(config, "sqlite:///unused.db", "docstrings", str(folder / "files") if folder else None, **more)


def runs_of(uri: str) -> dict[str, Run]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("docstrings")
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags["distillery.run"]: run for run in found}
    assert len(runs) == len(found), "a run exists twice"
    return runs


def history(uri: str, run: Run, metric: str) -> list[tuple[int, float]]:
    points = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)
