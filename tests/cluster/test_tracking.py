"""Against real MLflow: SQLite directly, and servers that start late, die and come back. Only the journal is allowed to be fast."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest

from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from cluster.links import state_file
from distillation.errors import TrackingError
from tests.cluster.recording import JOB, STUDENT, databases, history, runs_of, target
from tests.servers import Server, until


@databases
def test_everything_arrives_and_a_second_job_goes_on_with_the_same_runs(database: str, tmp_path: Path) -> None:
    picture = tmp_path / "curve.txt"
    picture.write_text("first")
    long, odd = "x" * 7000, "losses.c++/ä;"
    with Journal(tmp_path / "tracking.jsonl") as journal, Tracker(target(database, tmp_path, note="# Hello"), journal) as tracker:
        journal.run(JOB, name="docstrings", description="**main**")
        journal.run(STUDENT, name="L3", parent=JOB, tags={"role": "student"})
        journal.params(STUDENT, {f"p{i:03}": i for i in range(250)} | {"long": long, odd: "kept", "n" * 300: "long key"})
        for step in range(2500):
            journal.metrics(STUDENT, {"train/loss": step / 4}, step)
        journal.metrics(STUDENT, {"train/gradient": math.inf, "train/other": 1.0}, step=12)
        journal.dataset(STUDENT, "docstrings", "0123456789abcdef" * 4, "s3://bucket/corpora/x", "training")
        journal.file(STUDENT, picture, "plots")
        journal.finish(STUDENT, "FINISHED")
    assert tracker.close() == 0
    picture.write_text("second")
    with Journal(tmp_path / "tracking.jsonl") as journal, Tracker(target(database, tmp_path), journal) as again:
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        journal.metrics(STUDENT, {"train/loss": -1.0}, step=2499)
        journal.metrics(STUDENT, {"test/accuracy": 0.75}, step=2500)
        journal.file(STUDENT, picture, "plots")
        journal.finish(STUDENT, "KILLED")
        journal.finish(JOB, "FINISHED")

    runs, client = runs_of(database), mlflow.MlflowClient(database)
    job, student = runs[JOB], runs[STUDENT]
    assert set(runs) == {JOB, STUDENT}
    assert student.data.tags["mlflow.parentRunId"] == job.info.run_id
    assert (job.info.run_name, student.info.run_name) == ("docstrings", "L3")
    assert (job.info.status, student.info.status) == ("FINISHED", "KILLED")
    assert (job.data.tags["mlflow.note.content"], student.data.tags["role"]) == ("**main**", "student")
    assert history(database, student, "train/loss") == [(step, step / 4) for step in range(2500)]
    assert history(database, student, "test/accuracy") == [(2500, 0.75)]
    assert student.data.tags["nonfinite/train/gradient"] == "inf at step 12"
    assert "train/gradient" not in student.data.metrics
    assert len(student.data.params) == 253
    assert student.data.params["p249"] == "249"
    assert student.data.params["long"] == "x" * 5990 + " ... [cut]"
    assert student.data.params["losses.c:2b:2b/ä:3b"] == "kept"
    assert [value for name, value in student.data.params.items() if name.startswith("nnn") and len(name) == 250] == ["long key"]
    dataset = student.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.source_type) == ("docstrings", "0123456789abcdef0123456789abcdef0123", "s3")
    assert Path(client.download_artifacts(student.info.run_id, "plots/curve.txt", str(tmp_path))).read_text() == "second"
    events = [json.loads(line) for line in (tmp_path / "tracking.jsonl").read_bytes().splitlines()]
    ends = [event["time"] for event in events if event["kind"] == "finish" and event["key"] == STUDENT]
    assert (student.info.start_time, student.info.end_time) == (events[2]["time"], ends[-1])
    experiment = client.get_experiment_by_name("docstrings")
    assert experiment.tags["mlflow.note.content"] == "# Hello"
    assert again.run_url(STUDENT) == f"http://127.0.0.1:5000/#/experiments/1/runs/{student.info.run_id}?workflowType=machine_learning"
    assert again.compare_url([JOB, "other"]) is None


def test_killed_job_goes_on_with_its_runs(database: str, tmp_path: Path) -> None:
    """SIGKILL while metrics are recorded and delivered; the next process repeats steps, as training does after its last checkpoint."""
    script = f"""
from pathlib import Path
from cluster.config import TrackingConfig
from cluster.delivery import Target, Tracker
from cluster.journal import Journal
import itertools, time
with Journal(Path({str(tmp_path / "t.jsonl")!r})) as journal, Tracker(
    Target(TrackingConfig(uri={database!r}), "", "docstrings", {str(tmp_path / "files")!r}), journal
) as tracker:
    journal.run({JOB!r}, name="docstrings")
    journal.run({STUDENT!r}, name="L3", parent={JOB!r})
    for step in itertools.count():
        journal.metrics({STUDENT!r}, {{"train/loss": step / 4}}, step)
        if tracker.run_url({STUDENT!r}) and step % 100 == 0:
            print(step, flush=True)
        time.sleep(0.001)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as process:
        reached = [int(process.stdout.readline()) for _ in range(10)][-1]
        process.kill()
    assert {run.info.status for run in runs_of(database).values()} == {"RUNNING"}
    with Journal(tmp_path / "t.jsonl") as journal, Tracker(target(database, tmp_path), journal):
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        for step in range(reached - 500, reached + 500):
            journal.metrics(STUDENT, {"train/loss": step / 4}, step)
        journal.finish(STUDENT, "FINISHED")
        journal.finish(JOB, "FINISHED")
    runs = runs_of(database)
    assert {key: run.info.status for key, run in runs.items()} == {JOB: "FINISHED", STUDENT: "FINISHED"}
    assert history(database, runs[STUDENT], "train/loss") == [(step, step / 4) for step in range(reached + 500)]


@databases
def test_lost_state_and_two_journals(database: str, tmp_path: Path) -> None:
    """Killed between delivery and saving the state: all is delivered again and nothing is there twice. Another journal has other runs."""
    for name in ("a", "b"):
        with Journal(tmp_path / f"{name}.jsonl") as journal:
            journal.run(JOB, name=name)
            journal.params(JOB, {"p": 1})
            journal.metrics(JOB, {"loss": 0.5}, step=1)
            journal.metrics(JOB, {"loss": 0.25}, step=2)
            journal.finish(JOB, "FINISHED")
            assert deliver(target(database, tmp_path), journal) == 6
            assert deliver(target(database, tmp_path), journal) == 0
            state_file(journal.path).unlink()
            assert deliver(target(database, tmp_path), journal) == 6
    client = mlflow.MlflowClient(database)
    found = client.search_runs(["1"])
    assert sorted(run.info.run_name for run in found) == ["a", "b"]
    assert [history(database, run, "loss") for run in found] == [[(1, 0.5), (2, 0.25)]] * 2


def test_other_database_gets_everything(database: str, empty_database: Path, tmp_path: Path) -> None:
    """The view can be rebuilt; runs that a killed job left open end when it was last heard of."""
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"loss": 0.5}, step=1)
        last = journal.events()[-1][0]["time"]
        assert deliver(target(database, tmp_path), journal) == 4
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        assert deliver(target(database, tmp_path), journal) == 4
    run = runs_of(database)[JOB]
    assert (run.info.status, run.info.end_time) == ("KILLED", last)
    assert history(database, run, "loss") == [(1, 0.5)]


def test_a_refused_event_does_not_hold_up_the_rest(database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        deliver(target(database, tmp_path), journal)
        mlflow.MlflowClient(database).delete_run(runs_of(database)[STUDENT].info.run_id)
        journal.metrics(STUDENT, {"loss": 1.0}, step=1)
        journal.metrics(JOB, {"loss": 2.0}, step=1)
        deliver(target(database, tmp_path), journal)
    assert history(database, runs_of(database)[JOB], "loss") == [(1, 2.0)]
    assert f"refused a part of {STUDENT}" in caplog.text


def test_failed_job_marks_its_runs(database: str, tmp_path: Path) -> None:
    def job() -> None:
        with Journal(tmp_path / "t.jsonl") as journal, Tracker(target(database, tmp_path), journal):
            journal.run(JOB, name="docstrings")
            journal.run(STUDENT, name="L3", parent=JOB)
            journal.finish(STUDENT, "FINISHED")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert {key: run.info.status for key, run in runs_of(database).items()} == {JOB: "FAILED", STUDENT: "FINISHED"}


@databases
def test_two_jobs_create_one_experiment_at_once(database: str, tmp_path: Path) -> None:
    def job(name: str) -> None:
        with Journal(tmp_path / f"{name}.jsonl") as journal:
            journal.run(name, name=name)
            deliver(target(database, tmp_path), journal)

    threads = [threading.Thread(target=job, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(runs_of(database)) == {"a", "b", "c"}


def test_server_that_starts_late_and_dies_on_the_way(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Down at the start, up, killed while metrics are sent, up again: each value arrives once, and recording never waits."""
    slowest = 0.0
    with (
        Journal(tmp_path / "t.jsonl") as journal,
        Tracker(target(server.uri), journal) as tracker,
    ):

        def steps(first: int, last: int) -> None:
            nonlocal slowest
            for step in range(first, last):
                before = time.perf_counter()
                journal.metrics(STUDENT, {"train/loss": step / 8, "perf/rows_per_second": float(step)}, step)
                slowest = max(slowest, time.perf_counter() - before)
                time.sleep(0.001)

        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        journal.params(STUDENT, {"training.epochs": 3})
        steps(0, 500)
        assert tracker.experiment_url() is None
        server.start()
        until(lambda: tracker.run_url(STUDENT), 30)
        steps(500, 600)
        server.kill()
        steps(600, 1500)
        time.sleep(1)
        server.start()
        steps(1500, 1600)
        journal.file(STUDENT, Path(__file__), "code")
        journal.finish(STUDENT, "FINISHED")
        journal.finish(JOB, "FINISHED")
    runs = runs_of(server.uri)
    assert history(server.uri, runs[STUDENT], "train/loss") == [(step, step / 8) for step in range(1600)]
    assert history(server.uri, runs[STUDENT], "perf/rows_per_second") == [(step, float(step)) for step in range(1600)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[STUDENT].data.tags["mlflow.parentRunId"] == runs[JOB].info.run_id
    assert [file.path for file in mlflow.MlflowClient(server.uri).list_artifacts(runs[STUDENT].info.run_id, "code")] == [
        "code/test_tracking.py"
    ]
    assert 1 <= caplog.text.count("cannot be used") <= 2
    assert "incomplete" not in caplog.text
    assert slowest < 0.05, f"recording took {slowest * 1000:.1f} ms"


def test_server_that_never_comes(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    with Journal(tmp_path / "t.jsonl") as journal, Tracker(target(server.uri), journal) as tracker:
        assert time.monotonic() - started < 1
        journal.run(JOB, name="docstrings")
        costs = []
        for step in range(1000):
            before = time.perf_counter()
            journal.metrics(JOB, {"train/loss": 1.0}, step)
            costs.append(time.perf_counter() - before)
        assert sorted(costs)[990] < 0.005
        until(lambda: "cannot be used" in caplog.text, 15)
        ended = time.monotonic()
    assert time.monotonic() - ended < 10
    assert tracker.run_url(JOB) is None
    assert f'tracking incomplete: 1002 events wait in {tmp_path}/t.jsonl; run "distill sync"' in caplog.text
    with Journal(tmp_path / "t.jsonl") as journal, pytest.raises(TrackingError, match="DST-7001"):
        deliver(target(server.uri), journal)


@pytest.mark.parametrize("hangs", [False, True])
def test_strict_tracking_refuses_at_once(hangs: bool, tmp_path: Path) -> None:
    """A port nobody listens on, and a server that takes the connection and never answers."""
    with socket.socket() as listener, Journal(tmp_path / "t.jsonl") as journal:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError) as caught, Tracker(target(uri, strict=True), journal):
            pytest.fail("the block must not run")
        assert time.monotonic() - started < 10
        assert (caught.value.exit_code, caught.value.code) == (7, "DST-7001")


@pytest.mark.parametrize(("status", "setting"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts")])
def test_refused_login_says_what_to_set(status: int, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-7f3a")
    with HTTPServer(("127.0.0.1", 0), Refuses) as refusing, Journal(tmp_path / "t.jsonl") as journal:
        thread = threading.Thread(target=refusing.serve_forever)
        thread.start()
        try:
            with pytest.raises(TrackingError, match=f"{status}.*{setting}") as caught:
                deliver(target(f"http://127.0.0.1:{refusing.server_port}"), journal)
        finally:
            refusing.shutdown()
            thread.join()
    assert "canary" not in str(caught.value)


def test_ui_shows_files_of_a_database_and_answers_only_to_its_own_name(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "curve.txt"
    picture.write_text("a curve")
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.file(JOB, picture, "plots")
        deliver(target(server.database, tmp_path), journal)
    server.start()
    path = f"{server.uri}/get-artifact?path=plots%2Fcurve.txt&run_uuid={runs_of(server.database)[JOB].info.run_id}"
    with urllib.request.urlopen(path, timeout=10) as answer:
        assert answer.read() == b"a curve"
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(urllib.request.Request(path, headers={"Host": "10.example.org"}), timeout=10)
    caught.value.close()
    server.interrupt()
