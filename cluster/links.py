"""Where a person looks: links into the MLflow pages, the server behind them, and what a run says about its surroundings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from cluster.logfile import read
from distillation.errors import ConfigError, InputError

VIEW = "distillery"
PORT = 5000


def server_of(uri: str, port: int = PORT) -> str:
    """Address of the pages: the server itself, or the one that `distill ui` starts for a database."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"


def experiment_url(uri: str, experiment_id: str) -> str:
    """All runs with the columns and the order of `view_tag`. Without that order children are folded away under their parent."""
    query = urlencode({"viewStateShareKey": VIEW, "workflowType": "machine_learning"})
    return f"{server_of(uri)}/#/experiments/{experiment_id}/runs?{query}"


def chart_url(uri: str, experiment_id: str, metric: str, ascending: bool = False) -> str:
    """Charts of the runs: drawn are the first ten, so those with most of the metric, or with least."""
    query = {"orderByKey": f"metrics.`{metric}`", "orderByAsc": str(ascending).lower(), "compareRunsMode": "CHART"}
    return f"{server_of(uri)}/#/experiments/{experiment_id}/runs?{urlencode(query | {'workflowType': 'machine_learning'})}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    return f"{server_of(uri)}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def compare_url(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"{server_of(uri)}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"


def view_tag(columns: Sequence[str], ascending: bool = False) -> str:
    """Value of the experiment tag mlflow.sharedViewState.<VIEW>, as the page's own "share" button writes it."""
    order = {"orderByKey": f"metrics.`{columns[0]}`", "orderByAsc": ascending}
    shown = [*(f"metrics.`{name}`" for name in columns), "attributes.`Models`"]
    layout = {"columnOrder": shown, "columnWidths": dict.fromkeys(shown, 150), "runsHiddenMode": "SHOW_ALL"}
    return json.dumps({**order, "selectedColumns": shown, **layout})


class Recorded(NamedTuple):
    """What of a journal is in MLflow."""

    uri: str
    experiment_id: str
    runs: dict[str, str]
    """Id of a run by its key."""


def recorded(journal: Path) -> Recorded | None:
    """What was delivered of a journal, also while it is recorded and delivered; needs no server. None if nothing was."""
    state = read_state(journal)
    return Recorded(state["uri"], state["experiment_id"], state["runs"]) if state else None


def state_file(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.delivered.jsonl")


def read_state(journal: Path) -> dict[str, Any] | None:
    """How far the delivery of a journal is: the last line that cluster/tracking.py wrote, with the runs of all of them.

    None where there is none, where it is of another journal or cannot be read: then everything is delivered again.
    """
    state: dict[str, Any] = {}
    runs: dict[str, str] = {}
    try:
        first, _ = next(read(journal))
        for state, _ in read(state_file(journal)):
            runs |= state["runs"]
        return {**state, "runs": runs} if state["journal"] == first["id"] else None
    except (FileNotFoundError, StopIteration, InputError, KeyError):
        return None


def ui(uri: str, artifact_root: str, port: int = PORT) -> int:
    """Serve the pages of a database on this machine until interrupted; returns the exit code. Raises ConfigError for a server's uri."""
    if uri.startswith("http"):
        raise ConfigError("DST-2301", "runs are recorded by a server, it has the pages", where=uri, do="Open this address in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", uri, "--artifacts-destination", artifact_root, "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    try:
        return subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        return 0


def environment_tags() -> dict[str, str]:
    """Versions of what computes, and the git commit if this code lies in a repository. Names no host, user or password."""
    packages = ("distillery", "ray", "torch", "transformers", "datasets", "mlflow")
    tags = {f"version.{name}": importlib.metadata.version(name) for name in packages}
    tags |= {"version.python": platform.python_version(), "mlflow.source.name": "distill", "mlflow.source.type": "LOCAL"}
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # a repository around an installed copy is not ours
        return tags
    tags["mlflow.source.git.commit"] = _git("rev-parse", "HEAD") or ""
    tags["git.changed"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    if remote := _git("remote", "get-url", "origin"):
        tags["mlflow.source.git.repoURL"] = re.sub(r"//[^/@]*@", "//", remote)
    return tags


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this file; None if it fails or there is no git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
