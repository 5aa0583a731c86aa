"""The doctor sees what is amiss and says what to do, with real servers, files and clusters."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, TrackingConfig
from cluster.doctor import Check, check

NAMES = ["python", "ray", "torch", "transformers", "datasets", "mlflow", "device", "cpus", "memory", "/dev/shm", "ray folder"]


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Runs the doctor and returns the check of one name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(name: str, tracking: TrackingConfig | None = None, **cluster: object) -> Check:
        config = ClusterConfig(**{"storage": str(tmp_path / "storage"), **cluster})
        found = [c for c in check(config, tracking or TrackingConfig()) if c.name == name]
        return found[-1]

    return run


@pytest.fixture
def answering():
    """Starts a server that answers every request with one status; returns its address."""
    servers = []

    def start(status: int, body: bytes = b"{}") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.headers.get("Authorization"))  # first: the client may look as soon as it has the body
                self.send_response(200 if self.path == "/health" else status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        seen: list[str | None] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        start.seen = seen
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_healthy_machine(tmp_path):
    found = check(ClusterConfig(storage=str(tmp_path / "storage")), TrackingConfig())
    assert [c.name for c in found] == [*NAMES, "storage", "disk", "mlflow", "token", "hub"]
    by_name = {c.name: c for c in found}
    assert by_name["python"].found.startswith(".".join(map(str, sys.version_info[:2])))
    for name in ("python", "ray", "transformers", "datasets", "device", "cpus", "storage", "mlflow", "token"):
        assert by_name[name].state == "ok", by_name[name]
    assert all(bool(c.do) == (c.state != "ok") for c in found)
    assert os.listdir(tmp_path) == [], "looking leaves nothing behind"


def test_storage_below_a_file(look, tmp_path):
    (tmp_path / "file").write_text("")
    found = look("storage", storage=str(tmp_path / "file" / "storage"))
    assert found.state == "fail"
    assert "storage cannot be written" in found.found
    assert str(tmp_path / "file") in found.found
    assert "cluster.storage" in found.do


def test_a_scheme_that_is_refused(look):
    found = look("storage", storage="ftp://host/x")
    assert (found.state, found.do) == ("fail", "Copy the data to one of these first")


def test_a_local_folder_on_a_cluster_has_to_be_shared(look):
    assert look("shared", address="127.0.0.1:9").state == "warn"


def test_more_workers_than_cpus(look):
    cpus = len(os.sched_getaffinity(0))
    found = look("cpus", workers=cpus + 1)
    assert (found.state, found.found) == ("fail", f"{cpus}, but {cpus + 1} workers ask for {cpus + 1}")
    assert look("cpus", workers=cpus, cpus_per_worker=1).state == "ok"


def test_gpus_that_are_not_there(look):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = look("device", gpus_per_worker=1)
    assert found.state == "fail"
    assert "cluster.gpus_per_worker=0" in found.do


def test_a_folder_for_ray_that_is_not_there(look, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    assert look("ray folder").state == "fail"


# ------------------------------------------------------------------------------------------------------------------- MLflow


@pytest.mark.parametrize(
    ("status", "do"), [(403, "--allowed-hosts 127.0.0.1:"), (401, "MLFLOW_TRACKING_USERNAME"), (404, "address"), (500, "log")]
)
def test_what_a_server_answers(look, answering, status, do):
    uri = answering(status)
    found = look("mlflow", TrackingConfig(uri=uri))
    assert (found.state, found.found) == ("warn", f"{uri} answers HTTP {status}")
    assert do in found.do
    assert look("mlflow", TrackingConfig(uri=uri, strict=True)).state == "fail"


def test_a_server_that_is_well_gets_the_login(look, answering, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sesame")
    uri = answering(200)
    assert look("mlflow", TrackingConfig(uri=uri)) == Check("mlflow", "ok", uri)
    assert answering.seen == ["Basic YWRhOnNlc2FtZQ=="]


def test_a_server_that_is_something_else(look, answering):
    found = look("mlflow", TrackingConfig(uri=answering(200, b"<html>")))
    assert found.state == "warn"
    assert "does not answer as MLflow does" in found.found


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://127.0.0.1:9/mlflow"])
def test_nobody_there(look, uri):
    found = look("mlflow", TrackingConfig(uri=uri))
    assert found.state == "warn"
    assert "Connection refused" in found.found
    assert found.do


def test_sqlite_files(look, tmp_path):
    new, good, bad = (tmp_path / name for name in ("new.db", "good.db", "bad.db"))
    sqlite3.connect(good).close()
    bad.write_bytes(b"this is no database" * 100)
    assert look("mlflow", TrackingConfig(uri=f"sqlite:///{new}")) == Check("mlflow", "ok", f"{new} will be made")
    assert not new.exists()
    assert look("mlflow", TrackingConfig(uri=f"sqlite:///{good}")) == Check("mlflow", "ok", str(good))
    found = look("mlflow", TrackingConfig(uri=f"sqlite:///{bad}"))
    assert (found.state, found.found) == ("warn", f"{bad}: file is not a database")
    assert look("mlflow", TrackingConfig(uri=f"sqlite:///{tmp_path}/none/x.db", strict=True)).state == "fail"


def test_remote_storage_needs_a_server(look):
    found = look("mlflow", storage="ftp://bucket/x")
    assert found.state == "fail"
    assert "tracking.uri" in found.do


def test_a_real_server_that_does_not_allow_this_host(look, tmp_path):
    """MLflow answers /health to everybody, so that page proves nothing."""
    command = [Path(sys.executable).parent / "mlflow", "server", "--port", "0", "--workers", "1", "--allowed-hosts", "mlflow.example"]
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as free:
        port = free.server_port
    command[3] = str(port)
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as server:
        try:
            uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    assert urllib.request.urlopen(f"{uri}/health").read() == b"OK"
                    break
                except OSError:
                    time.sleep(0.3)
            found = look("mlflow", TrackingConfig(uri=uri))
            assert (found.state, found.found) == ("warn", f"{uri} answers HTTP 403"), (tmp_path / "log").read_text()
            assert f"--allowed-hosts 127.0.0.1:{port}" in found.do
        finally:
            server.terminate()


# ------------------------------------------------------------------------------------------------------------------ cluster


def test_a_token_that_others_can_read(look, monkeypatch, tmp_path):
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("secret")
    token.chmod(0o644)
    found = look("token")
    assert (found.state, found.do) == ("warn", f"chmod 600 {token}")
    assert "0644" in found.found
    token.chmod(0o600)
    assert look("token").state == "ok"


def test_a_cluster_without_a_token(look, monkeypatch):
    assert look("token", address="127.0.0.1:9").state == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = look("token", address="127.0.0.1:9")
    assert found.state == "fail"
    assert "chmod 600" in found.do
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    found = look("token", address="127.0.0.1:9")
    assert found.state == "ok"
    assert "sesame" not in str(found)


def test_the_hub(look, monkeypatch):
    assert look("hub").found.startswith("offline by HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert look("hub").found == "online"


def test_a_cluster_that_is_not_there_is_told_at_once(look):
    start = time.monotonic()
    found = look("cluster", address="127.0.0.1:9")
    assert (found.state, time.monotonic() - start < 10) == ("fail", True)
    assert "Connection refused" in found.found


@pytest.mark.ray
def test_a_cluster_that_is_there(look):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False, "object_store_memory": 80_000_000})
    try:
        assert look("cluster", address=cluster.address) == Check("cluster", "ok", f"{cluster.address}: 1 nodes, 3 CPU, 0 GPU")
    finally:
        cluster.shutdown()
