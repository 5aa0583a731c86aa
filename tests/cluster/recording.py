"""What tests of recording share: a server that can be killed, and what is in MLflow."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.entities import Run

from cluster.config import TrackingConfig
from cluster.delivery import Target

JOB, STUDENT = "docstrings", "docstrings/L3-1a2b"


class Server:
    """What `distill ui` starts on a database, on a port that stays the same when it is started again."""

    def __init__(self, database: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.database, self.folder = f"http://127.0.0.1:{self.port}", database, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = "import sys; from cluster.links import ui; sys.exit(ui(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
        command = [sys.executable, "-c", script, self.database, str(self.folder / "artifacts"), str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=log, stderr=log, start_new_session=True)
        until(self._healthy, 60)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it to everything in the foreground."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(20) == 0
        self.process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


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
